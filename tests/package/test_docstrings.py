"""Docstrings of the public names: sections equal the signature, and their examples run on tiny simulated cells."""

import ast
import dataclasses
import doctest
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import scldm_cd4
from scldm_cd4 import CD4Model, config, datasets, flow, metrics, pl, pp, ranking
from scldm_cd4.data import splits

ROOT = Path(__file__).parents[2]
MAX_LINES = 8
NO_EXAMPLE = {
    "data.splits.make_split": "takes cells as a training reads them",
    "data.splits.Split": "made by make_split",
    "metrics.baselines.emit": "takes training cells as baselines read them; predict reads them",
}
"""Public names without an example, and why."""


def _public() -> dict[str, Any]:
    found: dict[str, Any] = {"CD4Model": CD4Model, "settings": type(scldm_cd4.settings), "flow.guided": flow.guided}
    found["open_cells"] = scldm_cd4.open_cells
    found |= {"data.splits.make_split": splits.make_split, "data.splits.Split": splits.Split}
    found |= {
        f"CD4Model.{name}": getattr(CD4Model, name)
        for name in dir(CD4Model)
        if not name.startswith("_") and not isinstance(inspect.getattr_static(CD4Model, name), property)
    }
    modules = {"metrics": metrics, "datasets": datasets, "pl": pl, "pp": pp, "ranking": ranking}
    modules |= {"metrics.baselines": metrics.baselines, "metrics.compat": metrics.compat}
    for place, module in modules.items():
        found |= {f"{place}.{name}": getattr(module, name) for name in module.__all__}
    for place, module in {"metrics.ranking": metrics.ranking, "metrics.registry": metrics.registry}.items():
        found |= _defined(place, module)
    found |= _defined("config", config)
    return {name: thing for name, thing in found.items() if callable(thing)}


def _defined(place: str, module: Any) -> dict[str, Any]:
    """Return what a module without `__all__` defines itself under public names."""
    return {
        f"{place}.{name}": thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    }


PUBLIC = _public()


def sections(thing: Any) -> dict[str, list[str]]:
    """Return the lines below each heading of a docstring."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and re.fullmatch("-{3,}", below):
            current = found.setdefault(line, [])
        elif not re.fullmatch("-{3,}", line):
            current.append(line)
    return found


def documented(lines: list[str]) -> set[str]:
    """Return the names that a section explains."""
    heads = [line for line in lines if line and not line.startswith(" ")]
    return {name.strip().lstrip("*") for line in heads for name in line.split(",")}


def own_raises(thing: Any) -> set[str]:
    """Return the errors that a function raises in its own body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in raised}
    return {name for name in names if name.endswith("Error")}


def field_docs(thing: type) -> set[str]:
    """Return the fields of a dataclass that a string below them explains."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id
        for field, below in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_sections_equal_the_signature(name: str):
    thing, found = PUBLIC[name], sections(PUBLIC[name])
    first = (inspect.getdoc(thing) or "").partition("\n")[0]
    assert first.rstrip(":").endswith((".", ")")), f"{name} begins with {first!r}, which is no sentence"
    if dataclasses.is_dataclass(thing):
        fields = {field.name for field in dataclasses.fields(thing)}
        assert fields - documented(found.get("Attributes", [])) - field_docs(thing) == set()
        return
    if getattr(thing, "_is_protocol", False):
        return
    parameters = {p for p in inspect.signature(thing).parameters if p != "self"}
    assert documented(found.get("Parameters", [])) == parameters
    if inspect.isclass(thing):
        return
    returns = inspect.signature(thing).return_annotation
    assert ("Returns" in found or "Yields" in found) == (returns is not None)
    missing = own_raises(thing) - documented(found.get("Raises", []))
    assert not missing, f"{name} raises {missing} and does not say so"


@pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning")  # of mudata, about its own coming default
@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in NO_EXAMPLE])
def test_example_runs(name: str, names: dict[str, Any], here: Path):
    lines = sections(PUBLIC[name]).get("Examples", [])
    code = [line for line in lines if line.startswith((">>>", "..."))]
    assert 0 < len(code) <= MAX_LINES, f"{name} needs an example of at most {MAX_LINES} lines"
    test = doctest.DocTestParser().get_doctest("\n".join(lines) + "\n", dict(names), name, None, None)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_the_reference_lists_every_public_name():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    own = {name for name in PUBLIC if not name.startswith("CD4Model.")}
    missing = [name for name in own if not re.search(rf"^ *\S*\b{name.split('.')[-1]}$", pages, re.MULTILINE)]
    assert sorted(missing) == ["settings"]  # its class is listed


def test_the_reference_explains_the_names_of_its_examples(names: dict[str, Any]):
    page = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in page] == []

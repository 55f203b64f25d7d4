"""What a user gets: version, quick import, dependency direction, packages without data, commands of the README."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import scldm_cd4

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/scldm_cd4"
HEAVY = ("torch", "lightning", "scanpy", "ot", "matplotlib", "umap", "sklearn")


def imports(path: Path) -> set[str]:
    """All modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(place: str) -> list[Path]:
    path = SOURCE / place
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert found
    return found


def reaches(module: str, forbidden: str) -> bool:
    return module == forbidden or module.startswith(f"{forbidden}.")


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    releases = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert project["version"] == scldm_cd4.__version__ == releases[0]


def test_import_is_light():
    code = f"import sys, scldm_cd4; sys.exit(' '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("place", ["", ".pl", ".pp", ".metrics", ".ranking", ".datasets"])
def test_dir_lists_the_public_names_and_no_others(place: str):
    module = import_module(f"scldm_cd4{place}")
    assert [name for name in dir(module) if not name.startswith("_")] == sorted(set(module.__all__) - {"__version__"})
    assert all(hasattr(module, name) for name in module.__all__)


def test_lightning_waits_for_a_training():
    code = "import sys, scldm_cd4; scldm_cd4.CD4Model; sys.exit('lightning' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("place", "forbidden"),
    [
        ("config.py", ("torch", "anndata", "numpy")),
        ("registry.py", ("torch", "scldm_cd4.data", "scldm_cd4.nn", "scldm_cd4.train", "scldm_cd4.model")),
        ("flow", ("scldm_cd4.nn", "scldm_cd4.data", "scldm_cd4.train", "scldm_cd4.model", "anndata", "lightning")),
        ("nn", ("anndata", "scldm_cd4.data", "scldm_cd4.flow", "scldm_cd4.train", "scldm_cd4.model", "lightning")),
        ("data", ("torch", "scldm_cd4.nn", "scldm_cd4.flow", "scldm_cd4.train", "scldm_cd4.model", "lightning")),
        ("metrics", ("torch", "scldm_cd4.model", "scldm_cd4.nn", "scldm_cd4.train", "scldm_cd4.generation")),
        ("datasets", ("torch", "scldm_cd4.model", "scldm_cd4.nn", "scldm_cd4.train")),
        ("pl", ("torch", "scldm_cd4.model", "scldm_cd4.cli")),
        ("train", ("scldm_cd4.model", "scldm_cd4.cli", "scldm_cd4.generation", "scldm_cd4.ranking")),
        ("sampling.py", ("scldm_cd4.model", "scldm_cd4.train", "scldm_cd4.cli", "lightning")),
        ("generation.py", ("scldm_cd4.model", "scldm_cd4.train.runner", "scldm_cd4.cli", "lightning")),
        ("embedding.py", ("scldm_cd4.model", "scldm_cd4.train.runner", "scldm_cd4.cli", "lightning")),
        ("ranking", ("scldm_cd4.model", "scldm_cd4.train", "scldm_cd4.cli", "lightning")),
        ("model.py", ("scldm_cd4.cli", "lightning")),
        ("checkpoint", ("scldm_cd4.model", "scldm_cd4.cli", "lightning")),
    ],
)
def test_dependencies_run_downward(place: str, forbidden: tuple[str, ...]):
    wrong = [
        f"{path.relative_to(SOURCE)} imports {module}"
        for path in modules(place)
        for module in sorted(imports(path))
        if any(reaches(module, name) for name in forbidden)
    ]
    assert not wrong


def test_parts_of_metrics_build_on_those_before_them():
    order = ("registry.py", "cells", "effects", "de", "distribution", "baselines", "scoring", "compat", "page")
    inside = {path.name for path in (SOURCE / "metrics").iterdir()} - {"__init__.py", "__pycache__", "ranking.py"}
    assert inside == set(order)
    for i, place in enumerate(order):
        later = [f"scldm_cd4.metrics.{name}" for name in order[i + 1 :]]
        for path in modules(f"metrics/{place}"):
            assert not [module for module in imports(path) if any(reaches(module, name) for name in later)], path


def test_only_training_imports_lightning():
    users = {
        path.relative_to(SOURCE).parts[0]
        for path in SOURCE.rglob("*.py")
        if any(reaches(module, "lightning") for module in imports(path))
    }
    assert users == {"train"}


def test_nothing_is_unpickled_and_nothing_printed():
    pickles = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    for path in SOURCE.rglob("*.py"):
        assert not [m for m in imports(path) if any(reaches(m, name) for name in pickles)], path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "torch.load", "torch.save", "pd.read_pickle"), path
                if called == "CD4Model.from_pretrained":  # its reader of pickles runs nothing of them
                    continue
                assert not any(
                    k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                    for k in node.keywords
                ), path


def readme_commands() -> list[str]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("python3 -m venv")]


def test_readme_has_the_two_commands():
    install, test = readme_commands()
    assert install.endswith("-c constraints.txt . && .venv/bin/scldm-cd4 demo")
    assert test.endswith("-c constraints.txt '.[test]' && .venv/bin/pytest")


def test_ci_takes_its_commands_from_the_readme():
    path = ROOT / ".ci/run"
    script = path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o100, "not executable"
    assert "grep '^python3 -m venv' README.md" in script
    assert "${commands[0]}" in script
    assert "${commands[1]}" in script
    assert "docs/contributing.md" in script
    assert "pip install" not in script  # only what the README and the page on contributing install


def test_contributing_installs_and_builds_the_documentation():
    lines = (ROOT / "docs/contributing.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if re.match(r"\.venv/bin/(pip|jupyter|sphinx-build) ", line)]
    assert commands[0] == '.venv/bin/pip install -e ".[test,docs]" -c constraints.txt'
    assert commands[1].startswith(".venv/bin/jupyter execute --timeout=1800 tutorials/*.ipynb ")
    assert commands[2].startswith(".venv/bin/sphinx-build -W -n docs ")
    assert len(commands) == 3


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["docs"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split("==", line)[0].lower() for line in lines if not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))
    assert {re.split(r"[><=!\[]", name)[0].lower() for name in wanted} <= pinned


def test_packages_hold_code_and_no_data(tmp_path: Path):
    pytest.importorskip("hatchling", reason="hatchling builds the packages; it comes with the test extra")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path / "wheel"), versions=["standard"])
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path / "sdist"), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        inside = file.namelist()
    with tarfile.open(sdist) as file:
        source = [name.split("/", 1)[1] for name in file.getnames()]
    assert "scldm_cd4/py.typed" in inside
    assert {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "pyproject.toml"} <= set(source)
    mine = [name for name in inside if not name.split("/")[0].endswith("dist-info")]
    assert {Path(name).suffix for name in mine} == {".py", ".typed", ".yaml"}
    kept = (
        "tests/checkpoint/saved/",
        "tests/metrics/goldens/",
    )  # tiny models of each release, figures of other packages
    code = {".py", ".typed", ".md", ".txt", ".toml", ".yaml", ".cff", ".css", ".ipynb", ".rst", ""}
    figures = {name for name in source if name.startswith("docs/_static/") and "SIMULATED" in name}
    assert {Path(name).suffix for name in set(source) - figures if not name.startswith(kept)} <= code
    assert not [name for name in source if "_build" in name or "generated/" in name]
    assert Path(wheel).stat().st_size < 1_000_000
    assert Path(sdist).stat().st_size < 2_000_000  # with the figures of the tutorials

"""Code on the pages of the documentation: Python blocks run, or at least compile; commands are understood."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from scldm_cd4.cli import _main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "tutorials/README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("start", "data", "conditions", "numbers", "howto")
"""Pages whose blocks run one after the other on the names that examples share."""
NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\n")


def blocks(path: Path, language: str) -> list[tuple[bool, str]]:
    """Return the code of a page, and whether it is meant to run."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"(<!-- not run: [^>]+ -->\n)?^```{language}\n(.*?)^```", text, re.M | re.S)
    return [(match[1] is None, match[2]) for match in found]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_blocks_compile(path: Path):
    for _, code in blocks(path, "python"):
        compile(code, str(path), "exec")


@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run(page: str, names: dict[str, Any], here: Path):
    code = [text for run, text in blocks(ROOT / f"docs/{page}.md", "python") if run]
    assert code
    space = dict(names)
    for text in code:
        exec(compile(text, page, "exec"), space)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_are_understood(path: Path):
    """Every `scldm-cd4` line is accepted by the parser; what follows ``...`` is left open."""
    for _, code in blocks(path, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and not words[0].endswith("scldm-cd4"):
                words = words[2:] if words[:2] == ["-m", "scldm_cd4.cli"] else words[1:]
            if words and "..." not in words:
                _main._parse(words[1:])


def test_links_between_files_lead_somewhere():
    for path in PAGES:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}, which is not there"


def test_every_page_is_in_a_table_of_contents():
    pages = sorted((ROOT / "docs").rglob("*.md"))
    pages = [page for page in pages if "_build" not in page.parts and page.name != "index.md"]
    pages += [ROOT / "docs/tutorials" / notebook.name for notebook in (ROOT / "tutorials").glob("*.ipynb")]
    listed = [
        (toctree.parent / line).resolve()
        for toctree in (ROOT / "docs").rglob("index.md")
        for block in re.findall(r"^```{toctree}\n(.*?)^```", toctree.read_text(encoding="utf-8"), re.M | re.S)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    assert len(listed) == len(set(listed)), "a page is listed twice"
    assert [page.name for page in pages if page.with_suffix("").resolve() not in listed] == []

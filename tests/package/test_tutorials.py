"""Notebooks of the folder tutorials: outputs are stored, hold nothing of the machine they ran on, and say SIMULATED."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 3_000_000
MACHINE = re.compile(r"/(home|root|tmp|Users|work|opt|usr|var)/|site-packages|Warning:|\d+%\||it/s\b")


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def shown(output: dict[str, Any]) -> str:
    """Return what of an output is text."""
    parts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    return "\n".join("".join(part) for part in parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_title_says_simulated(self, path: Path):
        first = "".join(cells(path, "markdown")[0]["source"]).splitlines()[0]
        assert first.startswith("# ")
        assert "SIMULATED" in first

    def test_outputs_are_stored_and_whole(self, path: Path):
        code = cells(path, "code")
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell["outputs"]]
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
        assert outputs

    def test_nothing_of_the_machine_is_stored(self, path: Path):
        everything = json.loads(path.read_text(encoding="utf-8"))
        assert set(everything["metadata"]) <= {"kernelspec", "language_info"}
        assert {key for cell in everything["cells"] for key in cell["metadata"]} <= {"tags"}
        for cell in cells(path, "code"):
            for output in cell["outputs"]:
                assert not (found := MACHINE.search(shown(output))), found

    def test_links_lead_somewhere(self, path: Path):
        text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
        assert "{doc}" not in text
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", text):
            assert (FOLDER / link).exists(), link

    def test_lists_name_it(self, path: Path):
        assert f"({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")
        assert f"\n{path.stem}\n" in (ROOT / "docs/tutorials/index.md").read_text(encoding="utf-8")


def test_notebooks_are_there_and_small():
    assert len(NOTEBOOKS) == 6
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MAX_BYTES

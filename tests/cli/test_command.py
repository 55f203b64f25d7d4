"""The command: help, version, errors, overwriting, and the whole demo."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import __version__, datasets
from scldm_cd4.cli import main

FILES = {
    "generated.h5ad",
    "ranking.csv",
    "scores.csv",
    "model",
    "real_vs_generated.png",
    "summary.txt",
    "summary.json",
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence on stderr of a run that fails."""
    assert main(["demo", *map(str, arguments)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    *_, last = error.splitlines()
    assert last.startswith("scldm-cd4: ")
    assert "Traceback" not in error
    return last


def test_help_and_version_are_light():
    code = (
        "import sys; from scldm_cd4.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "names = 'torch lightning scanpy anndata matplotlib ot umap'.split()\n"
        "heavy = [name for name in names if name in sys.modules]\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    for arguments in (["--help"], ["demo", "--help"], ["--version"]):
        run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert "scldm-cd4" in run.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"scldm-cd4 {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["demo", "--preset", "huge"], ["demo", "--seed", "-1"], ["demo", "--max-epochs", "0"]],
)
def test_wrong_usage_has_status_2(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_an_output_folder_in_use_is_refused_and_left_alone(tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    message = refused(capsys, "--out", tmp_path)
    assert "--overwrite" in message
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, capsys):
    file = tmp_path / "file"
    file.write_text("precious")
    assert "is a file" in refused(capsys, "--out", file, "--overwrite")
    assert file.read_text() == "precious"


def test_a_missing_file_is_refused(tmp_path: Path, capsys):
    arguments = ("--perturbation-key", "p", "--control", "c", "--out", tmp_path / "out")
    assert "nowhere.h5ad is not a file" in refused(capsys, "--data", tmp_path / "nowhere.h5ad", *arguments)


def test_a_file_that_is_no_h5ad_is_refused(tmp_path: Path, capsys):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(b"no cells here")
    arguments = ("--perturbation-key", "p", "--control", "c", "--out", tmp_path / "out")
    assert "cannot be read as h5ad" in refused(capsys, "--data", path, *arguments)


def test_keys_without_data_are_refused(tmp_path: Path, capsys):
    assert "--data FILE" in refused(capsys, "--donor-key", "donor", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--perturbation-key", "--control"])
def test_data_without_its_keys_are_refused(tmp_path: Path, capsys, missing: str):
    given = {"--data": tmp_path, "--perturbation-key": "p", "--control": "c", "--out": tmp_path / "out"}
    del given[missing]
    assert missing in refused(capsys, *(x for pair in given.items() for x in pair))


def test_unknown_column_and_control_are_refused(tmp_path: Path, capsys):
    path = tmp_path / "cells.h5ad"
    datasets.synthetic_cd4(60, 40, n_perturbations=2, n_donors=1, n_timepoints=1).write_h5ad(path)
    out = ("--out", tmp_path / "out")
    message = refused(capsys, "--data", path, "--perturbation-key", "perturbatio", "--control", "NTC", *out)
    assert "'perturbation'" in message
    message = refused(capsys, "--data", path, "--perturbation-key", "perturbation", "--control", "NT", *out)
    assert "'NTC'" in message


def test_too_few_simulated_cells_are_refused(tmp_path: Path, capsys):
    assert "ask for more cells" in refused(capsys, "--n-cells", 50, "--out", tmp_path / "out")


def test_an_interrupt_is_no_traceback(tmp_path: Path, capsys, monkeypatch):
    def interrupt(options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("scldm_cd4.cli._demo.run_demo", interrupt)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "scldm-cd4: interrupted\n"


def test_long_work_is_told_on_stderr_where_there_is_no_bar(tmp_path: Path, capsys, monkeypatch):
    def work(options: object) -> str:
        logging.getLogger("scldm_cd4").info("flow: 10 of 40 cells, about 1.0 min left")
        return "done"

    monkeypatch.setattr("scldm_cd4.cli._demo.run_demo", work)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr() == ("done", "scldm-cd4: flow: 10 of 40 cells, about 1.0 min left\n")


SIZE = ("--preset", "tiny", "--max-epochs", "2")


@pytest.mark.slow
def test_the_demo_on_simulated_cells(tmp_path: Path, capsys):
    out = tmp_path / "out"
    arguments = ["demo", *SIZE, "--n-cells", "1200", "--n-genes", "80", "--n-perturbations", "4", "--out", str(out)]
    assert main(arguments) == 0
    summary = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {f"SIMULATED_{name}" for name in FILES}
    assert summary == (out / "SIMULATED_summary.txt").read_text(encoding="utf-8")
    assert "SIMULATED" in summary.splitlines()[0]
    assert "Against the simulator's truth (SIMULATED)" in summary
    values = json.loads((out / "SIMULATED_summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert values["data"] == "SIMULATED"
    assert values["quality"]["reload_equal"] == 1
    check_generated(out / "SIMULATED_generated.h5ad")
    assert ad.read_h5ad(out / "SIMULATED_generated.h5ad").uns["simulated"]
    check_figure(out / "SIMULATED_real_vs_generated.png")
    ranking = pd.read_csv(out / "SIMULATED_ranking.csv")
    assert ranking["score"].notna().all()
    assert main(arguments) == 2  # the folder is in use
    assert main([*arguments, "--overwrite"]) == 0
    again = json.loads((out / "SIMULATED_summary.json").read_text(encoding="utf-8"))
    assert {**again, "seconds": 0, "settings": 0} == {**values, "seconds": 0, "settings": 0}  # same seed, same figures


@pytest.mark.slow
def test_the_demo_on_a_file_without_donors(tmp_path: Path, capsys):
    adata = datasets.synthetic_cd4(800, 60, n_perturbations=3, n_donors=1, n_timepoints=1)
    plain = ad.AnnData(adata.X, obs=adata.obs[["perturbation"]].astype(str), var=adata.var[[]])
    path, out = tmp_path / "cells.h5ad", tmp_path / "out"
    plain.write_h5ad(path)
    keys = ["--data", str(path), "--perturbation-key", "perturbation", "--control", "NTC"]
    assert main(["demo", *SIZE, *keys, "--toward", "GATA3", "--out", str(out)]) == 0
    summary = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    assert "SIMULATED" not in summary
    assert "the effect of GATA3" in summary
    check_generated(out / "generated.h5ad")
    check_figure(out / "real_vs_generated.png")


def check_generated(path: Path) -> None:
    cells = ad.read_h5ad(path)
    counts = cells.X.toarray()
    assert cells.n_obs > 100
    assert np.isfinite(counts).all()
    assert counts.min() == 0
    np.testing.assert_array_equal(counts, np.round(counts))
    assert cells.obs_names.is_unique
    assert cells.obs["perturbation"].dtype == "category"
    assert cells.obs["is_generated"].all()
    assert (cells.obs["n_train_cells"] > 0).all()


def check_figure(path: Path) -> None:
    from matplotlib.image import imread

    image = imread(path)
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50  # something is drawn

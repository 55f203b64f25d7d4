"""Commands that divide generation among processes, join what they drew, and tell what a run will take."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scldm_cd4 import CD4Model, units
from scldm_cd4.cli import main
from scldm_cd4.planning import STATES

ASK = ("--perturbation", "NTC", "--n-cells", 50, "--seed", 0, "--batch-size", 64, "--solver", "euler", "--n-steps", 1)
ASK += ("--size-factor", 100)


@pytest.fixture(scope="module")
def model(trained: CD4Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    trained.save(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> tuple[str, str]:
    """What a command writes to stdout and to stderr."""
    assert main([*map(str, arguments)]) == status
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    return out, error


def test_shares_of_a_command_give_its_cells(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "PASSES", 1)
    whole, shared = tmp_path / "whole.h5ad", tmp_path / "shared.h5ad"
    run(capsys, "generate", model, "--out", whole, *ASK)
    ask = ("generate", model, "--out", shared, *ASK, "--engine", "units", "--share")
    assert "others are not done yet" in run(capsys, *ask, "0/2")[1]
    folder = tmp_path / "shared.h5ad.units"
    assert "2 of 4 units are missing" in run(capsys, "merge", folder, status=2)[1]
    assert "cells written" in run(capsys, *ask, "1/2")[1]
    a, b = ad.read_h5ad(whole), ad.read_h5ad(shared)
    assert np.array_equal(a.X.toarray(), b.X.toarray())
    assert a.obs.equals(b.obs)
    assert "were joined before" in run(capsys, "merge", folder, status=2)[1]


def test_merge_joins_what_a_killed_process_left(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scldm_cd4 import distributed

    with monkeypatch.context() as killed:
        killed.setattr(distributed, "merge_units", lambda *_, **__: None)
        run(capsys, "generate", model, "--out", tmp_path / "cells.zarr", *ASK, "--engine", "units")
    out = run(capsys, "merge", tmp_path / "cells.zarr.units")[0]
    assert out == f"{tmp_path / 'cells.zarr'}\n"
    assert ad.read_zarr(tmp_path / "cells.zarr").n_obs == 200


def test_what_does_not_go_together_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("generate", model, "--out", tmp_path / "cells.h5ad", *ASK)
    assert "--share needs --engine" in run(capsys, *ask, "--share", "0/2", status=2)[1]
    assert "--address is for" in run(capsys, *ask, "--engine", "units", "--address", "auto", status=2)[1]
    assert "Ray divides" in run(capsys, *ask, "--engine", "ray", "--share", "0/2", status=2)[1]
    assert "does not end in" in run(capsys, "merge", tmp_path, status=2)[1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the same work" in run(capsys, *ask, status=2)[1]
    with pytest.raises(SystemExit):
        main(["generate", "m", "--out", "c.h5ad", "--engine", "units", "--share", "2/2"])
    assert not list(tmp_path.iterdir())


def test_plan_for_named_devices(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["info", "--plan", "--preset", "tiny", "--n-cells", 10**6, "--n-genes", 200, "--machine", "H200"]
    one = json.loads(run(capsys, *ask, "--json")[0])
    eight = json.loads(run(capsys, *ask, "--json", "--devices", 8)[0])
    made = one["stages"]["generate"]
    assert made["hours_at_limit"] == pytest.approx(made["cells"] * made["gflop_per_cell"] * 1e9 / 790e12 / 3600)
    assert made["hours"] == pytest.approx(made["hours_at_limit"] / 0.4)
    for name, stage in one["stages"].items():
        assert eight["stages"][name]["hours_at_limit"] <= stage["hours_at_limit"]
    assert eight["stages"]["generate"]["hours"] == pytest.approx(made["hours"] / 8)
    text = run(capsys, *ask, "--batch-size", 10**9)[0]
    assert "does not fit" in text


def test_plan_from_a_probe_of_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(run(capsys, "info", model, "--plan", "--n-cells", 1000, "--devices", 1, "--json")[0])
    assert plan["share"] == 1
    assert all(stage["hours"] > 0 for stage in plan["stages"].values())
    assert plan["stages"]["train flow"]["device_gb"] * 1e9 > STATES * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--plan",), "needs --n-cells"),
        (("--plan", "--n-cells", 5), "needs --n-genes"),
        (("--plan", "--n-cells", 5, "--n-genes", 50, "--preset", "tiny", "--machine", "K80"), "unknown device 'K80'"),
        ((), "say which MODEL"),
    ],
)
def test_plans_that_cannot_be_made(capsys: pytest.CaptureFixture[str], words: tuple[object, ...], said: str) -> None:
    assert said in run(capsys, "info", *words, status=2)[1]


@pytest.mark.slow
def test_operations_of_the_released_size_are_those_of_its_formulas() -> None:
    """Counted by hand from the architecture: 6.06, 9.66 and 14.0 GFLOP; a training step is three forward passes."""
    from scldm_cd4.config import PRESETS
    from scldm_cd4.planning import measure

    work = measure(PRESETS["cd4"], 3699, seconds=0)
    assert [round(n / 1e9, 2) for n in (work.encode, work.decode, work.velocity)] == [6.06, 9.66, 14.01]
    assert work.vae_step == pytest.approx(3 * (work.encode + work.decode), rel=0.01)
    assert work.flow_step == pytest.approx(3 * work.velocity, rel=0.01)


@pytest.mark.slow
def test_killed_torchrun_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [str(word) for word in ("generate", model, *ASK)]
    ask[ask.index("50")] = "1500"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "scldm_cd4.cli", *ask]
    command += ["--out", str(tmp_path / "cells.h5ad"), "--engine", "units", "--device", "cpu"]
    folder, environ = tmp_path / "cells.h5ad.units", os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list(folder.glob("unit-*"))) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_ino for path in folder.glob("unit-*")}
    assert len(there) >= 3
    run(capsys, *ask, "--out", tmp_path / "whole.h5ad")
    subprocess.run(command, env=environ, check=True)
    assert not folder.exists()
    a, b = ad.read_h5ad(tmp_path / "whole.h5ad"), ad.read_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(a.X.toarray(), b.X.toarray())
    assert a.obs.equals(b.obs)

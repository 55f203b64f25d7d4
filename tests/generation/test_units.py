"""Requests as work units: the same cells whoever draws them, and nothing lost when a run is killed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from scldm_cd4 import DataError, distributed, units
from scldm_cd4.conditions import Request
from scldm_cd4.distributed import merge_units, run_folder
from scldm_cd4.engines import Ray, Units, resolve_engine
from scldm_cd4.sinks import open_written
from scldm_cd4.units import Cutting, RunFolder

ASK: dict[str, Any] = {
    "perturbation": "NTC",
    "n_cells": 50,
    "seed": 0,
    "batch_size": 64,
    "solver": "euler",
    "n_steps": 1,
    "size_factors": 100.0,
}
N_UNITS = 4
"""Of 2 donors x 2 time points x 50 cells, 64 to a unit."""


@pytest.fixture(autouse=True)
def one_pass_per_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "PASSES", 1)


@pytest.fixture(scope="module")
def plain(trained: Any) -> Any:
    return trained.generate(**ASK)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the units that were drawn, in order."""
    numbers: list[int] = []
    compute = units.compute

    def count(job: units.Job, unit: units.Unit) -> int:
        numbers.append(unit.number)
        return compute(job, unit)

    monkeypatch.setattr(distributed, "compute", count)
    return numbers


def in_memory(adata: Any) -> np.ndarray:
    x = adata.X.to_memory() if hasattr(adata.X, "to_memory") else adata.X[:]
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


def same(a: Any, b: Any) -> None:
    assert np.array_equal(in_memory(a), in_memory(b))
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)
    facts = [{k: v for k, v in side.uns["scldm_cd4"].items() if k != "request_hash"} for side in (a, b)]
    assert facts[0] == facts[1]


# ------------------------------------------------------------------------------------------------ cutting


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), min_size=1, max_size=8), st.integers(1, 64))
def test_units_hold_every_cell_once_and_in_order(asked: list[tuple[int, int]], size: int) -> None:
    requests = [Request((str(i), None, "x"), n, first) for i, (n, first) in enumerate(asked)]
    cells = [(r.labels, i) for r in requests for i in range(r.first, r.first + r.n_cells)]
    cutting = Cutting(requests, size, np.arange(len(cells), dtype=float))
    found = [(r.labels, i) for unit in cutting for r in unit.requests for i in range(r.first, r.first + r.n_cells)]
    assert found == cells
    assert [unit.n_cells for unit in cutting][:-1] == [size] * (len(cutting) - 1)
    assert np.array_equal(np.concatenate([unit.library for unit in cutting]), np.arange(len(cells)))


def test_there_is_no_unit_beyond_the_last() -> None:
    cutting = Cutting([Request(("a", "b", "c"), 5)], 2)
    assert len(cutting) == 3
    with pytest.raises(IndexError):
        cutting[3]


# ------------------------------------------------------------------------------------------------ same cells


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
@pytest.mark.parametrize(
    "options",
    [
        {"size_factors": None, "n_cells": 20},
        {"output": "latent"},
        {"output": "mean", "guidance": 0.0},
        {"output": "lognorm", "genes": "two", "size_factors": "each"},
    ],
    ids=["counts", "latent", "mean", "lognorm"],
)
def test_units_give_the_cells_of_one_process(
    trained: Any, tmp_path: Path, ending: str, options: dict[str, Any]
) -> None:
    ask = ASK | options
    if "genes" in options:
        ask |= {"genes": list(trained.registry["genes"][3:1:-1]), "size_factors": np.linspace(50, 900, 200)}
    expected = trained.generate(**ask)
    found = trained.generate(**ask, out=tmp_path / f"cells.{ending}", engine="units")
    same(found, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"cells.{ending}"]


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_a_file_without_units_is_the_same(trained: Any, plain: Any, tmp_path: Path, ending: str) -> None:
    same(trained.generate(**ASK, out=tmp_path / f"cells.{ending}"), plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_units_and_the_last_joins_them(
    trained: Any, plain: Any, tmp_path: Path, drawn: list[int], order: tuple[int, ...]
) -> None:
    out = tmp_path / "cells.h5ad"
    found = [trained.generate(**ASK, out=out, engine=Units(i, 3)) for i in order]
    assert found[:2] == [None, None]
    same(found[2], plain)
    assert sorted(drawn) == list(range(N_UNITS))
    assert not run_folder(out).exists()


# ------------------------------------------------------------------------------------------------ after a kill


def test_a_run_goes_on_where_it_stopped(
    trained: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[int]
) -> None:
    out = tmp_path / "cells.h5ad"
    write = RunFolder.write

    def die(self: RunFolder, unit: units.Unit, *rest: Any) -> None:
        if unit.number == 2:
            (self.path / ".unit-000002.safetensors.1.part").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, unit, *rest)

    monkeypatch.setattr(RunFolder, "write", die)
    with pytest.raises(KeyboardInterrupt):
        trained.generate(**ASK, out=out, engine="units")
    monkeypatch.setattr(RunFolder, "write", write)
    assert not out.exists()
    drawn.clear()
    same(trained.generate(**ASK, out=out, engine="units"), plain)
    assert drawn == [2, 3]


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_unit_is_drawn_again(trained: Any, plain: Any, tmp_path: Path, drawn: list[int], damage: str) -> None:
    out = tmp_path / "cells.h5ad"
    trained.generate(**ASK, out=out, engine=Units(0, 2))
    file = run_folder(out) / "unit-000002.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    file.write_bytes(content[:-10] if damage == "cut" else content)
    if damage == "other":
        file.write_bytes((run_folder(out) / "unit-000000.safetensors").read_bytes())
    drawn.clear()
    same(trained.generate(**ASK, out=out, engine="units"), plain)
    assert drawn == [1, 2, 3]


def test_without_a_seed_a_run_goes_on_with_its_own(trained: Any, plain: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.h5ad"
    trained.generate(**ASK, out=out, engine=Units(0, 2))
    same(trained.generate(**{**ASK, "seed": None}, out=out, engine="units"), plain)


def test_what_is_finished_is_not_drawn_again(trained: Any, plain: Any, tmp_path: Path, drawn: list[int]) -> None:
    out = tmp_path / "cells.h5ad"
    trained.generate(**ASK, out=out, engine="units")
    drawn.clear()
    same(trained.generate(**ASK, out=out, engine="units"), plain)
    same(trained.generate(**ASK, out=out, engine=Units(1, 2), overwrite=True), plain)
    assert drawn == []


# ------------------------------------------------------------------------------------------------ joining


def test_joining_waits_for_all_units(trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.h5ad"
    trained.generate(**ASK, out=out, engine=Units(0, 2))
    assert merge_units(RunFolder.read(run_folder(out)), out) is None
    assert not out.exists()


def test_one_process_joins_at_a_time(trained: Any, plain: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.h5ad"
    with FileLock(run_folder(out) / ".merge.lock"):
        assert trained.generate(**ASK, out=out, engine="units") is None
    run = RunFolder.read(run_folder(out))
    assert merge_units(run, out) == out
    same(open_written(out), plain)
    assert merge_units(run, out) == out


def test_a_damaged_unit_is_not_joined(trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.h5ad"
    with FileLock(run_folder(out) / ".merge.lock"):
        trained.generate(**ASK, out=out, engine="units")
    file = run_folder(out) / "unit-000003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="unit-000003.*damaged"):
        merge_units(RunFolder.read(run_folder(out)), out)
    assert not out.exists()
    assert file.exists()


def test_a_unit_with_too_few_cells_is_refused(trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.h5ad"
    trained.generate(**ASK, out=out, engine=Units(0, 2))
    run = RunFolder.read(run_folder(out))
    with pytest.raises(DataError, match="unit 1 gave 3 cells in place of 64"):
        run.write(run.cutting()[1], sparse.csr_matrix((3, 50)), np.ones(3))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: 0 there, 1 asked"),
        ({"n_steps": 2}, "n_steps: 1 there, 2 asked"),
        ({"guidance": 2.0}, "guidance: 1.0 there, 2.0 asked"),
        ({"n_cells": 51}, "conditions: 4 with 200 cells there, 4 with 204 asked"),
        ({"size_factors": 300.0}, "size_factors: others"),
    ],
)
def test_units_of_another_request_are_refused(trained: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    out = tmp_path / "cells.h5ad"
    trained.generate(**ASK, out=out, engine=Units(0, 2))
    with pytest.raises(DataError, match="another request") as refused:
        trained.generate(**(ASK | change), out=out, engine="units")
    assert said in str(refused.value)


def test_other_files_are_not_replaced(trained: Any, plain: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.h5ad"
    trained.generate(**ASK, out=out, engine="units")
    with pytest.raises(FileExistsError):
        trained.generate(**(ASK | {"seed": 1}), out=out, engine="units")
    trained.generate(**(ASK | {"seed": 1}), out=out, engine="units", overwrite=True)
    same(trained.generate(**ASK, out=out, engine="units", overwrite=True), plain)
    store = tmp_path / "store.zarr"
    store.mkdir()
    with pytest.raises(FileExistsError):
        trained.generate(**ASK, out=store, engine="units", overwrite=True)
    run_folder(tmp_path / "b.h5ad").mkdir()
    (run_folder(tmp_path / "b.h5ad") / "notes").touch()
    with pytest.raises(DataError, match="in the way"):
        trained.generate(**ASK, out=tmp_path / "b.h5ad", engine="units")


def test_manifests_that_cannot_be_read(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder.read(tmp_path)
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder.read(tmp_path)
    (tmp_path / "request.json").write_text(json.dumps({"format": 99, "request": {}, "uns": {}}))
    with pytest.raises(DataError, match="format 99"):
        RunFolder.read(tmp_path)


def test_what_engines_cannot_do(trained: Any, plain: Any, tmp_path: Path) -> None:
    out = tmp_path / "cells.h5ad"
    with pytest.raises(DataError, match="give out="):
        trained.generate(**ASK, engine="units")
    with pytest.raises(DataError, match="leave out"):
        trained.generate(cells=plain, perturbation="NTC", out=out, engine="units")
    with pytest.raises(DataError, match="one seed"):
        trained.generate(**{**ASK, "seed": None}, out=out, engine=Units(0, 2))
    with pytest.raises(DataError, match="engine must be"):
        trained.generate(**ASK, out=out, engine="dask")
    with pytest.raises(DataError, match="ends|ending|\\.h5ad"):
        trained.generate(**ASK, out=tmp_path / "cells.csv", engine="units")
    with pytest.raises(DataError, match="engine='ray'"):
        trained.rank_perturbations(["x"], engine="units")
    with pytest.raises(DataError, match="engine='ray'"):
        trained.get_latent(plain, engine="units")


# ------------------------------------------------------------------------------------------------ launchers


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (1, 3)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (0, 2)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "5"}, (0, 1)),
    ],
)
def test_share_of_a_launcher(environ: dict[str, str], expected: tuple[int, int]) -> None:
    share = Units.of(environ)
    assert (share.index, share.count) == expected


def array(task: int, low: int, high: int, step: int, count: int) -> dict[str, str]:
    numbers = {"ID": task, "MIN": low, "MAX": high, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in numbers.items()}


def test_slurm_arrays_divided_by_torchrun() -> None:
    shares = [
        Units.of(array(task, 2, 8, 3, 3) | {"RANK": str(rank), "WORLD_SIZE": "2"})
        for task in (2, 5, 8)
        for rank in (0, 1)
    ]
    assert [s.index for s in shares] == list(range(6))
    assert {s.count for s in shares} == {6}
    taken = [[s.index for s in shares if s.takes(i)] for i in range(13)]
    assert taken == [[i % 6] for i in range(13)]
    with pytest.raises(DataError, match="evenly"):
        Units.of(array(3, 1, 7, 1, 3))
    with pytest.raises(DataError, match="share"):
        Units(3, 3)


# ------------------------------------------------------------------------------------------------ Ray


def test_ray_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DataError, match=r"scldm_cd4\[ray\]"):
        list(resolve_engine("ray").map(abs, None, [1], gpu=False))


@pytest.fixture(scope="module")
def ray_engine() -> Any:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'scldm_cd4[ray]'")
    yield Ray(num_cpus=2)
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
class TestRay:
    """What Ray's workers compute."""

    def test_cells_are_those_of_one_process(self, ray_engine: Ray, trained: Any, plain: Any, tmp_path: Path) -> None:
        same(trained.generate(**ASK, out=tmp_path / "cells.h5ad", engine=ray_engine), plain)

    def test_a_killed_worker_is_made_good(self, ray_engine: Ray, tmp_path: Path) -> None:
        def die_once(flags: Path, item: int) -> int:  # local, so that workers get it by value
            import os

            flag = flags / "killed"
            if item == 3 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), 9)
            return item**2

        assert list(ray_engine.map(die_once, tmp_path, range(8), gpu=False)) == [i**2 for i in range(8)]
        assert (tmp_path / "killed").exists()

    def test_ranking_is_that_of_one_process(self, ray_engine: Ray, trained: Any) -> None:
        genes = list(trained.registry["genes"][:6])
        ask: dict[str, Any] = {"n_cells": 20, "seed": 0, "n_boot": 20}
        expected = trained.rank_perturbations(genes, **ask)
        pd.testing.assert_frame_equal(trained.rank_perturbations(genes, **ask, engine=ray_engine), expected)

    def test_latents_are_those_of_one_process(self, ray_engine: Ray, trained: Any, simulated: Any) -> None:
        expected = trained.get_latent(simulated, batch_size=8)
        assert np.array_equal(trained.get_latent(simulated, batch_size=8, engine=ray_engine), expected)

    def test_no_gpu_is_said(self, ray_engine: Ray) -> None:
        with pytest.raises(DataError, match="no GPU"):
            list(ray_engine.map(abs, None, [1], gpu=True))

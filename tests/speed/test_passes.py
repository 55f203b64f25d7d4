"""Network passes: their size, their arithmetic, what happens when memory ends."""

import os
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from scldm_cd4 import DataError, settings
from scldm_cd4._parallel import one_thread_each
from scldm_cd4._passes import ALIGN, Passes, pass_rows
from scldm_cd4._precision import Precision, choose, matmul_error, onednn_route

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu", "highest")


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_a_few_cells_of_a_large_model_do_not_wait_for_a_large_pass() -> None:
    assert pass_rows(256, CPU, 128) == ALIGN == 8
    assert pass_rows(16, CPU, 128) == 64
    assert pass_rows(8, CPU, 64) == 64
    assert pass_rows(256, torch.device("cuda"), 1024) == 1024


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_every_pass_has_the_same_shape(n: int) -> None:
    shapes = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x

    values = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    out = np.concatenate(list(Passes(16, CPU, FP32)(compute, values, at_most=8)))
    assert np.array_equal(out, 2 * values)
    assert shapes == [(8, 3)] * -(-n // 8)


def test_out_of_memory_halves_the_pass_and_says_so_once() -> None:
    seen = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > 16:
            raise torch.cuda.OutOfMemoryError("no memory")
        return 2 * x

    passes, values = Passes(64, CPU, FP32), np.arange(100, dtype=np.float32)[:, None]
    with pytest.warns(UserWarning, match="no memory for") as said:
        out = np.concatenate(list(passes(compute, values)))
    assert np.array_equal(out, 2 * values)
    assert [str(w.message).split(": ")[1].split(". ")[0] for w in said] == ["going on with 32", "going on with 16"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.concatenate(list(passes(compute, values))), 2 * values)
    assert seen[:3] == [64, 32, 16]
    assert set(seen[3:]) == {16}


def test_no_memory_at_all_is_an_error() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("no memory")

    with pytest.warns(UserWarning, match="going on with 8"), pytest.raises(DataError, match="no memory for 8 cells"):
        list(Passes(16, CPU, FP32)(compute, np.zeros((3, 1), np.float32)))


def test_precision_names_what_was_chosen() -> None:
    auto = choose("auto", CPU)
    assert auto == choose("fp32", CPU) == choose("32-true", CPU) == choose(auto.name, CPU)
    assert auto.name == ("fp32-onednn" if onednn_route() else "fp32")
    assert choose("bf16-mixed", CPU).name == "bf16"
    assert Precision("fp32", "cpu", "medium").name == "fp32-onednn"
    for bad in ("fp8", 16, None):
        with pytest.raises(DataError, match="precision must be"):
            choose(bad, CPU)
    with pytest.raises(DataError, match="CUDA"):
        choose("tf32", CPU)


def test_the_chosen_products_are_as_exact_as_single_precision() -> None:
    with choose("auto", CPU).context():
        assert matmul_error() < 2e-6
    with choose("bf16", CPU).context():
        assert 1e-4 < matmul_error() < 1e-2


def test_the_setting_of_the_process_is_put_back_after_errors_and_by_the_last_thread() -> None:
    before = torch.get_float32_matmul_precision()
    other = Precision("fp32", "cpu", "medium")
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with other.context():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)

    def fail() -> None:
        with other.context():
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_float32_matmul_precision() == "medium"  # the other thread still computes
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == before


def test_cells_state_their_arithmetic_and_leave_the_process_alone(trained: Any) -> None:
    before = torch.get_float32_matmul_precision()
    ask = {"perturbation": "NTC", "n_cells": 4, "seed": 0, "output": "mean"}
    cells = trained.generate(**ask)
    assert cells.uns["scldm_cd4"]["precision"] == choose("auto", CPU).name
    assert choose("auto", CPU).name in repr(trained)
    coarse = trained.generate(**ask, precision="bf16")
    assert coarse.uns["scldm_cd4"]["precision"] == "bf16"
    assert torch.get_float32_matmul_precision() == before
    assert not np.array_equal(coarse.X, cells.X)
    error = np.linalg.norm(coarse.X - cells.X) / np.linalg.norm(cells.X)
    assert error < 0.03


@pytest.mark.parametrize("batch_size", [8, 24])
def test_first_cells_stay_the_same_at_any_batch_size(trained: Any, batch_size: int) -> None:
    ask = {"perturbation": "NTC", "donor": "CE0008162", "timepoint": "Rest", "seed": 3, "batch_size": batch_size}
    many, few = trained.generate(**ask, n_cells=50), trained.generate(**ask, n_cells=5)
    assert np.array_equal(many.X[:5].toarray(), few.X.toarray())
    both = trained.generate(**ask | {"donor": None}, n_cells=5)
    here = (both.obs["donor_id"] == "CE0008162").to_numpy()
    assert np.array_equal(both.X[here].toarray(), few.X.toarray())


def test_two_cells_take_two_rows_worth_of_passes(trained: Any) -> None:
    rows: list[int] = []
    handle = trained._state.dit.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        trained.generate("NTC", "CE0008162", "Rest", n_cells=2, seed=0, batch_size=8, output="latent")
    finally:
        handle.remove()
    assert set(rows) == {8}


def test_given_cells_and_imported_weights_take_more_steps(trained: Any, simulated: Any) -> None:
    from scldm_cd4.sampling import CAREFUL_STEPS, N_STEPS

    assert trained.generate("NTC", n_cells=1, seed=0).uns["scldm_cd4"]["n_steps"] == N_STEPS
    back = trained.generate(cells=simulated[:2].copy(), perturbation="NTC", seed=0, output="latent")
    assert back.uns["scldm_cd4"]["n_steps"] == CAREFUL_STEPS
    trained._state.record["pretrained"] = {}
    try:
        assert trained.generate("NTC", n_cells=1, seed=0).uns["scldm_cd4"]["n_steps"] == CAREFUL_STEPS
    finally:
        del trained._state.record["pretrained"]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
def test_cuda_gives_the_cells_of_the_cpu(trained: Any) -> None:
    ask = {"perturbation": "NTC", "n_cells": 70, "seed": 0}
    here = {name: trained.generate(**ask, output=name).X for name in ("latent", "counts")}
    try:
        trained.to_device("cuda")
        there = {name: trained.generate(**ask, output=name, precision="fp32").X for name in ("latent", "counts")}
        again = trained.generate(**ask, precision="fp32")
        coarse = trained.generate(**ask, output="mean")
    finally:
        trained.to_device("cpu")
    np.testing.assert_allclose(here["latent"], there["latent"], atol=1e-4)
    same = (here["counts"] != there["counts"]).nnz / np.prod(here["counts"].shape)
    assert same < 1e-3
    assert (there["counts"] != again.X).nnz == 0
    assert coarse.uns["scldm_cd4"]["precision"] == "bf16"


@cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself, about its own code
def test_compiled_cuda_gives_the_cells_of_the_cpu(trained: Any) -> None:
    ask = {"perturbation": "NTC", "n_cells": 70, "seed": 0, "output": "latent"}
    here = trained.generate(**ask).X
    try:
        trained.to_device("cuda")
        with settings.override(compile=True):
            there = trained.generate(**ask, precision="fp32")
    finally:
        trained.to_device("cpu")
    assert there.uns["scldm_cd4"]["compiled"]
    np.testing.assert_allclose(here, there.X, atol=1e-4)


@cuda
def test_counts_are_drawn_alike_on_cuda() -> None:
    from scldm_cd4.nn.likelihood import nb_quantile

    rng = np.random.default_rng(0)
    u, mu, theta = rng.random((64, 90)), np.exp(rng.normal(0, 2, (64, 90))), np.exp(rng.normal(0, 2, (1, 90)))
    here = nb_quantile(*map(torch.from_numpy, (u, mu, theta)))
    there = nb_quantile(*(torch.from_numpy(x).cuda() for x in (u, mu, theta))).cpu()
    assert (here != there).float().mean() < 1e-4


def test_threads_that_generate_side_by_side_leave_torch_its_threads() -> None:
    before, found = torch.get_num_threads(), []
    entered = [threading.Event() for _ in range(2)]

    def work(own: int, other: int, wait: int) -> None:
        with one_thread_each(torch.device("cpu"), None) as n:
            found.append(n)
            entered[own].set()
            entered[other].wait(5)
            time.sleep(0.05 * wait)
        found.append(torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        both = [threading.Thread(target=work, args=(k, 1 - k, k)) for k in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert found == [min(2, os.cpu_count() or 1)] * 2 + [2] * 3

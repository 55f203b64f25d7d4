"""Contract: what is asked for beside a cell never changes the cell, to the bit."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import sparse

from scldm_cd4 import settings
from scldm_cd4.conditions import resolve_requests
from scldm_cd4.noise import BLOCK, count_uniforms, latent_normals, library_uniforms, stream
from scldm_cd4.sampling import ALIGN, Sampler, Sampling, plan_units

SLOW = hypothesis_settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
N = 90


@pytest.fixture(scope="module")
def reference(trained: Any) -> dict[str, np.ndarray]:
    """Cells of every condition by name."""
    return by_name(trained.generate(n_cells=N, seed=5))


def by_name(cells: Any) -> dict[str, np.ndarray]:
    values = cells.X.toarray() if sparse.issparse(cells.X) else cells.X
    return dict(zip(cells.obs_names, np.column_stack([values, cells.obs["size_factor"]]), strict=True))


def assert_among(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> None:
    for name, values in found.items():
        assert np.array_equal(values, reference[name]), name


@SLOW
@given(data=st.data())
def test_order_subset_number_and_workers(trained: Any, reference: dict[str, np.ndarray], data: st.DataObject) -> None:
    def some(levels: tuple[str, ...]) -> list[str]:
        return data.draw(st.lists(st.sampled_from(levels), min_size=1, unique=True))

    n_cells = data.draw(st.integers(1, N))
    with settings.override(num_workers=data.draw(st.integers(1, 4))):
        cells = trained.generate(
            some(trained.perturbations), some(trained.donors), some(trained.timepoints), n_cells=n_cells, seed=5
        )
    found = by_name(cells)
    assert len(found) == cells.n_obs
    assert_among(found, reference)


@SLOW
@given(order=st.randoms(use_true_random=False), threads=st.sampled_from([1, 2, 3, 4]))
def test_units_in_any_order_on_any_number_of_threads(
    trained: Any, reference: dict[str, np.ndarray], order: Any, threads: int
) -> None:
    state = trained._state
    requests = resolve_requests(state.registry, n_cells=N)
    units = list(plan_units(requests, 2 * ALIGN))
    assert sum(map(len, units)) == len(reference)
    expected = np.stack(list(reference.values()))
    chosen = order.sample(units, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what a process that computes units does
    try:
        for unit in chosen:
            sampler = Sampler(state.vae, state.dit, state.registry, Sampling(seed=5))
            drawn = sampler.run(unit)
            rows = slice(unit.first, unit.first + len(unit))
            assert np.array_equal(drawn.values.toarray(), expected[rows, :-1])
            assert np.array_equal(drawn.library, expected[rows, -1])
        torch.set_num_threads(threads)
        again = trained.generate("NTC", "CE0008162", "Rest", n_cells=5, seed=5)
        assert torch.get_num_threads() == threads
        assert_among(by_name(again), reference)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch_size", [1, 64, 192, 512])
def test_d2_another_batch_size_gives_equal_latents(trained: Any, batch_size: int) -> None:
    ask = {"perturbation": "NTC", "n_cells": 70, "seed": 5, "output": "latent"}
    a, b = trained.generate(**ask), trained.generate(**ask, batch_size=batch_size)
    np.testing.assert_allclose(a.X, b.X, atol=1e-5)


def test_torch_gets_its_threads_back(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        signature = pd.Series(np.arange(50.0), index=trained._state.registry.genes)
        trained.rank_perturbations(signature, n_cells=20, seed=0)
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(Sampler, "express", fail)
        with pytest.raises(KeyboardInterrupt) as kept:
            trained.generate("NTC", n_cells=1)
        assert kept.value.__traceback__ is not None
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_more_cells_than_a_block(trained: Any) -> None:
    ask = {"perturbation": "NTC", "donor": "CE0008162", "timepoint": "Rest", "seed": 5, "output": "latent"}
    many = trained.generate(**ask, n_cells=2 * BLOCK + 30).X
    few = trained.generate(**ask, n_cells=BLOCK + 3).X
    assert np.array_equal(many[: BLOCK + 3], few)
    assert len(np.unique(many, axis=0)) == len(many)


def test_other_seeds_give_other_cells(trained: Any) -> None:
    a, b = (trained.generate("NTC", n_cells=5, seed=s, output="latent").X for s in (0, 1))
    assert not np.any(np.all(np.isclose(a, b), axis=1))


def test_unset_seed_is_recorded(trained: Any) -> None:
    first = trained.generate("NTC", n_cells=2)
    again = trained.generate("NTC", n_cells=2, seed=first.uns["scldm_cd4"]["seed"])
    assert (first.X != again.X).nnz == 0


def test_generating_leaves_global_generators_alone(trained: Any) -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    trained.generate("NTC", n_cells=2)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


# ---------------------------------------------------------------------------------------------------------------- noise

LABELS = st.tuples(*[st.none() | st.text(max_size=5)] * 3)


@given(LABELS, LABELS, st.integers(0, 3), st.integers(0, 3))
def test_d16_noise_differs_by_condition_block_and_purpose(a: Any, b: Any, i: int, j: int) -> None:
    def first(labels: Any, block: int, purpose: str) -> float:
        return float(stream(0, labels, block, purpose).random())

    assert (first(a, i, "latent") == first(b, j, "latent")) == ((a, i) == (b, j))
    assert first(a, i, "latent") != first(a, i, "counts")


@pytest.mark.parametrize(("a", "b"), [(("A_B", "C", ""), ("A", "B_C", "")), ((None, "", ""), ("null", "", ""))])
def test_labels_are_never_joined(a: Any, b: Any) -> None:
    assert stream(0, a, 0, "latent").random() != stream(0, b, 0, "latent").random()


@given(st.integers(0, 50), st.integers(0, 50))
def test_rows_of_a_block_do_not_depend_on_what_else_is_drawn(start: int, n: int) -> None:
    labels = ("d", None, "p")
    whole = library_uniforms(1, labels, 0, 0, 100)
    assert np.array_equal(library_uniforms(1, labels, 0, start, start + n), whole[start : start + n])
    assert whole.min() > 0
    for draw in (latent_normals, count_uniforms):
        whole = draw(1, labels, 0, 0, 100, 7)
        assert np.array_equal(draw(1, labels, 0, start, start + n, 7), whole[start : start + n])


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6), st.sampled_from([64, 128, 1024]))
def test_units_cover_every_cell_once(numbers: list[int], batch_size: int) -> None:
    from scldm_cd4.conditions import Request

    requests = [Request(("d", "t", str(i)), n, first=i * 37) for i, n in enumerate(numbers)]
    units = list(plan_units(requests, batch_size))
    assert [u.first for u in units] == list(range(0, sum(numbers), batch_size))
    cells = [(s.labels, s.block * BLOCK + r) for u in units for s in u.segments for r in range(s.start, s.stop)]
    assert cells == [(r.labels, r.first + i) for r in requests for i in range(r.n_cells)]
    assert all(0 <= s.start < s.stop <= BLOCK for u in units for s in u.segments)


# ---------------------------------------------------------------------------------------------------------- embedding


@SLOW
@given(
    order=st.permutations(range(50)),
    form=st.sampled_from(["csr", "csc", "dense"]),
    dtype=st.sampled_from(["float32", "float64", "int32", "int64", "uint16"]),
    extra=st.booleans(),
)
def test_latents_do_not_depend_on_the_form_of_the_input(
    trained: Any, simulated: Any, order: list[int], form: str, dtype: str, extra: bool
) -> None:
    import anndata as ad

    counts = simulated.X.toarray()[:40][:, order]
    names = list(simulated.var_names[order])
    if extra:
        counts, names = np.column_stack([np.full(40, 9), counts]), ["another gene", *names]
    values = counts.astype(dtype)
    adata = ad.AnnData(values if form == "dense" else sparse.__dict__[f"{form}_matrix"](values))
    adata.var_names = names
    assert np.array_equal(trained.get_latent(adata), trained.get_latent(simulated[:40]))


def test_latents_of_cells_do_not_depend_on_their_company(trained: Any, simulated: Any) -> None:
    z = trained.get_latent()
    np.testing.assert_allclose(trained.get_latent(indices=[5, 200, 3]), z[[5, 200, 3]], atol=1e-5)
    np.testing.assert_allclose(trained.get_latent(batch_size=7), z, atol=1e-5)

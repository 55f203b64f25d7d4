"""Labels of a trained flow: what of their latents' shift is no noise, and effects fitted to generated cells."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scldm_cd4 import CD4Model, datasets
from scldm_cd4.config import FlowConfig, VAEConfig
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.train import labels as settling
from scldm_cd4.train.effects import label_effects, set_label_effects
from scldm_cd4.train.labels import (
    fit_to_generated,
    settle_labels,
    shrink_embeddings,
    told_shares,
    toward_mean_context,
)
from scldm_cd4.train.latents import decode_means

SHAPE = (2, 1, 8)
CONTROL = 0


def latents_of(shift: float, seed: int, n: int = 4_000, spread: float = 1.0) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Latents of two donors that differ, and of 7 perturbations of which the last is shifted, in correlated noise."""
    rng = np.random.default_rng(seed)
    labels = np.column_stack([rng.integers(0, 2, n), np.zeros(n, dtype=int), rng.integers(0, SHAPE[2], n)])
    mix = rng.standard_normal((12, 12)) * np.geomspace(1, 0.05, 12)
    z = rng.standard_normal((n, 12)) @ mix
    z += 3.0 * labels[:, :1] + shift * (labels[:, 2:] == SHAPE[2] - 1)
    return torch.from_numpy(spread * z).float().reshape(n, 4, 3), labels


def test_shifts_of_latents_that_are_noise_are_told_from_one_that_is_not() -> None:
    found = [told_shares(*latents_of(0.5, seed), SHAPE, CONTROL) for seed in range(20)]
    assert all(donors.min() > 0.9 and timepoints == [1.0] for donors, timepoints, _ in found)
    shares = np.array([perturbations for *_, perturbations in found])
    assert np.all(shares[:, CONTROL] == 1)
    assert np.all(shares[:, -1] > 0.9)
    without = shares[:, 1:-1]
    assert without.min() == 0  # half of all F are below 1
    assert without.mean() < 0.25
    assert np.all(without < 0.8)


def test_shares_do_not_depend_on_the_units_of_the_latent() -> None:
    one, large = (np.hstack(told_shares(*latents_of(0.3, 1, spread=s), SHAPE, CONTROL)) for s in (1.0, 100.0))
    np.testing.assert_allclose(one, large, rtol=1e-3, atol=1e-4)


def test_donors_that_do_not_differ_are_told_from_those_that_do() -> None:
    latents, labels = latents_of(0.5, 0)
    rng = np.random.default_rng(1)
    labels[:, 0] = rng.permutation(np.repeat([2, 3, 4, 5], 1_000))  # at random: their shifts are noise
    far = (labels[:, 0] == 5)[:, None, None] & (np.arange(4)[:, None] == 0)
    shares = told_shares(latents + torch.from_numpy(far * 2.0), labels, (6, *SHAPE[1:]), CONTROL)[0]
    assert list(shares[:2]) == [1.0, 1.0]  # levels without cells
    assert shares[5] > 0.8
    assert shares[2:5].max() < shares[5]


def test_without_a_control_only_perturbations_stay() -> None:
    latents, labels = latents_of(0.5, 0)
    donors, _, perturbations = told_shares(latents, labels, SHAPE, None)
    assert np.all(perturbations == 1)
    assert donors.max() < 1


def test_without_controls_in_the_context_or_with_few_cells_nothing_is_scaled() -> None:
    latents, labels = latents_of(0.0, 0)
    alone = ~((labels[:, 0] == 1) & (labels[:, 2] == CONTROL)) & ~((labels[:, 0] == 0) & (labels[:, 2] == 3))
    *_, share = told_shares(latents[alone], labels[alone], SHAPE, CONTROL)
    assert share[3] == 1  # its cells are of the donor without control
    assert share[1] < 0.8
    assert np.all(np.hstack(told_shares(latents[:20], labels[:20], SHAPE, CONTROL)) == 1)


def networks(cells: CellData) -> tuple[VAE, DiT]:
    torch.manual_seed(0)
    config = VAEConfig(width=32, n_tokens=4, n_channels=4, n_layers=1, label_rank=16)
    flow = FlowConfig(width=16, n_layers=1, n_heads=2, label_std=0.5)
    return (
        VAE(config, cells.n_genes, cells.registry.vocabulary).eval(),
        DiT(flow, config.latent_tokens, config.n_channels, cells.registry.vocabulary).eval(),
    )


def test_embeddings_move_toward_the_control_or_their_mean(simulated: Any) -> None:
    cells = CellData.from_adata(simulated)
    _, dit = networks(cells)
    n_donors, n_times, _ = cells.registry.vocabulary
    tables = [dit.class_embeddings[role].weight for role in ("donor", "timepoint", "perturbation")]
    donors, timepoints, before = (table.detach().clone() for table in tables)
    shares = [np.linspace(0, 1, n_donors), np.ones(n_times), np.array([1.0, 0.0, 0.5])]
    shrink_embeddings(dit, shares, 0)
    after = tables[2].detach()
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], before[0])
    torch.testing.assert_close(after[2], (before[0] + before[2]) / 2)
    torch.testing.assert_close(after[3:], before[3:])
    torch.testing.assert_close(tables[0][0].detach(), donors[:n_donors].mean(dim=0))
    torch.testing.assert_close(tables[0][n_donors - 1 :].detach(), donors[n_donors - 1 :])
    torch.testing.assert_close(tables[1].detach(), timepoints)


def test_generated_means_of_perturbations_are_the_observed_ones(simulated: Any) -> None:
    cells = CellData.from_adata(simulated)
    assert cells.labels is not None
    vae, dit = networks(cells)
    rows, labels = np.arange(cells.n_cells), torch.from_numpy(cells.labels)
    counts = cells.counts(rows).toarray()
    latents = torch.randn(len(rows), 16, 4, generator=torch.Generator().manual_seed(0))

    def gaps() -> list[float]:
        """Typical log ratio of observed and generated counts of frequent genes, by perturbation."""
        # the flow of an untrained network leaves noise where it is
        decoded = decode_means(vae, latents, torch.from_numpy(counts.sum(axis=1))[:, None], labels).numpy()
        out = []
        for code in range(4):
            own = cells.labels[:, 2] == code
            observed, expected = counts[own].sum(axis=0), decoded[own].sum(axis=0)
            frequent = observed > 50
            assert frequent.sum() > 10
            out.append(float(np.median(np.abs(np.log(observed[frequent] / expected[frequent])))))
        return out

    before = gaps()
    set_label_effects(vae, cells, rows, np.random.default_rng(0))
    others = label_effects(vae)
    settle_labels(vae, dit, cells, rows, latents, labels, seed=1)
    control = cells.registry.perturbation.levels.index("NTC")
    for old, new in zip(others[:2], label_effects(vae), strict=False):
        np.testing.assert_allclose(new, old, atol=1e-4)
    np.testing.assert_allclose(label_effects(vae)[2][control], others[2][control], atol=1e-4)
    assert min(before) > 0.3
    assert max(gaps()) < 0.15


def test_effects_that_latents_do_not_tell_are_shrunk_gene_by_gene() -> None:
    adata = datasets.synthetic_cd4(1500, 60, n_perturbations=6, no_effect_share=0.5, n_donors=2, n_timepoints=1, seed=0)
    CD4Model.setup_anndata(
        adata, perturbation_key="perturbation", donor_key="donor_id", timepoint_key="timepoint", control="NTC"
    )
    cells = CellData.from_adata(adata)
    levels, settings = cells.registry.perturbation.levels, adata.uns["synthetic_cd4"]
    none = [
        levels.index(n) for n, kind in zip(settings["perturbations"], settings["kinds"], strict=True) if kind == "none"
    ]
    found = []
    for told in (1.0, 0.0):
        vae, dit = networks(cells)
        fit_to_generated(vae, dit, cells, np.arange(cells.n_cells), np.full(len(levels), told), seed=1)
        effects = label_effects(vae)[2]
        found.append(effects[none] - effects[levels.index("NTC")])
    target = np.argmin(found[0], axis=1)  # all that these perturbations change
    rest = np.arange(cells.n_genes) != target[:, None]
    fitted, shrunk = (np.sqrt(np.mean(np.square(effects[rest]))) for effects in found)
    assert shrunk < 0.85 * fitted
    assert found[1].min(axis=1).max() < -1.2  # knocked down by 70 %


def contexts(ratio: NDArray[np.float64], n_genes: int = 2_000, seed: int = 0) -> dict[str, Any]:
    """Counts of one perturbation in contexts of 50 to 800 cells that differ in the expression of genes."""
    rng, n_cells = np.random.default_rng(seed), np.array([50, 100, 200, 400, 800])
    rate = rng.gamma(1.0, 1.0, (5, n_genes))
    expected = rate * n_cells[:, None]
    dispersion = np.full(n_genes, 0.3)
    cells = rng.gamma(n_cells[:, None] / 0.3, 0.3 / n_cells[:, None], expected.shape)  # the mean of as many cells
    observed = rng.poisson(expected * np.exp(ratio) * cells).astype(float)
    return {"observed": observed, "expected": expected, "n_cells": n_cells, "dispersion": dispersion}


def test_where_contexts_do_not_differ_their_sum_stays() -> None:
    given = contexts(np.full((5, 1), -0.7))
    shift = toward_mean_context(**given, level=np.zeros(5, dtype=np.int64))
    assert shift.shape == (1, 2_000)
    assert np.abs(np.median(shift)) < 0.005
    assert np.mean(np.abs(shift)) < 0.03


def test_where_contexts_differ_the_fit_moves_to_their_mean() -> None:
    ratio = np.random.default_rng(1).normal(0.5, 0.8, (5, 2_000))
    given = contexts(ratio)
    summed = np.log(given["observed"].sum(axis=0) / given["expected"].sum(axis=0))
    moved = summed + toward_mean_context(**given, level=np.zeros(5, dtype=np.int64))[0]
    before, after = (float(np.mean(np.square(fit - ratio.mean(axis=0)))) for fit in (summed, moved))
    assert after < 0.4 * before


def test_contexts_of_other_levels_and_single_ones_play_no_part() -> None:
    given = contexts(np.random.default_rng(1).normal(0.5, 0.8, (5, 2_000)))
    alone = toward_mean_context(
        **{k: v[:3] if k != "dispersion" else v for k, v in given.items()}, level=np.zeros(3, dtype=np.int64)
    )
    both = toward_mean_context(**given, level=np.array([0, 0, 0, 1, 2]))
    np.testing.assert_allclose(both[:1], alone)
    np.testing.assert_allclose(both[1:], 0, atol=1e-6)


def test_perturbations_are_fitted_alike_some_at_a_time_or_all_at_once(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = CellData.from_adata(simulated)
    found = []
    for most, chunk in ((settling.MOST_SUMS, settling.CHUNK), (2 * cells.n_genes, 3)):
        monkeypatch.setattr(settling, "MOST_SUMS", most)
        monkeypatch.setattr(settling, "CHUNK", chunk)  # of few cells: some hold no cell of these perturbations
        vae, dit = networks(cells)
        fit_to_generated(vae, dit, cells, np.arange(cells.n_cells), np.full(4, 0.5), seed=1)
        found.append(label_effects(vae)[2])
    np.testing.assert_allclose(*found, atol=1e-5)

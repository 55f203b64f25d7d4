"""Mean effects of labels that the latents leave untold.

A weak effect changes a single cell less than counting noise does, so that its latent tells little of it and the decoded
cells of a perturbation lie too near to the control. Their mean over all training cells is known well, however: what
separates it from the decoded mean is estimated once, after training, and added to the gene logits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4._passes import chunks
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.train.latents import CellEncoder, decode_means, encode_rows, inference_batch_size
from scldm_cd4.train.shrinkage import adaptive_shrink

FloatArray = NDArray[np.float64]
DONOR, TIMEPOINT, PERTURBATION = range(3)
PRIOR_CELLS, PRIOR_COUNTS = 5, 2
"""A perturbation is shrunk as if so many cells without an effect, and so many counts of each gene, had been seen."""
HALF = 0.5
"""Counts added to observed and decoded ones, so that their ratio has a logarithm."""
N_SWEEPS = 15
TOLERANCE = 1e-3
"""Change of an effect at which the sweeps end."""
MAX_CELLS, MAX_VALUES = 20_000, 50_000_000
"""Training cells that are looked at, more where cells times genes are fewer than the second: all are decoded."""


def set_label_effects(vae: VAE, cells: CellData, rows: NDArray[np.int64], generator: np.random.Generator) -> None:
    """Write the effects that the latents leave untold into a trained autoencoder with ``label_rank``.

    Parameters
    ----------
    vae
        Changed in place.
    cells, rows
        Training cells are these rows of `cells`, with labels.
    generator
        Draws some of many cells, and what the prior of the effects is estimated from.
    """
    most = max(MAX_CELLS, MAX_VALUES // cells.n_genes)
    if len(rows) > most:
        rows = np.sort(generator.choice(rows, most, replace=False))
    write_effects(vae, untold_effects(vae, cells, rows, generator), generator)


def write_effects(vae: VAE, effects: list[FloatArray], generator: np.random.Generator) -> None:
    """Write effects (levels, G) of donors, time points and perturbations: exactly, where ``label_rank`` holds them."""
    from sklearn.utils.extmath import randomized_svd

    stacked = np.concatenate(effects)
    rank = min(vae.config.label_rank, *stacked.shape)
    left, singular, right = randomized_svd(stacked, rank, random_state=int(generator.integers(2**31)))
    levels, start = left * np.sqrt(singular), 0
    for table, effect in zip(vae.label_effects.vectors.values(), effects, strict=True):
        _write(table, slice(0, len(effect)), levels[start : start + len(effect)])
        start += len(effect)
    _write(vae.label_effects.loadings, slice(1, None), right.T * np.sqrt(singular))


def label_effects(vae: VAE) -> list[FloatArray]:
    """Return the effects that an autoencoder holds, (levels, G) for donor, time point and perturbation."""
    tables: Any = vae.label_effects
    loadings = tables.loadings.weight[1:].double().cpu().numpy()
    return [table.weight[:-1].double().cpu().numpy() @ loadings.T for table in tables.vectors.values()]


def untold_effects(
    vae: VAE, cells: CellData, rows: NDArray[np.int64], generator: np.random.Generator
) -> list[FloatArray]:
    r"""Log ratios of observed to decoded counts for donors, time points and perturbations, fitted jointly and shrunk.

    The decoded mean of a cell is multiplied by the effects of its three labels. Each role in turn is estimated with the
    effects of the others in the decoded counts: a donor of whom training has the controls alone does not take what
    belongs to all controls for its own, and carry it over to perturbed cells.

    The log ratio of a donor or time point with o observed and e decoded counts in n cells has the variance
    :math:`\ln^2(o/e) / D + 1 / (n \theta)` with D the Poisson deviance :math:`2 (o \ln(o/e) - o + e)`, and is shrunk by
    `adaptive_shrink`: a new combination takes over what it holds of noise. For that of a perturbation see
    `perturbation_effect`.

    Returns
    -------
    (number of levels, G) for donor, time point and perturbation, zero for a level without cells, and for a single
    donor or time point.
    """
    sums = Sums.of(vae, cells, rows)
    effects = [np.zeros_like(o) for o in sums.observed]
    for _ in range(N_SWEEPS):
        change = 0.0
        for role in (PERTURBATION, DONOR, TIMEPOINT):  # what all contexts have in common is the perturbation's
            some = sums.n_cells[role] > 0
            if role != PERTURBATION and some.sum() < 2:
                continue  # what it has is in the perturbations
            observed, expected = sums.observed[role][some], sums.expected_with(effects, role)[some]
            n_cells = sums.n_cells[role][some, None]
            if role == PERTURBATION:
                new = perturbation_effect(observed, expected, n_cells)
            else:
                ratio = np.log((observed + HALF) / (expected + HALF))
                noise = log_ratio_variance(observed + HALF, expected + HALF, ratio) + sums.dispersion / n_cells
                new = adaptive_shrink(ratio, noise, generator)
            change = max(change, float(np.abs(new - effects[role][some]).max()))
            effects[role][some] = new
        if change < TOLERANCE:
            break
    return effects


def perturbation_effect(observed: FloatArray, expected: FloatArray, n_cells: NDArray[Any]) -> FloatArray:
    """Return ln((o + k) / (e + k)) of observed and decoded counts (levels, G).

    With k = `PRIOR_CELLS` e / n + `PRIOR_COUNTS`, which shrinks little: by its own noise alone each of many small
    changes in one direction would all but vanish.
    """
    prior = expected * PRIOR_CELLS / n_cells + PRIOR_COUNTS
    effect: FloatArray = np.log((observed + prior) / (expected + prior))
    return effect


@dataclass(frozen=True)
class Sums:
    """Summed counts of the levels of each role, in the order of `scldm_cd4.config.ROLES`."""

    observed: list[FloatArray]
    """Counts (levels, G)."""
    expected: list[FloatArray]
    """Decoded means, likewise."""
    n_cells: list[NDArray[np.int64]]
    """Of each level."""
    shares: dict[tuple[int, int], Any]
    """Of two roles: the share of a level's cells that each level of the other has, CSR."""
    dispersion: FloatArray
    """1 / theta of each gene (G,), by moments."""

    @classmethod
    def of(cls, vae: VAE, cells: CellData, rows: NDArray[np.int64]) -> "Sums":
        """Encode and decode the cells once, without effects of labels."""
        assert cells.labels is not None
        labels, sizes = cells.labels[rows], cells.registry.vocabulary
        observed, expected = ([np.zeros((n, cells.n_genes)) for n in sizes] for _ in range(2))
        excess, square = np.zeros(cells.n_genes), np.zeros(cells.n_genes)
        encoder = CellEncoder(vae)
        for index in chunks(len(rows), inference_batch_size(cells.n_genes)):
            counts = cells.counts(rows[index])
            library = torch.from_numpy(np.asarray(counts.sum(1), dtype=np.float32).reshape(-1, 1))
            mean = decode_means(vae, encode_rows(vae, cells, rows[index], encoder=encoder), library).numpy()
            for role in range(3):
                levels, code = np.unique(labels[index, role], return_inverse=True)  # few of thousands in a batch
                own = members(code, len(levels))
                observed[role][levels] += (own @ counts).toarray()
                expected[role][levels] += own @ mean
            excess += (np.square(counts.toarray() - mean) - mean).sum(axis=0)
            square += np.square(mean).sum(axis=0)
        n_cells = [np.bincount(labels[:, role], minlength=n) for role, n in enumerate(sizes)]
        shares = {
            (a, b): sparse.diags(1 / np.maximum(n_cells[a], 1))
            @ sparse.csr_matrix((np.ones(len(rows)), (labels[:, a], labels[:, b])), (sizes[a], sizes[b]))
            for a in range(3)
            for b in range(3)
            if a != b
        }
        return cls(observed, expected, n_cells, shares, np.maximum(excess, 0.0) / np.maximum(square, 1e-12))

    def expected_with(self, effects: list[FloatArray], role: int) -> FloatArray:
        """Return the decoded counts of the levels of a role (levels, G) with the effects of the two other roles.

        The decoded profile of a condition is taken for the product of those of its labels, so that no table of all
        conditions is needed.
        """
        expected = self.expected[role].copy()
        for other in {0, 1, 2} - {role}:
            profile = (self.expected[other] + 1e-3) / np.maximum(self.n_cells[other], 1)[:, None]
            share = self.shares[role, other]
            expected *= (share @ (profile * np.exp(effects[other]))) / np.maximum(share @ profile, 1e-300)
        return expected


def members(group: NDArray[np.int64], n_groups: int) -> Any:
    """Return which rows belong to each group, CSR (groups, rows) of 0 and 1."""
    return sparse.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))), (n_groups, len(group)))


def log_ratio_variance(observed: FloatArray, expected: FloatArray, ratio: FloatArray) -> FloatArray:
    """Return the variance of a log ratio of Poisson counts at which its square is the deviance."""
    deviance = 2 * (observed * ratio - observed + expected)
    return np.where(np.abs(ratio) < 1e-3, 1 / expected, np.square(ratio) / np.maximum(deviance, 1e-12))


@torch.no_grad()
def _write(table: Any, rows: slice, values: FloatArray) -> None:
    table.weight[rows, : values.shape[1]] = torch.from_numpy(values).to(table.weight)

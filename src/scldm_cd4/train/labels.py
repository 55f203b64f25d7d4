"""Labels of a trained flow, held to what their training cells tell.

What the flow learns of a label from few cells is mostly noise, other in every combination with other labels. Two
corrections follow training. Embeddings keep the share of what sets their label apart that is not noise: perturbations
from the control, donors and time points from each other. Then the effects of perturbations on the gene logits are
fitted to generated cells in place of encoded ones.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from scldm_cd4._passes import chunks
from scldm_cd4.conditions import Request
from scldm_cd4.config import ROLES
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.sampling import Sampler, Sampling, draw
from scldm_cd4.train.effects import (
    DONOR,
    HALF,
    PERTURBATION,
    PRIOR_COUNTS,
    TIMEPOINT,
    label_effects,
    log_ratio_variance,
    members,
    perturbation_effect,
    write_effects,
)
from scldm_cd4.train.latents import decode_means
from scldm_cd4.train.rng import key_seed
from scldm_cd4.train.shrinkage import adaptive_shrink

FloatArray = NDArray[np.float64]
CHUNK = 4_096
FLAT = 1e-4
"""Directions of the latent with less than this share of the largest variance tell nothing."""
GENERATED, PER_PERTURBATION, PER_CONDITION, PER_CELL = 10_000, 64, 200, 4
"""Cells that effects are fitted to: in all, but not fewer for a perturbation, nor more for a condition or a training
cell."""
MOST_SUMS = 5_000_000
"""Conditions times genes whose sums are held at once, at some 90 bytes each while they are compared."""


def settle_labels(
    vae: VAE, dit: DiT, cells: CellData, rows: NDArray[np.int64], latents: Tensor, labels: Tensor, seed: int
) -> None:
    """Correct the labels of trained networks with ``label_rank``.

    Parameters
    ----------
    vae, dit
        Changed in place: the embeddings of labels, and the effects of perturbations on the logits.
    cells, rows
        The cells that effects are fitted to are these rows of `cells`.
    latents, labels
        Of the training cells, (n, S, L) and (n, 3).
    seed
        Of all draws.
    """
    control = control_code(cells)
    shares = told_shares(latents, labels.numpy(), cells.registry.vocabulary, control)
    shrink_embeddings(dit, shares, control)
    fit_to_generated(vae, dit, cells, rows, shares[PERTURBATION], seed)


def control_code(cells: CellData) -> int | None:
    """Return the code of the control among perturbations, None where none was declared."""
    control = cells.registry.control
    return None if control is None else cells.registry.perturbation.levels.index(control)


@dataclass(frozen=True)
class Conditions:
    """The conditions of some cells, few of all that the labels allow."""

    labels: NDArray[np.int64]
    """Codes (K, 3) of donor, time point and perturbation."""
    n_cells: NDArray[np.int64]
    """Of each (K,)."""
    shape: tuple[int, int, int]
    """Levels of each role."""
    codes: NDArray[np.int64]
    """Numbers among all, ascending."""

    @classmethod
    def of(cls, labels: Iterable[NDArray[np.integer]], shape: tuple[int, int, int]) -> "Conditions":
        """Look through labels (n, 3) that come in parts."""
        parts = [np.unique(np.ravel_multi_index(tuple(part.T), shape), return_counts=True) for part in labels]
        every, n_cells = (np.concatenate(x) for x in zip(*parts, strict=True))
        codes, place = np.unique(every, return_inverse=True)
        total = np.zeros(len(codes), dtype=np.int64)
        np.add.at(total, place, n_cells)
        return cls(np.array(np.unravel_index(codes, shape)).T, total, shape, codes)

    def __len__(self) -> int:
        return len(self.codes)

    def some(self, index: NDArray[np.int64]) -> "Conditions":
        """Return some of them, by ascending number."""
        return Conditions(self.labels[index], self.n_cells[index], self.shape, self.codes[index])

    def find(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the number of the condition of each cell, labels (n, 3)."""
        return np.searchsorted(self.codes, np.ravel_multi_index(tuple(labels.T), self.shape))


def told_shares(
    latents: Tensor, labels: NDArray[np.integer], shape: tuple[int, int, int], control: int | None
) -> list[FloatArray]:
    r"""Return the share of each label's shift of the latents that is not noise of few cells.

    The shift d of a perturbation is the mean difference of its cells from the control cells of the same donor and time
    point; that of a donor or time point from the cells of all others with the same other labels. With :math:`\Sigma`
    the covariance of latents within conditions, of p directions, and v the sum of squared weights of all cells in d,
    :math:`F = d' \Sigma^{-1} d / (p v)` is 1 where a label changes nothing, and the share is :math:`\max(0, 1 - 1/F)`
    (positive-part James-Stein estimator; Efron & Morris 1973, *JASA* 68, 117).

    Parameters
    ----------
    latents, labels
        Of cells, (n, S, L) and (n, 3).
    shape
        Levels of donor, time point and perturbation.
    control
        Code of the control; without one the shares of perturbations are 1.

    Returns
    -------
    (number of levels,) for donor, time point and perturbation; 1 for the control, for a level that no cells can be
    compared with, and for all where cells are too few for a covariance.
    """
    conditions = Conditions.of((labels[index] for index in chunks(len(labels), CHUNK)), shape)
    n, width, shares = conditions.n_cells.astype(np.float64), latents[0].numel(), [np.ones(k) for k in shape]
    freedom = len(latents) - len(n)
    if freedom <= width:
        return shares
    sums, square = np.zeros((len(n), width)), np.zeros((width, width))
    for index in chunks(len(latents), CHUNK):
        z = latents[index].reshape(len(index), -1).double().numpy()
        present, place = np.unique(conditions.find(labels[index]), return_inverse=True)
        sums[present] += members(place, len(present)) @ z
        square += z.T @ z
    variance, directions = np.linalg.eigh((square - sums.T @ (sums / n[:, None])) / freedom)
    kept = variance > FLAT * variance[-1]
    sums = sums @ (directions[:, kept] / np.sqrt(variance[kept]))
    for role, share in enumerate(shares):
        level, other = conditions.labels[:, role], np.delete(conditions.labels, role, axis=1)
        group = np.unique(other, axis=0, return_inverse=True)[1].ravel()
        if role == PERTURBATION:
            is_control = level == control
            compared = members(group, group.max() + 1) @ sparse.diags(is_control.astype(float))
            n_other, others = (compared @ n)[group], (compared @ sums)[group]
            n_other[is_control] = 0
        else:
            same = members(group, group.max() + 1)
            n_other, others = (same @ n)[group] - n, (same @ sums)[group] - sums
        told = np.flatnonzero(n_other)
        code, place = np.unique(level[told], return_inverse=True)
        own, n_other = members(place, len(code)), n_other[told, None]
        weight = (n[told] / (own @ n[told])[place])[:, None]
        shift = own @ (weight * (sums[told] / n[told, None] - others[told] / n_other))
        noise = kept.sum() * (own @ (np.square(weight) * (1 / n[told, None] + 1 / n_other)))[:, 0]
        share[code] = np.maximum(0.0, 1.0 - noise / np.maximum(np.square(shift).sum(axis=1), 1e-300))
    return shares


@torch.no_grad()
def shrink_embeddings(dit: DiT, shares: list[FloatArray], control: int | None) -> None:
    """Move the embeddings of perturbations toward the control's, those of donors and time points toward their mean.

    The share of the way between them stays.
    """
    tables: Any = dit.class_embeddings
    for role, share in zip(ROLES, shares, strict=True):
        levels = tables[role].weight[: len(share)]
        centre = levels.mean(dim=0) if role != "perturbation" or control is None else levels[control].clone()
        levels.copy_(torch.lerp(centre, levels, torch.from_numpy(share).to(levels)[:, None]))


def fit_to_generated(vae: VAE, dit: DiT, cells: CellData, rows: NDArray[np.int64], told: FloatArray, seed: int) -> None:
    r"""Fit the effects of perturbations to generated cells of their training conditions; see `perturbation_effect`.

    Those of donors, time points and the control stay, which many training cells tell better than some generated ones.
    All perturbations of a context share the noise of their generated cells: what these leave to chance cancels in the
    difference from the control. Where latents tell nothing of a perturbation, that difference is all there is of it:
    its effect is `told` times the difference, and the rest of it as `adaptive_shrink` leaves it, gene by gene.

    Where contexts differ in what is left to fit, a sum over all of them is the answer of those with the most counts; a
    new context is better told by their mean. Effects are moved from the one to the other; see `toward_mean_context`.
    Not so without a control, whose cells tell how genes vary within a condition.

    Parameters
    ----------
    vae, dit
        The first is changed in place.
    cells, rows
        The cells to fit to are these rows of `cells`.
    told
        Share of the shift of its latents, for each perturbation; see `told_shares`.
    seed
        Of all draws.
    """
    assert cells.labels is not None
    effects, control, generator = label_effects(vae), control_code(cells), np.random.default_rng(key_seed(seed, 1))
    sums, before = PerturbationSums.of(vae, dit, cells, rows, effects, key_seed(seed, 0)), effects[PERTURBATION]
    some = sums.codes
    if control in some:
        before[some] = before[control] + _beside_control(sums, some == control, told[some, None], generator)
    else:
        new = perturbation_effect(sums.observed, sums.expected, sums.n_cells)
        before[some] = new + sums.n_cells[:, 0] / sums.n_cells.sum() @ (before[some] - new)  # the mean of all stays
    write_effects(vae, effects, generator)


def _beside_control(
    sums: "PerturbationSums", is_control: NDArray[np.bool_], told: FloatArray, generator: np.random.Generator
) -> FloatArray:
    """Return effects (levels, G) less that of the control, shrunk where they are not told."""
    effect = perturbation_effect(sums.observed, sums.expected, sums.n_cells)
    of_control = effect[is_control]
    observed, expected = sums.observed + HALF, sums.expected * np.exp(of_control) + HALF
    ratio, shift = np.log(observed / expected), sums.shift * ~is_control[:, None]
    noise = log_ratio_variance(observed, expected, ratio) + sums.dispersion / sums.n_cells
    careful = adaptive_shrink(ratio + shift, noise + noise[is_control], generator)
    out: FloatArray = told * (effect + shift - of_control) + (1 - told) * careful
    return out


def toward_mean_context(
    observed: FloatArray,
    expected: FloatArray,
    n_cells: NDArray[np.int64],
    level: NDArray[np.int64],
    dispersion: FloatArray,
) -> FloatArray:
    r"""Return what leads from the log ratio of summed counts to the mean log ratio of contexts, by level and gene.

    The log ratio :math:`y_k` of context k has the variance :math:`v_k` by its own noise. The sum over contexts stands
    for weights :math:`1 / v_k`. Where contexts differ by :math:`\tau^2` beyond noise, the mean of contexts like these
    has the weights :math:`1 / (v_k + \tau^2)`, with :math:`\tau^2` by moments (DerSimonian & Laird 1986,
    *Controlled Clinical Trials* 7, 177). The difference of the two means is 0 where contexts do not differ.

    Parameters
    ----------
    observed, expected
        Counts of conditions (K, G).
    n_cells
        Of each condition (K,).
    level
        Of each condition (K,), numbered without gaps: its perturbation.
    dispersion
        1 / theta of each gene (G,).

    Returns
    -------
    (levels, G).
    """
    own = members(level, int(level.max()) + 1)
    pooled = ((own @ observed + HALF) / (own @ expected + HALF))[level]
    seen = observed + PRIOR_COUNTS * pooled  # the ratio of few counts is near that of all contexts
    y = np.log(seen / (expected + PRIOR_COUNTS) / pooled)
    v = 1 / seen + dispersion / n_cells[:, None]
    total, square = own @ (1 / v), own @ np.square(1 / v)
    fixed = own @ (y / v) / total
    excess = own @ (np.square(y - fixed[level]) / v) - (np.bincount(level)[:, None] - 1)
    variance = np.maximum(excess, 0.0) / np.maximum(total - square / total, 1e-9 * total)
    weight = 1 / (v + variance[level])
    shift: FloatArray = own @ (weight * y) / (own @ weight) - fixed
    return shift


@dataclass(frozen=True)
class PerturbationSums:
    """What the training cells of each perturbation count, and what generated ones in their place would."""

    codes: NDArray[np.int64]
    """Of the perturbations with cells, ascending (P,)."""
    n_cells: NDArray[np.int64]
    """Of each (P, 1)."""
    observed: FloatArray
    """Counts (P, G)."""
    expected: FloatArray
    """Counts of as many generated cells, with the effects of donors and time points (P, G)."""
    shift: FloatArray
    """See `toward_mean_context` (P, G)."""
    dispersion: FloatArray
    """1 / theta of each gene (G,), by moments of the control cells."""

    @classmethod
    def of(
        cls, vae: VAE, dit: DiT, cells: CellData, rows: NDArray[np.int64], effects: list[FloatArray], seed: int
    ) -> "PerturbationSums":
        """Sum the cells up by condition, of as many perturbations at a time as `MOST_SUMS` allows."""
        assert cells.labels is not None
        labels = (cells.labels[rows[index]] for index in chunks(len(rows), CHUNK))
        conditions = Conditions.of(labels, cells.registry.vocabulary)
        spread, n_generated = Spread.of(conditions, cells.n_genes), _cells_of_each(conditions)
        codes, place = np.unique(conditions.labels[:, PERTURBATION], return_inverse=True)
        observed, expected, shift = np.zeros((3, len(codes), cells.n_genes))
        for some in _parts(place, codes == control_code(cells), MOST_SUMS // cells.n_genes):
            part, (present, level) = conditions.some(some), np.unique(place[some], return_inverse=True)
            counts, library = _count(cells, rows, part, spread)
            fitted = _generated_shares(vae, dit, cells, part, n_generated, effects, seed) * library[:, None]
            own = members(level, len(present))
            observed[present], expected[present] = own @ counts, own @ fitted
            shift[present] = toward_mean_context(counts, fitted, part.n_cells, level, spread.dispersion)
        n_cells = np.bincount(place, conditions.n_cells).astype(np.int64)[:, None]
        return cls(codes, n_cells, observed, expected, shift, spread.dispersion)


def _count(
    cells: CellData, rows: NDArray[np.int64], conditions: Conditions, spread: "Spread"
) -> tuple[FloatArray, FloatArray]:
    """Return counts (K, G) and library sizes (K,) of conditions, and add their control cells to `spread`."""
    assert cells.labels is not None
    counts, library = np.zeros((len(conditions), cells.n_genes)), np.zeros(len(conditions))
    mine = np.isin(np.arange(conditions.shape[PERTURBATION]), conditions.labels[:, PERTURBATION])
    for index in chunks(len(rows), CHUNK):
        own = rows[index][mine[cells.labels[rows[index], PERTURBATION]]]
        some, labels = cells.counts(own), cells.labels[own]
        present, place = np.unique(conditions.find(labels), return_inverse=True)
        counts[present] += members(place, len(present)) @ some
        np.add.at(library, present[place], np.asarray(some.sum(axis=1)).ravel())
        is_control = labels[:, PERTURBATION] == control_code(cells)
        spread.add(some[is_control], labels[is_control])
    return counts, library


def _parts(level: NDArray[np.int64], first: NDArray[np.bool_], most: int) -> Iterator[NDArray[np.int64]]:
    """Yield the conditions (K,) of some levels at a time, about `most` but one level at least, in ascending order.

    The levels that are `first` come in the first part.
    """
    size = np.bincount(level)
    order = np.argsort(~first, kind="stable")
    part = np.empty(len(size), dtype=np.int64)
    part[order] = (np.cumsum(size[order]) - size[order]) // max(most, 1)
    for number in np.unique(part):
        yield np.flatnonzero(part[level] == number)


@dataclass(frozen=True)
class Spread:
    """Moments of the counts of control cells in each context."""

    shape: tuple[int, int]
    """Levels of donors and time points."""
    contexts: NDArray[np.int64]
    """Numbers among all (C,), ascending."""
    library: FloatArray
    """Sums of library sizes, and of their squares, of each context (2, C)."""
    counts: FloatArray
    """Sums of counts (C, G)."""
    squares: FloatArray
    """Sum of the squared counts of all cells (G,)."""

    @classmethod
    def of(cls, conditions: Conditions, n_genes: int) -> "Spread":
        """Start without cells."""
        shape = conditions.shape[0], conditions.shape[1]
        contexts = np.unique(np.ravel_multi_index(tuple(conditions.labels[:, :PERTURBATION].T), shape))
        n = len(contexts)
        return cls(shape, contexts, np.zeros((2, n)), np.zeros((n, n_genes)), np.zeros(n_genes))

    def add(self, counts: Any, labels: NDArray[np.integer]) -> None:
        """Add control cells, CSR (n, G), of labels (n, 3)."""
        code = np.ravel_multi_index(tuple(labels[:, :PERTURBATION].T), self.shape)
        present, place = np.unique(np.searchsorted(self.contexts, code), return_inverse=True)
        own, library = members(place, len(present)), np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        self.library[:, present] += np.stack([own @ library, own @ np.square(library)])
        self.counts[present] += own @ counts
        self.squares[:] += np.asarray(counts.multiply(counts).sum(axis=0)).ravel()

    @property
    def dispersion(self) -> FloatArray:
        """1 / theta of each gene (G,) by moments: the variance of cells around the mean of their context."""
        share = self.counts / np.maximum(self.library[0], 1.0)[:, None]
        square = self.library[1] @ np.square(share)
        return np.maximum(self.squares - self.counts.sum(axis=0) - square, 0.0) / np.maximum(square, 1e-12)


def _cells_of_each(conditions: Conditions) -> int:
    """Return how many cells to generate of each condition."""
    wanted = max(GENERATED, PER_PERTURBATION * len(np.unique(conditions.labels[:, PERTURBATION])))
    wanted = min(wanted, PER_CELL * int(conditions.n_cells.sum()))
    return min(PER_CONDITION, -(-wanted // len(conditions)))


def _generated_shares(
    vae: VAE, dit: DiT, cells: CellData, conditions: Conditions, n: int, effects: list[FloatArray], seed: int
) -> FloatArray:
    """Return mean decoded shares (K, G) of `n` generated cells each, with the effects of donors and time points."""
    registry = cells.registry
    sampling = Sampling.resolve(next(dit.parameters()).device, seed=seed, output="latent")
    sampler = Sampler(vae, dit, registry, sampling, noise_labels=lambda labels: (*labels[:PERTURBATION], None))
    names = [a.decode(conditions.labels[:, i]) for i, a in enumerate(registry.attributes)]
    requests = [Request(labels, n) for labels in zip(*names, strict=True)]
    shape, done = (-1, vae.config.latent_tokens, vae.config.n_channels), 0
    out = np.zeros((len(conditions), cells.n_genes))
    for drawn in draw(sampler, requests, np.ones(n * len(conditions))):
        latents = torch.from_numpy(drawn.values.reshape(shape))
        shares = decode_means(vae, latents, torch.ones(len(latents), 1)).double().numpy()
        present, place = np.unique(np.arange(done, done + len(latents)) // n, return_inverse=True)
        out[present] += members(place, len(present)) @ shares / n
        done += len(latents)
    donor, timepoint, _ = conditions.labels.T
    return out * np.exp(effects[DONOR][donor] + effects[TIMEPOINT][timepoint])

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

from scldm_cd4.conditions import Request
from scldm_cd4.config import ROLES
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.sampling import Sampler, Sampling, draw
from scldm_cd4.train.effects import (
    DONOR,
    HALF,
    PERTURBATION,
    TIMEPOINT,
    label_effects,
    log_ratio_variance,
    members,
    perturbation_effect,
    write_effects,
)
from scldm_cd4.train.latents import chunks, decode_means
from scldm_cd4.train.rng import key_seed
from scldm_cd4.train.shrinkage import adaptive_shrink

FloatArray = NDArray[np.float64]
CHUNK = 4_096
FLAT = 1e-4
"""Directions of the latent with less than this share of the largest variance tell nothing."""
GENERATED, PER_PERTURBATION, PER_CONDITION, PER_CELL = 10_000, 64, 200, 4
"""Cells that effects are fitted to: in all, but not fewer for a perturbation, nor more for a condition or a training
cell."""


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
    labels, control = cells.labels, control_code(cells)
    conditions = Conditions.of((labels[rows[index]] for index in chunks(len(rows), CHUNK)), cells.registry.vocabulary)
    observed = np.zeros((cells.registry.vocabulary[PERTURBATION], cells.n_genes))
    library, spread = np.zeros(len(conditions)), Spread.of(conditions, cells.n_genes)
    for index in chunks(len(rows), CHUNK):
        part = rows[index]
        counts, code = cells.counts(part), labels[part, PERTURBATION]
        present, place = np.unique(code, return_inverse=True)
        observed[present] += members(place, len(present)) @ counts
        np.add.at(library, conditions.find(labels[part]), np.asarray(counts.sum(axis=1)).ravel())
        spread.add(counts[code == control], conditions.find(labels[part][code == control]))
    effects, expected = label_effects(vae), np.zeros_like(observed)
    for of, shares in _generated(vae, dit, cells, conditions, key_seed(seed, 0)):
        donor, timepoint, perturbation = conditions.labels[of].T
        others = np.exp(effects[DONOR][donor] + effects[TIMEPOINT][timepoint])
        np.add.at(expected, perturbation, library[of, None] * shares * others)
    n_cells = np.bincount(conditions.labels[:, PERTURBATION], conditions.n_cells, minlength=len(observed))
    some, generator = np.flatnonzero(n_cells), np.random.default_rng(key_seed(seed, 1))
    observed, expected, n_cells, before = observed[some], expected[some], n_cells[some, None], effects[PERTURBATION]
    if control in some:
        told, is_control = told[some, None], some == control
        new = _beside_control(observed, expected, n_cells, is_control, told, spread.dispersion, generator)
        before[some] = new + before[control]
    else:
        new = perturbation_effect(observed, expected, n_cells)
        before[some] = new + n_cells[:, 0] / n_cells.sum() @ (before[some] - new)  # the mean of all cells stays
    write_effects(vae, effects, generator)


def _beside_control(
    observed: FloatArray,
    expected: FloatArray,
    n_cells: NDArray[np.int64],
    is_control: NDArray[np.bool_],
    told: FloatArray,
    dispersion: FloatArray,
    generator: np.random.Generator,
) -> FloatArray:
    """Return effects (levels, G) less that of the control, shrunk where they are not told."""
    effect = perturbation_effect(observed, expected, n_cells)
    of_control = effect[is_control]
    observed, expected = observed + HALF, expected * np.exp(of_control) + HALF
    ratio = np.log(observed / expected)
    noise = log_ratio_variance(observed, expected, ratio) + dispersion / n_cells
    careful = adaptive_shrink(ratio, noise + noise[is_control], generator)
    out: FloatArray = told * (effect - of_control) + (1 - told) * careful
    return out


@dataclass(frozen=True)
class Spread:
    """Moments of the counts of control cells in each context."""

    context: NDArray[np.int64]
    """Of each condition (K,), numbered."""
    library: FloatArray
    """Sums of library sizes, and of their squares, of each context (2, C)."""
    counts: FloatArray
    """Sums of counts (C, G)."""
    squares: FloatArray
    """Sum of the squared counts of all cells (G,)."""

    @classmethod
    def of(cls, conditions: "Conditions", n_genes: int) -> "Spread":
        """Start without cells."""
        context = np.unique(conditions.labels[:, :PERTURBATION], axis=0, return_inverse=True)[1].ravel()
        n = int(context.max()) + 1
        return cls(context, np.zeros((2, n)), np.zeros((n, n_genes)), np.zeros(n_genes))

    def add(self, counts: Any, of: NDArray[np.int64]) -> None:
        """Add control cells, CSR (n, G), of these conditions (n,)."""
        present, place = np.unique(self.context[of], return_inverse=True)
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


def _generated(
    vae: VAE, dit: DiT, cells: CellData, conditions: Conditions, seed: int
) -> Iterator[tuple[NDArray[np.int64], FloatArray]]:
    """Yield conditions and decoded shares (n, G), without effects of labels, of some generated cells at a time.

    Shares are divided by the number of cells of their condition, equal for all.
    """
    registry = cells.registry
    wanted = max(GENERATED, PER_PERTURBATION * len(np.unique(conditions.labels[:, PERTURBATION])))
    wanted = min(wanted, PER_CELL * int(conditions.n_cells.sum()))
    n = min(PER_CONDITION, -(-wanted // len(conditions)))
    sampling = Sampling.resolve(next(dit.parameters()).device, seed=seed, output="latent")
    sampler = Sampler(vae, dit, registry, sampling, noise_labels=lambda labels: (*labels[:PERTURBATION], None))
    names = [a.decode(conditions.labels[:, i]) for i, a in enumerate(registry.attributes)]
    requests = [Request(labels, n) for labels in zip(*names, strict=True)]
    shape, done = (-1, vae.config.latent_tokens, vae.config.n_channels), 0
    for drawn in draw(sampler, requests, np.ones(n * len(conditions))):
        latents = torch.from_numpy(drawn.values.reshape(shape))
        shares = decode_means(vae, latents, torch.ones(len(latents), 1)).double().numpy()
        yield np.arange(done, done + len(latents)) // n, shares / n
        done += len(latents)

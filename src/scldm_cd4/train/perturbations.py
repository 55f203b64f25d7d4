"""Perturbations in a trained flow, held to what their training cells tell.

The flow learns the latents of a perturbation from few cells: what it makes of one without an effect is noise, other in
every context, and of one with an effect too little or too much. Two corrections follow training. What separates the
embedding of a perturbation from the control's is scaled by the share of its latents' shift that is not noise. Then its
effect on the gene logits is fitted to generated cells in place of encoded ones.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4.conditions import Request
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.sampling import Sampler, Sampling, draw
from scldm_cd4.train.effects import (
    DONOR,
    PERTURBATION,
    TIMEPOINT,
    label_effects,
    members,
    perturbation_effect,
    write_effects,
)
from scldm_cd4.train.latents import chunks, decode_means
from scldm_cd4.train.rng import key_seed

FloatArray = NDArray[np.float64]
CHUNK = 4_096
FLAT = 1e-4
"""Directions of the latent with less than this share of the largest variance tell nothing."""
GENERATED, PER_PERTURBATION, PER_CONDITION, PER_CELL = 10_000, 64, 200, 4
"""Cells that effects are fitted to: in all, but not fewer for a perturbation, nor more for a condition or a training
cell."""


def settle_perturbations(
    vae: VAE, dit: DiT, cells: CellData, rows: NDArray[np.int64], latents: Tensor, labels: Tensor, seed: int
) -> None:
    """Correct the perturbations of trained networks with ``label_rank``.

    Parameters
    ----------
    vae, dit
        Changed in place: the effects of perturbations on the logits and, where there is a control, their embeddings.
    cells, rows
        The cells that effects are fitted to are these rows of `cells`.
    latents, labels
        Of the training cells, (n, S, L) and (n, 3).
    seed
        Of all draws.
    """
    if (control := cells.registry.control) is not None:
        code = cells.registry.perturbation.levels.index(control)
        scale_embeddings(dit, told_share(latents, labels.numpy(), cells.registry.vocabulary, code), code)
    fit_to_generated(vae, dit, cells, rows, seed)


@dataclass(frozen=True)
class Conditions:
    """The conditions of some cells, few of all that the labels allow."""

    labels: NDArray[np.int64]
    """Codes (K, 3) of donor, time point and perturbation."""
    n_cells: NDArray[np.int64]
    """Of each (K,)."""
    shape: tuple[int, int, int]
    """Levels of each role."""
    place: NDArray[np.int64]
    """Number of a condition among the K, by its number among all."""

    @classmethod
    def of(cls, labels: Iterable[NDArray[np.integer]], shape: tuple[int, int, int]) -> "Conditions":
        """Look through labels (n, 3) that come in parts."""
        n_cells = np.zeros(math.prod(shape), dtype=np.int64)
        for part in labels:
            n_cells += np.bincount(np.ravel_multi_index(tuple(part.T), shape), minlength=len(n_cells))
        present = np.flatnonzero(n_cells)
        place = np.zeros(len(n_cells), dtype=np.int64)
        place[present] = np.arange(len(present))
        return cls(np.array(np.unravel_index(present, shape)).T, n_cells[present], shape, place)

    def __len__(self) -> int:
        return len(self.n_cells)

    def find(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the number of the condition of each cell, labels (n, 3)."""
        return self.place[np.ravel_multi_index(tuple(labels.T), self.shape)]


def told_share(latents: Tensor, labels: NDArray[np.integer], shape: tuple[int, int, int], control: int) -> FloatArray:
    r"""Return the share of each perturbation's shift of the latents that is not noise of few cells.

    The shift d is the mean difference of its cells from the control cells of the same donor and time point. With
    :math:`\Sigma` the covariance of latents within conditions, of p directions, and v the sum of squared weights of all
    cells in d, :math:`F = d' \Sigma^{-1} d / (p v)` is 1 without an effect, and the share is :math:`\max(0, 1 - 1/F)`
    (positive-part James-Stein estimator; Efron & Morris 1973, *JASA* 68, 117).

    Parameters
    ----------
    latents, labels
        Of cells, (n, S, L) and (n, 3).
    shape
        Levels of donor, time point and perturbation.
    control
        Code of the control.

    Returns
    -------
    (number of perturbations,); 1 for the control, without control cells in the contexts of a perturbation, and for all
    where cells are too few for a covariance.
    """
    conditions = Conditions.of((labels[index] for index in chunks(len(labels), CHUNK)), shape)
    n, width, share = conditions.n_cells, latents[0].numel(), np.ones(shape[PERTURBATION])
    freedom = len(latents) - len(n)
    if freedom <= width:
        return share
    sums, square = np.zeros((len(n), width)), np.zeros((width, width))
    for index in chunks(len(latents), CHUNK):
        z = latents[index].reshape(len(index), -1).double().numpy()
        present, place = np.unique(conditions.find(labels[index]), return_inverse=True)
        sums[present] += members(place, len(present)) @ z
        square += z.T @ z
    means = sums / n[:, None]
    variance, directions = np.linalg.eigh((square - sums.T @ means) / freedom)
    kept = variance > FLAT * variance[-1]
    means = means @ (directions[:, kept] / np.sqrt(variance[kept]))
    is_control = conditions.labels[:, PERTURBATION] == control
    of_context = {tuple(c): i for i, c in enumerate(conditions.labels[:, :PERTURBATION]) if is_control[i]}
    own: dict[int, list[tuple[int, int]]] = {}
    for i in np.flatnonzero(~is_control):
        *context, level = conditions.labels[i]
        if tuple(context) in of_context:
            own.setdefault(int(level), []).append((int(i), of_context[tuple(context)]))
    for level, pairs in own.items():
        mine, other = np.array(pairs).T
        weight = n[mine] / n[mine].sum()
        shift = weight @ (means[mine] - means[other])
        noise = kept.sum() * np.sum(weight**2 * (1 / n[mine] + 1 / n[other]))
        share[level] = max(0.0, 1.0 - noise / max(float(shift @ shift), 1e-300))
    return share


@torch.no_grad()
def scale_embeddings(dit: DiT, share: FloatArray, control: int) -> None:
    """Move the embeddings of perturbations toward the control's; `share` of the way between them stays."""
    table: Any = dit.class_embeddings["perturbation"].weight
    kept = torch.from_numpy(share).to(table)[:, None]
    table[: len(share)] = torch.lerp(table[control], table[: len(share)], kept)


def fit_to_generated(vae: VAE, dit: DiT, cells: CellData, rows: NDArray[np.int64], seed: int) -> None:
    """Fit the effects of perturbations to generated cells of their training conditions; see `perturbation_effect`.

    Those of donors, time points and the control stay, which many training cells tell better than some generated ones.
    All perturbations of a context share the noise of their generated cells: what these leave to chance cancels in the
    difference from the control.
    """
    assert cells.labels is not None
    labels = cells.labels
    conditions = Conditions.of((labels[rows[index]] for index in chunks(len(rows), CHUNK)), cells.registry.vocabulary)
    observed = np.zeros((cells.registry.vocabulary[PERTURBATION], cells.n_genes))
    library = np.zeros(len(conditions))
    for index in chunks(len(rows), CHUNK):
        part = rows[index]
        counts = cells.counts(part)
        present, place = np.unique(labels[part, PERTURBATION], return_inverse=True)
        observed[present] += members(place, len(present)) @ counts
        np.add.at(library, conditions.find(labels[part]), np.asarray(counts.sum(axis=1)).ravel())
    effects, expected = label_effects(vae), np.zeros_like(observed)
    for of, shares in _generated(vae, dit, cells, conditions, key_seed(seed, 0)):
        donor, timepoint, perturbation = conditions.labels[of].T
        others = np.exp(effects[DONOR][donor] + effects[TIMEPOINT][timepoint])
        np.add.at(expected, perturbation, library[of, None] * shares * others)
    n_cells = np.bincount(conditions.labels[:, PERTURBATION], conditions.n_cells, minlength=len(observed))
    some, new = n_cells > 0, np.zeros_like(observed)
    new[some] = perturbation_effect(observed[some], expected[some], n_cells[some, None])
    before, control = effects[PERTURBATION], cells.registry.control
    if control is not None:
        code = cells.registry.perturbation.levels.index(control)
        shift = before[code] - new[code]
    else:
        shift = n_cells / n_cells.sum() @ (before - new)  # the mean of all cells
    before[some] = new[some] + shift
    write_effects(vae, effects, np.random.default_rng(key_seed(seed, 1)))


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

"""Mean predictions of the baselines: shifts of the control profile, all conditions by one product."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4.metrics.baselines.training import Training
from scldm_cd4.metrics.cells.pseudobulk import Key

RIDGE = 1.0
"""Penalty of the two-way model, in conditions: an effect seen in one condition is halved."""
COMPONENTS = 10
"""Most components on each side of the bilinear model."""
BILINEAR_RIDGE = 0.1
"""Penalty of the bilinear model, relative to the mean squared score of its components."""


def averaged(training: Training, keys: Sequence[Key], same: str) -> np.ndarray:
    """Average training shifts over the conditions that share something with each condition.

    Parameters
    ----------
    training
        Training cells.
    keys
        Conditions to predict.
    same
        ``context``, ``perturbation`` (of other contexts) or ``all``.

    Returns
    -------
    (conditions, genes); NaN where there are none.
    """
    labels = {"context": lambda key: key[:-1], "perturbation": lambda key: key[-1], "all": lambda key: ()}
    group_of = labels[same]
    position: dict[Any, int] = {}
    codes = np.array([position.setdefault(group_of(key), len(position)) for key in training.perturbed_keys], dtype=int)
    sums, sizes = _group_sums(training.shifts, codes, len(position))
    rows = np.array([position.get(group_of(key), len(position)) for key in keys], dtype=np.int64)
    total, n = sums[rows], sizes[rows]
    if same == "perturbation":  # leave out the context itself
        own = {key: row for row, key in enumerate(training.perturbed_keys)}
        for row, key in enumerate(keys):
            if key in own:
                total[row] -= training.shifts[own[key]]
                n[row] -= 1
    return np.divide(total, n[:, None], out=np.full_like(total, np.nan), where=n[:, None] > 0)


def _group_sums(values: np.ndarray, codes: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum rows by group, with one more group that is empty, and count them."""
    shape = (n_groups + 1, len(codes))
    indicator = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=shape)
    return np.asarray(indicator @ values), np.bincount(codes, minlength=n_groups + 1)


def additive(training: Training, keys: Sequence[Key]) -> np.ndarray:
    """Mean shift of the perturbation in the other contexts; for one trained nowhere else the mean of all shifts."""
    shifts = averaged(training, keys, "perturbation")
    missing = np.isnan(shifts).any(axis=1)
    shifts[missing] = averaged(training, keys, "all")[missing]
    return shifts


def shrinkage(training: Training) -> float:
    r"""Factor by which a mean shift of the other contexts predicts that of a context best.

    Least squares over training conditions, each predicted from the other contexts: :math:`\lambda = \sum \langle
    \bar\delta_{-c,p}, \delta_{c,p} \rangle / \sum \|\bar\delta_{-c,p}\|^2`, kept within 0 and 1. 1 where no
    perturbation has training cells in two contexts, since nothing can be learnt.
    """
    if not len(training.perturbed):
        return 1.0
    means = averaged(training, training.perturbed_keys, "perturbation")
    rows = ~np.isnan(means[:, 0])
    power = float(np.square(means[rows]).sum())
    return float(np.clip((means[rows] * training.shifts[rows]).sum() / power, 0.0, 1.0)) if power > 0 else 1.0


def two_way(training: Training, keys: Sequence[Key]) -> np.ndarray:
    r"""Ridge fit of :math:`\delta_{c,p} = m + a_c + b_p` (m is not penalised), all genes at once.

    The block of the perturbations is diagonal, so it is eliminated and a system of contexts + 1 is left.
    """
    if not len(training.perturbed):
        return np.full((len(keys), _genes(training)), np.nan)
    contexts = sorted({key[:-1] for key in training.perturbed_keys})
    labels = sorted({key[-1] for key in training.perturbed_keys})
    context_at = {context: 1 + i for i, context in enumerate(contexts)}
    label_at = {label: i for i, label in enumerate(labels)}
    here = np.array([context_at[key[:-1]] for key in training.perturbed_keys])
    there = np.array([label_at[key[-1]] for key in training.perturbed_keys])
    design = np.zeros((len(here), 1 + len(contexts)))
    design[:, 0] = 1.0
    design[np.arange(len(here)), here] = 1.0
    counts = np.bincount(there) + RIDGE
    cross, sums = (_group_sums(values, there, len(labels))[0][:-1] for values in (design, training.shifts))
    penalty = np.diag([0.0, *[RIDGE] * len(contexts)])
    reduced = design.T @ design + penalty - cross.T @ (cross / counts[:, None])
    right = design.T @ training.shifts - cross.T @ (sums / counts[:, None])
    context_effects = np.linalg.solve(reduced, right)
    label_effects = (sums - cross @ context_effects) / counts[:, None]
    out = np.tile(context_effects[0], (len(keys), 1))
    for row, key in enumerate(keys):
        if key[:-1] in context_at:
            out[row] += context_effects[context_at[key[:-1]]]
        if key[-1] in label_at:
            out[row] += label_effects[label_at[key[-1]]]
    return out


def nearest_context(training: Training, keys: Sequence[Key]) -> np.ndarray:
    """Shift of the perturbation in the other context with the most similar control; NaN where it has none."""
    position = {key: row for row, key in enumerate(training.perturbed_keys)}
    out = np.full((len(keys), _genes(training)), np.nan)
    for row, key in enumerate(keys):
        other = training.nearest(key[:-1], training.contexts.get(key[-1], []))
        if other is not None:
            out[row] = training.shifts[position[*other, key[-1]]]
    return out


def ridge_bilinear(training: Training, keys: Sequence[Key]) -> np.ndarray:
    """Ridge map from a perturbation's mean shift in other contexts to its shift in the context.

    Both sides are reduced to principal components of the perturbations trained in the context and in another one (at
    most 10, at most half of them). NaN where fewer than four perturbations are shared, or the perturbation has no
    other context. After Ahlmann-Eltze, Huber & Anders (Nature Methods 2025), with the embedding of a perturbation
    taken from the other contexts.
    """
    out = np.full((len(keys), _genes(training)), np.nan)
    position = {key: row for row, key in enumerate(training.perturbed_keys)}
    for context in sorted({key[:-1] for key in keys}):
        own = [key for key in position if key[:-1] == context]
        sources = averaged(training, own, "perturbation") if own else np.empty((0, _genes(training)))
        known = np.flatnonzero(~np.isnan(sources).any(axis=1))
        rows = [row for row, key in enumerate(keys) if key[:-1] == context]
        asked = averaged(training, [keys[row] for row in rows], "perturbation")
        if len(known) >= 4:
            out[rows] = _bilinear(sources[known], training.shifts[[position[own[i]] for i in known]], asked)
    return out


def _bilinear(source: np.ndarray, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
    n_components = min(COMPONENTS, len(source) // 2)
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    source_axes = np.linalg.svd(source - source_mean, full_matrices=False)[2][:n_components]
    target_axes = np.linalg.svd(target - target_mean, full_matrices=False)[2][:n_components]
    x, y = (source - source_mean) @ source_axes.T, (target - target_mean) @ target_axes.T
    gram = x.T @ x
    penalty = BILINEAR_RIDGE * np.trace(gram) / n_components
    weights = np.linalg.solve(gram + max(penalty, 1e-12) * np.eye(n_components), x.T @ y)
    return np.asarray(target_mean + (asked - source_mean) @ source_axes.T @ weights @ target_axes)


def _genes(training: Training) -> int:
    return len(training.sample.genes)

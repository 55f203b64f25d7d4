"""Fréchet distance between two populations taken as normal distributions."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4.metrics.distribution.pairwise import pair

CONDITIONS = 256
"""Conditions whose covariances are decomposed together."""


@dataclass(frozen=True)
class Gaussians:
    """Means and covariances of conditions.

    Attributes
    ----------
    mean
        (conditions, features).
    covariance
        With divisor n - 1, (conditions, features, features); NaN with fewer than two cells.
    """

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(real: Any, pred: Any, *, rooted: bool = False) -> float:
    r"""Fréchet distance: W2 between the normal distributions with the same means and covariances.

    :math:`\|\mu-\hat\mu\|^2 + \mathrm{tr}(\Sigma + \hat\Sigma - 2(\Sigma^{1/2}\hat\Sigma\Sigma^{1/2})^{1/2})`, not
    rooted by default (Dowson & Landau, J. Multivar. Anal. 1982; Heusel et al., NeurIPS 2017). Best value 0, no upper
    bound. Two samples of one distribution have a value of about tr(Sigma) d / n (30 of a variance of 352 at n = 100
    and d = 30): compare at equal n and beside that floor.

    Parameters
    ----------
    real, pred
        Cells x features, in few principal components.
    rooted
        Give the root, in units of the features.

    Returns
    -------
    The distance, in squared units of the features; NaN with fewer than two cells on a side. Warns with fewer cells
    than twice the features, where the covariances are mostly noise.

    Raises
    ------
    DataError
        If the features differ.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> bool(metrics.frechet_distance(rng.normal(0, 1, (200, 2)), rng.normal(3, 1, (200, 2))) > 10)
    True
    """
    a, b = pair(real, pred)
    n, d = min(len(a), len(b)), a.shape[1]
    if 2 <= n < 2 * d:
        warnings.warn(
            f"Fréchet distance of {n} cells in {d} dimensions is mostly sampling noise; use at least {2 * d} cells "
            "or fewer components",
            stacklevel=2,
        )
    value = float(frechet_of(gaussians([a]), gaussians([b]))[0])
    return float(np.sqrt(max(value, 0.0))) if rooted and value == value else value


def gaussians(cells: Sequence[np.ndarray]) -> Gaussians:
    """Mean and covariance of every condition.

    Parameters
    ----------
    cells
        One array per condition, cells x features.

    Returns
    -------
    The moments.
    """
    width = cells[0].shape[1] if cells else 0
    means = np.full((len(cells), width), np.nan)
    covariances = np.full((len(cells), width, width), np.nan)
    for i, x in enumerate(cells):
        if len(x) > 1:
            means[i] = x.mean(axis=0)
            centred = x - means[i]
            covariances[i] = centred.T @ centred / (len(x) - 1)
    return Gaussians(means, covariances)


def frechet_of(real: Gaussians, pred: Gaussians) -> np.ndarray:
    """Fréchet distances of all conditions at once, (conditions,); NaN where a moment is."""
    parts = [slice(start, start + CONDITIONS) for start in range(0, len(real.mean), CONDITIONS)]
    return np.concatenate([_frechet_of(real, pred, part) for part in parts]) if parts else np.empty(0)


def _frechet_of(real: Gaussians, pred: Gaussians, part: slice) -> np.ndarray:
    means, covariances = (real.mean[part], pred.mean[part]), (real.covariance[part], pred.covariance[part])
    ok = np.isfinite(covariances[0]).all(axis=(1, 2)) & np.isfinite(covariances[1]).all(axis=(1, 2))
    out = np.full(len(ok), np.nan)
    if not ok.any():
        return out
    first, second = (covariance[ok] for covariance in covariances)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]) @ vectors.swapaxes(1, 2)
    # symmetric by construction, so the eigenvalues are real
    inner = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0.0)).sum(axis=1)
    traces = np.trace(first, axis1=1, axis2=2) + np.trace(second, axis1=1, axis2=2)
    shift = np.square(means[0][ok] - means[1][ok]).sum(axis=1)
    out[ok] = np.maximum(shift + traces - 2.0 * inner, 0.0)
    return out

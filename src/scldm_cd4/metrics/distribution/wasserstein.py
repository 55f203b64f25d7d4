"""Wasserstein distances: exact, sliced, and the Sinkhorn divergence."""

import warnings
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.distribution.pairwise import pair, subset

COST_LIMIT = 1 << 25
"""Entries of the largest cost matrix: 256 MB of float64."""
TOLERANCE = 1e-6
"""Mean relative error of the marginals at which Sinkhorn's iterations end."""
METHODS = ("exact", "sinkhorn", "sliced")


def wasserstein(
    real: Any,
    pred: Any,
    *,
    p: int = 2,
    method: str = "exact",
    regularisation: float = 0.05,
    n_projections: int = 200,
    max_iterations: int = 5000,
    max_cells: int | None = None,
    seed: int = 0,
) -> float:
    r"""Wasserstein distance of order 1 or 2 with equal weights, rooted.

    :math:`W_p = (\min_\pi \sum_{ij} \pi_{ij} \|x_i - y_j\|^p)^{1/p}`. Best value 0, no upper bound. The value between
    two samples of one distribution is far from 0 and falls slowly with n: print that floor at the same n beside it.

    - ``"exact"``: network simplex (POT).
    - ``"sinkhorn"``: the debiased Sinkhorn divergence :math:`S_\varepsilon = OT_\varepsilon(x,y) -
      OT_\varepsilon(x,x)/2 - OT_\varepsilon(y,y)/2` (Feydy et al., AISTATS 2019) with the entropy included and
      :math:`\varepsilon` *relative* to the median cost; a fixed :math:`\varepsilon` underflows on costs of another
      scale. 0 for a copy; below the exact value.
    - ``"sliced"``: the root of the mean over random directions (Bonneel et al., J. Math. Imaging Vis. 2015), smaller
      than the exact value by about the root of the number of features.

    Parameters
    ----------
    real, pred
        Cells x features.
    p
        1 or 2.
    method
        ``"exact"``, ``"sinkhorn"`` or ``"sliced"``.
    regularisation
        Epsilon over the median cost between the two sides, for ``"sinkhorn"``.
    n_projections
        Directions of ``"sliced"``.
    max_iterations
        Limit of ``"sinkhorn"``.
    max_cells
        Cells drawn of each side; all with None.
    seed
        Seed of the draw and of the directions.

    Returns
    -------
    The distance, in units of the features; NaN if either side is empty. NaN with a warning if the method did not
    converge.

    Raises
    ------
    DataError
        If an option is unknown, the features differ, or the cost matrix would exceed 256 MB.

    Examples
    --------
    >>> round(metrics.wasserstein(np.zeros((4, 1)), np.full((4, 1), 3.0)), 6)
    3.0
    """
    if method not in METHODS or p not in (1, 2):
        raise DataError(f"method={method!r} with p={p} is not known; use one of {METHODS} with p=1 or p=2")
    a, b = pair(real, pred)
    a, b = subset(a, max_cells, seed, 0), subset(b, max_cells, seed, 1)
    if not (len(a) and len(b)):
        return float("nan")
    if method == "sliced":
        from ot import sliced_wasserstein_distance

        return float(sliced_wasserstein_distance(a, b, n_projections=n_projections, p=p, seed=seed))
    if max(len(a), len(b)) ** 2 > COST_LIMIT and (method == "sinkhorn" or len(a) * len(b) > COST_LIMIT):
        raise DataError(
            f"{len(a)} x {len(b)} cells need a cost matrix above 256 MB; draw cells with max_cells=2000, or use "
            "method='sliced'"
        )
    value = _exact(a, b, p) if method == "exact" else _sinkhorn(a, b, p, regularisation, max_iterations)
    return float(max(value, 0.0) ** (1.0 / p)) if np.isfinite(value) else float("nan")


def _cost(a: np.ndarray, b: np.ndarray, p: int) -> np.ndarray:
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(a, b, "euclidean" if p == 1 else "sqeuclidean"))


def _exact(a: np.ndarray, b: np.ndarray, p: int) -> float:
    from ot import emd2, unif

    value, log = emd2(unif(len(a)), unif(len(b)), _cost(a, b, p), numItermax=1_000_000, log=True)
    if log["warning"] is not None:
        warnings.warn(f"exact transport did not converge: {log['warning']}", stacklevel=3)
        return float("nan")
    return float(value)


def _sinkhorn(a: np.ndarray, b: np.ndarray, p: int, regularisation: float, max_iterations: int) -> float:
    cost = _cost(a, b, p)
    epsilon = regularisation * float(np.median(cost))
    if epsilon <= 0:  # more than half of the pairs are equal cells, which says nothing about the scale
        return 0.0 if not cost.any() else float("nan")
    between = _regularised(cost, epsilon, max_iterations)
    own = [_regularised_self(_cost(x, x, p), epsilon, max_iterations) for x in (a, b)]
    return between - 0.5 * sum(own)


def _regularised(cost: np.ndarray, epsilon: float, max_iterations: int) -> float:
    r"""Give :math:`\min_\pi \langle\pi, C\rangle + \varepsilon KL(\pi | a \otimes b)` with equal weights.

    Sinkhorn's iterations on scalings that are taken over into the potentials before they overflow (Schmitzer, SIAM J.
    Sci. Comput. 2019): as stable as the logarithmic form, at the price of matrix-vector products.
    """
    n, m = cost.shape
    f = cost.min(axis=1)
    g = (cost - f[:, None]).min(axis=0)
    kernel, u, v = _gibbs(cost, f, g, epsilon), np.ones(n), np.ones(m)
    error = np.inf
    for step in range(max_iterations):
        u = 1.0 / (kernel @ v / m)
        column = u @ kernel / n
        if step % 10 == 9:
            error = float(np.abs(v * column - 1.0).mean())
            if error < TOLERANCE:
                break
        v = 1.0 / column
        if max(np.abs(np.log(u)).max(), np.abs(np.log(v)).max()) > 50.0:
            f, g = f + epsilon * np.log(u), g + epsilon * np.log(v)
            kernel, u, v = _gibbs(cost, f, g, epsilon), np.ones(n), np.ones(m)
    if not error < TOLERANCE:
        return _not_converged(max_iterations, error)
    # at the optimum the dual has the value of the primal
    return float((f + epsilon * np.log(u)).mean() + (g + epsilon * np.log(v)).mean())


def _regularised_self(cost: np.ndarray, epsilon: float, max_iterations: int) -> float:
    """Give the same for a population and itself, where both potentials are equal.

    Averaging each step with the last converges within few iterations (Feydy et al. 2019); the plain steps take
    thousands. The zero diagonal keeps the kernel from underflow.
    """
    kernel = np.exp(-cost / epsilon)
    u, error = np.ones(len(cost)), np.inf
    for _ in range(max_iterations):
        row = kernel @ u / len(cost)
        error = float(np.abs(u * row - 1.0).mean())
        if error < TOLERANCE:
            return 2.0 * epsilon * float(np.log(u).mean())
        u = np.sqrt(u / row)
    return _not_converged(max_iterations, error)


def _not_converged(max_iterations: int, error: float) -> float:
    warnings.warn(
        f"Sinkhorn did not converge in {max_iterations} iterations (error {error:.1e}); raise max_iterations or "
        "regularisation, or use method='exact'",
        stacklevel=5,
    )
    return float("nan")


def _gibbs(cost: np.ndarray, f: np.ndarray, g: np.ndarray, epsilon: float) -> np.ndarray:
    kernel = f[:, None] + g - cost
    kernel /= epsilon
    return np.asarray(np.exp(kernel, out=kernel))

"""How well expected counts describe cells that were held out."""

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics._delta import safe_pearson
from scldm_cd4.metrics._pseudobulk import as_matrix, dense

CHUNK = 1024


def nb_error(counts: Any, mean: Any, dispersion: Any, *, eps: float = 1e-8) -> float:
    r"""Negative binomial reconstruction error, in nats per cell.

    :math:`-\frac1n \sum_c \sum_g \log NB(x_{cg}; \mu_{cg}, \theta_{cg})` with mean :math:`\mu` and inverse dispersion
    :math:`\theta` (variance :math:`\mu + \mu^2/\theta`), parameters as in scVI (Lopez et al., Nat. Methods 2018).
    Lower is better; values grow with the number of genes. Print it beside :func:`intercept_nb` of the same cells.

    Parameters
    ----------
    counts
        AnnData or matrix of counts, cells x genes.
    mean
        Expected counts at the cells' own library sizes, cells x genes.
    dispersion
        Theta, (genes,) or cells x genes.
    eps
        Added inside logarithms.

    Returns
    -------
    Sum over genes, mean over cells.

    Raises
    ------
    DataError
        If the shapes differ or there are no cells.
    """
    from scipy.special import gammaln

    x, mu = as_matrix(counts), as_matrix(mean)
    if x.shape != mu.shape or not x.shape[0]:
        raise DataError(
            f"counts {x.shape} and expected counts {mu.shape} must have the same shape and at least one cell"
        )
    theta_all = np.asarray(dispersion, dtype=np.float64)
    total = 0.0
    for start in range(0, x.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        k, m = dense(x[rows]), dense(mu[rows])
        theta = theta_all[rows] if theta_all.ndim == 2 else theta_all
        log_sum = np.log(theta + m + eps)
        value = theta * (np.log(theta + eps) - log_sum) + k * (np.log(m + eps) - log_sum)
        total += float((value + gammaln(k + theta) - gammaln(theta) - gammaln(k + 1)).sum())
    return -total / x.shape[0]


def intercept_nb(counts: Any, *, n_steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Fit a negative binomial per gene that knows only the library size: the floor of any reconstruction.

    The mean is the gene's share of all counts times the cell's total; theta is the maximum-likelihood value in [1e-3,
    1e4], found by golden-section search on its logarithm for all genes at once.

    Parameters
    ----------
    counts
        AnnData or matrix of training counts, cells x genes.
    n_steps
        Steps of the search.

    Returns
    -------
    Share of every gene and its theta, both (genes,). Expected counts are ``library[:, None] * share``.
    """
    x = sp.csc_matrix(as_matrix(counts), dtype=np.float64)
    library = np.asarray(x.sum(axis=1)).ravel()
    share = np.asarray(x.sum(axis=0)).ravel() / max(library.sum(), 1.0)
    gene = np.repeat(np.arange(x.shape[1]), np.diff(x.indptr))
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    low, high = np.full(x.shape[1], np.log(1e-3)), np.full(x.shape[1], np.log(1e4))
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    f_left, f_right = (_profile_likelihood(x, gene, library, share, np.exp(t)) for t in (left, right))
    for _ in range(n_steps):
        go_left = f_left > f_right
        high, low = np.where(go_left, right, high), np.where(go_left, low, left)
        probe = np.where(go_left, high - ratio * (high - low), low + ratio * (high - low))
        value = _profile_likelihood(x, gene, library, share, np.exp(probe))
        left, right = np.where(go_left, probe, right), np.where(go_left, left, probe)
        f_left, f_right = np.where(go_left, value, f_right), np.where(go_left, f_left, value)
    return share, np.exp((low + high) / 2.0)


def _profile_likelihood(
    x: sp.csc_matrix, gene: np.ndarray, library: np.ndarray, share: np.ndarray, theta: np.ndarray
) -> np.ndarray:
    """Log-likelihood per gene up to terms without theta; gamma functions only at the non-zero counts."""
    from scipy.special import gammaln

    mu = library[x.indices] * share[gene]
    at = theta[gene]
    terms = gammaln(x.data + at) - gammaln(at) - x.data * np.log(at + mu)
    result = np.bincount(gene, weights=terms, minlength=x.shape[1])
    for start in range(0, len(library), CHUNK):
        result -= theta * np.log1p(library[start : start + CHUNK, None] * share / theta).sum(axis=0)
    return result


def pcc(real: Any, pred: Any, *, axis: Literal["gene", "cell"] = "gene") -> float:
    """Mean Pearson correlation of real and reconstructed values.

    Range -1 to 1, best 1, chance 0 along cells (``"gene"``); along genes (``"cell"``) the mean profile alone scores
    high.

    Parameters
    ----------
    real, pred
        Log-normalised values, cells x genes; the whole split at once.
    axis
        ``"gene"``: one correlation per gene across cells. ``"cell"``: one per cell across genes.

    Returns
    -------
    Mean over genes or cells; constant ones are undefined and left out. NaN if none is left.

    Raises
    ------
    DataError
        If the shapes differ or ``axis`` is unknown.
    """
    x, y = _same_shape(real, pred)
    if axis not in ("gene", "cell"):
        raise DataError(f"axis={axis!r} is not known; use 'gene' or 'cell'")
    pairs = zip(x.T, y.T, strict=True) if axis == "gene" else zip(x, y, strict=True)
    values = np.array([safe_pearson(a, b) for a, b in pairs])
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def mse(real: Any, pred: Any) -> float:
    """Mean squared error over cells and genes of log-normalised values; best 0.

    Parameters
    ----------
    real, pred
        Log-normalised values, cells x genes.

    Returns
    -------
    The error.

    Raises
    ------
    DataError
        If the shapes differ.
    """
    x, y = _same_shape(real, pred)
    return float(np.square(x - y).mean())


def _same_shape(real: Any, pred: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = dense(as_matrix(real)), dense(as_matrix(pred))
    if x.shape != y.shape:
        raise DataError(f"real values {x.shape} and predicted values {y.shape} must have the same shape")
    return x, y

"""How well expected counts describe cells that were held out."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.genes import aligned
from scldm_cd4.metrics.cells.pseudobulk import as_matrix, dense, log_normalize

CHUNK = 1024


def nb_error(counts: Any, mean: Any, dispersion: Any, *, per_gene: bool = False, eps: float = 1e-8) -> float:
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
    per_gene
        Divide by the number of genes, for nats per entry.
    eps
        Added inside logarithms.

    Returns
    -------
    Sum over genes (their mean with ``per_gene``), mean over cells.

    Raises
    ------
    DataError
        If the shapes differ or there are no cells.

    Examples
    --------
    >>> round(metrics.nb_error(np.array([[0.0]]), np.array([[1.0]]), np.array([1.0])), 3)  # log 2
    0.693
    """
    from scipy.special import gammaln

    x, mu = aligned(counts, mean)
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
    return -total / x.shape[0] / (x.shape[1] if per_gene else 1)


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

    Examples
    --------
    >>> share, theta = metrics.intercept_nb(real.X)
    >>> bool(np.isclose(share.sum(), 1.0))
    True
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

    Examples
    --------
    >>> round(metrics.pcc(np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [4.0], [6.0]])), 6)
    1.0
    """
    x, y = _same_shape(real, pred)
    if axis not in ("gene", "cell"):
        raise DataError(f"axis={axis!r} is not known; use 'gene' or 'cell'")
    if axis == "gene":
        x, y = (sp.csr_matrix(side.T) if sp.issparse(side) else side.T for side in (x, y))
    pieces = [_row_correlations(dense(x[rows]), dense(y[rows])) for rows in _pieces(x)]
    values = np.concatenate(pieces) if pieces else np.empty(0)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _row_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of every row; NaN where either is constant up to rounding."""
    if x.shape[1] < 2:
        return np.full(len(x), np.nan)
    centred = []
    for side in (x, y):
        values = side - side.mean(axis=1, keepdims=True)
        constant = np.abs(values).max(axis=1) <= 1e-12 * np.abs(side).max(axis=1)
        values[constant] = 0.0
        centred.append(values)
    a, b = centred
    norm = np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    product = np.einsum("ij,ij->i", a, b)
    return np.clip(np.divide(product, norm, out=np.full(len(x), np.nan), where=norm > 0), -1.0, 1.0)


def mse(real: Any, pred: Any) -> float:
    """Mean squared error over cells and genes of log-normalised values; best 0.

    Parameters
    ----------
    real, pred
        Log-normalised values, cells x genes.

    Returns
    -------
    The error; NaN without entries.

    Raises
    ------
    DataError
        If the shapes differ.

    Examples
    --------
    >>> metrics.mse(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))
    2.0
    """
    x, y = _same_shape(real, pred)
    total = sum(float(np.square(dense(x[rows]) - dense(y[rows])).sum()) for rows in _pieces(x))
    return total / (x.shape[0] * x.shape[1]) if x.shape[0] * x.shape[1] else float("nan")


def zeros_accuracy(real: Any, pred: Any) -> float:
    """Share of entries that are zero on both sides or on neither; range 0 to 1, best 1.

    A diagnostic: predicting no counts at all scores the share of zeros, often 0.9.

    Parameters
    ----------
    real, pred
        Counts or log-normalised values, cells x genes.

    Returns
    -------
    The share; NaN without entries.

    Raises
    ------
    DataError
        If the shapes differ.

    Examples
    --------
    >>> metrics.zeros_accuracy(np.array([[0.0, 1.0]]), np.array([[0.0, 0.0]]))
    0.5
    """
    x, y = _same_shape(real, pred)
    equal = sum(int(((dense(x[rows]) == 0) == (dense(y[rows]) == 0)).sum()) for rows in _pieces(x))
    return equal / (x.shape[0] * x.shape[1]) if x.shape[0] * x.shape[1] else float("nan")


def sample_counts(mean: Any, dispersion: Any, *, seed: int) -> sp.csr_matrix:
    """Draw one negative binomial count per entry, as a mixture of Poisson over gamma.

    Parameters
    ----------
    mean
        Expected counts, cells x genes.
    dispersion
        Theta, (genes,) or cells x genes.
    seed
        Seed of the draw.

    Returns
    -------
    Counts, CSR, cells x genes.

    Raises
    ------
    DataError
        If an expected count is negative or not finite, or a theta not positive.

    Examples
    --------
    >>> counts = metrics.sample_counts(np.full((3, 2), 5.0), np.array([1.0, 10.0]), seed=0)
    >>> counts.shape
    (3, 2)
    """
    matrix, theta = as_matrix(mean), np.asarray(dispersion, dtype=np.float64)
    if not (theta > 0).all():
        raise DataError("every dispersion (theta) must be positive")
    rng, drawn = np.random.default_rng(seed), []
    for start in range(0, matrix.shape[0], CHUNK):
        mu = dense(matrix[start : start + CHUNK])
        if not (np.isfinite(mu).all() and (mu >= 0).all()):
            raise DataError("expected counts must be finite and not negative")
        shape = np.broadcast_to(theta[start : start + CHUNK] if theta.ndim == 2 else theta, mu.shape)
        drawn.append(sp.csr_matrix(rng.poisson(rng.gamma(shape, mu / shape)).astype(np.float64)))
    return sp.vstack(drawn, format="csr") if drawn else sp.csr_matrix(matrix.shape, dtype=np.float64)


def reconstruction(
    counts: Any,
    mean: Any,
    dispersion: Any,
    *,
    use: Literal["mean", "sample"] = "mean",
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """All reconstruction metrics of held-out cells.

    The convention of scldm is ``use="sample"`` with the batch size of its evaluation: one draw per cell instead of the
    expected counts, and correlations per gene within a batch, averaged over batches. Both lower the correlation, and
    the second makes it depend on the batch size.

    Parameters
    ----------
    counts
        AnnData or matrix of counts, cells x genes.
    mean
        Expected counts at the cells' own library sizes, cells x genes.
    dispersion
        Theta, (genes,) or cells x genes.
    use
        Compare with the expected counts or with one draw from them.
    batch_size
        Cells per batch, in their order; all at once with None.
    seed
        Seed of the draw.

    Returns
    -------
    ``nb_error`` (nats per cell), and of log-normalised values, each side by its own totals, ``pcc`` (per gene),
    ``pcc_cell`` and ``mse``; ``zeros_accuracy`` of counts, which needs draws: NaN for expected counts.

    Raises
    ------
    DataError
        If the shapes differ, or an option is unknown.

    Examples
    --------
    >>> mean = model.get_normalized_expression(real, library_size="latent", return_numpy=True)
    >>> sorted(metrics.reconstruction(real.X, mean, np.ones(real.n_vars)))[:2]
    ['mse', 'nb_error']
    """
    if use not in ("mean", "sample"):
        raise DataError(f"use={use!r} is not known; use 'mean' or 'sample'")
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size={batch_size} must be at least 1")
    x, expected = aligned(counts, mean)
    error = nb_error(x, expected, dispersion)
    guess = sample_counts(expected, dispersion, seed=seed) if use == "sample" else expected
    real, pred = log_normalize(x), log_normalize(guess)
    step = batch_size or x.shape[0]
    batches = [slice(start, start + step) for start in range(0, x.shape[0], step)]
    by_gene = np.array([pcc(real[rows], pred[rows]) for rows in batches])
    return {
        "nb_error": error,
        "pcc": float(np.nanmean(by_gene)) if not np.isnan(by_gene).all() else float("nan"),
        "pcc_cell": pcc(real, pred, axis="cell"),
        "mse": mse(real, pred),
        "zeros_accuracy": zeros_accuracy(x, guess) if use == "sample" else float("nan"),
    }


def _same_shape(real: Any, pred: Any) -> tuple[Any, Any]:
    x, y = aligned(real, pred)
    if x.shape != y.shape:
        raise DataError(f"real values {x.shape} and predicted values {y.shape} must have the same shape")
    return x, y


def _pieces(matrix: Any) -> Iterator[slice]:
    """Give slices of rows whose dense form has 16 MB."""
    step = max(1, (1 << 21) // max(matrix.shape[1], 1))
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))

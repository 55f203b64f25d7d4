"""Agreement of mean shifts relative to the control."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import as_matrix, excluded_mask, group_means
from scldm_cd4.metrics.effects.rows import cosine_rows, pearson_rows, shift, spearman_rows


def safe_pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; NaN where either vector is constant or shorter than two.

    Parameters
    ----------
    x, y
        Vectors of equal length.

    Returns
    -------
    The correlation, -1 to 1.

    Examples
    --------
    >>> round(metrics.safe_pearson(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])), 6)
    -1.0
    """
    a, b = np.atleast_2d(np.asarray(x, dtype=np.float64)), np.atleast_2d(np.asarray(y, dtype=np.float64))
    return float(pearson_rows(a, b)[0])


def chance_level(n_perturbed: Any, n_control: Any, n_predicted: Any = None) -> Any:
    r"""Pearson-delta of no signal at all when both deltas share one control.

    Both deltas share the noise of the control mean: :math:`\frac{1/n_c}{\sqrt{(1/n_r + 1/n_c)(1/n_p + 1/n_c)}}`, which
    is :math:`n / (n + n_c)` for equal :math:`n_r = n_p = n`. With many more controls than perturbed cells it is near 0.

    Parameters
    ----------
    n_perturbed
        Real cells of the perturbation; a number or an array.
    n_control
        Cells of the shared control.
    n_predicted
        Predicted cells; as many as real ones by default.

    Returns
    -------
    The expected correlation, 0 to 1.

    Examples
    --------
    >>> float(metrics.chance_level(100, 300))
    0.25
    """
    real, pred = (n_control / n + 1.0 for n in (n_perturbed, n_perturbed if n_predicted is None else n_predicted))
    return 1.0 / np.sqrt(real * pred)


def context_delta(
    values: Any, control: Any, contexts: np.ndarray | None = None, control_contexts: np.ndarray | None = None
) -> np.ndarray:
    """Mean shift against the control of the same context, averaged over contexts with the cells as weights.

    Parameters
    ----------
    values
        Normalised values of the perturbed cells, cells x genes.
    control
        Normalised values of real control cells.
    contexts, control_contexts
        Context of each cell; both or neither.

    Returns
    -------
    Shift of every gene, (genes,).

    Raises
    ------
    DataError
        If a context has perturbed but no control cells, or there are no perturbed cells.

    Examples
    --------
    >>> metrics.context_delta(np.array([[2.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 3.0]])).tolist()
    [1.0, -1.0]
    """
    x, c = as_matrix(values), as_matrix(control)
    if x.shape[0] == 0:
        raise DataError("no perturbed cells to average")
    if (contexts is None) != (control_contexts is None):
        raise DataError("give the contexts of the perturbed and of the control cells, or of neither")
    here = np.zeros(x.shape[0]) if contexts is None else np.asarray(contexts)
    there = np.zeros(c.shape[0]) if control_contexts is None else np.asarray(control_contexts)
    levels, codes = np.unique(here, return_inverse=True)
    lookup = {level: i for i, level in enumerate(levels)}
    control_codes = np.array([lookup.get(level, -1) for level in there], dtype=np.int64)
    control_means, control_sizes = group_means(c, control_codes, len(levels))
    if (control_sizes == 0).any():
        raise DataError(f"no control cells in context {levels[control_sizes == 0].tolist()}; drop it or add controls")
    means, sizes = group_means(x, codes, len(levels))
    return (sizes / sizes.sum()) @ shift(means, control_means)


Contexts = tuple[np.ndarray, np.ndarray, np.ndarray]


def _deltas(
    real: Any, pred: Any, control: Any, contexts: Contexts | None, exclude: Sequence[int] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Real and predicted mean shift over the genes that count, each (1, genes)."""
    real_contexts, pred_contexts, control_contexts = contexts or (None, None, None)
    truth = context_delta(real, control, real_contexts, control_contexts)
    guess = context_delta(pred, control, pred_contexts, control_contexts)
    keep = excluded_mask(truth.size, exclude)
    return truth[None, keep], guess[None, keep]


def pearson_delta(
    real: Any,
    pred: Any,
    control: Any,
    *,
    contexts: Contexts | None = None,
    exclude: Sequence[int] | np.ndarray | None = None,
) -> float:
    r"""Pearson correlation of real and predicted mean shifts over genes.

    :math:`r(\bar x_{real} - \bar x_{ctrl},\ \bar x_{pred} - \bar x_{ctrl})` with the same real control on both sides,
    shifts taken within context and averaged over contexts with the cells as weights. Range -1 to 1, best 1. The
    chance level is not 0 but :func:`chance_level`, since both shifts share the noise of the control mean. Definition
    as in STATE's evaluation (cell-eval, ``pearson_delta``) with the real control on both sides (cell-eval2). For many
    conditions, other references and disjoint controls see :func:`effect_table`.

    Parameters
    ----------
    real, pred, control
        Log-normalised values, cells x genes, with the same genes.
    contexts
        Context of each cell of ``real``, ``pred`` and ``control``.
    exclude
        Positions of genes to leave out; give the perturbation's own target, which alone can carry the correlation.

    Returns
    -------
    The correlation; NaN if a shift is constant (a prediction without any change).

    Raises
    ------
    DataError
        If a context lacks control cells.

    Examples
    --------
    >>> control = np.zeros((2, 3))
    >>> round(metrics.pearson_delta(np.array([[1.0, 0.0, -1.0]]), np.array([[2.0, 0.0, -2.0]]), control), 6)
    1.0
    """
    return float(pearson_rows(*_deltas(real, pred, control, contexts, exclude))[0])


def spearman_delta(
    real: Any,
    pred: Any,
    control: Any,
    *,
    contexts: Contexts | None = None,
    exclude: Sequence[int] | np.ndarray | None = None,
) -> float:
    """Spearman correlation of real and predicted mean shifts over genes.

    The correlation of the shifts' mid-ranks; parameters, errors and chance level as for :func:`pearson_delta`. Range -1
    to 1, best 1. It weighs the many genes with small shifts as much as the few with large ones. Source: cz-benchmarks.

    Parameters
    ----------
    real, pred, control, contexts, exclude
        As for `scldm_cd4.metrics.pearson_delta`.

    Returns
    -------
    The correlation; NaN if a shift is constant.

    Examples
    --------
    >>> control = np.zeros((2, 3))
    >>> round(metrics.spearman_delta(np.array([[1.0, 0.0, -1.0]]), np.array([[9.0, 0.0, -1.0]]), control), 6)
    1.0
    """
    return float(spearman_rows(*_deltas(real, pred, control, contexts, exclude))[0])


def cosine_delta(
    real: Any,
    pred: Any,
    control: Any,
    *,
    contexts: Contexts | None = None,
    exclude: Sequence[int] | np.ndarray | None = None,
) -> float:
    r"""Cosine of real and predicted mean shifts over genes.

    Unlike the correlation it counts a shift that all genes have in common. Parameters, errors and chance level as for
    :func:`pearson_delta`. Range -1 to 1, best 1. Source: perturbench.

    Parameters
    ----------
    real, pred, control, contexts, exclude
        As for `scldm_cd4.metrics.pearson_delta`.

    Returns
    -------
    The cosine; NaN if a shift is zero.

    Examples
    --------
    >>> control = np.zeros((2, 3))
    >>> metrics.cosine_delta(np.array([[1.0, 0.0, 0.0]]), np.array([[2.0, 0.0, 0.0]]), control)
    1.0
    """
    return float(cosine_rows(*_deltas(real, pred, control, contexts, exclude))[0])


def l2_delta(
    real: Any,
    pred: Any,
    control: Any,
    *,
    contexts: Contexts | None = None,
    exclude: Sequence[int] | np.ndarray | None = None,
) -> float:
    r"""Euclidean distance of real and predicted mean shifts.

    Parameters and errors as for :func:`pearson_delta`. Range 0 upwards, best 0; a prediction of no change has
    :math:`\|\delta\|`. It grows with genes and with sampling noise: compare it with a repeat of the
    experiment at the same number of cells. Source: Dibaeinia et al. 2026 (L2-delta).

    Parameters
    ----------
    real, pred, control, contexts, exclude
        As for `scldm_cd4.metrics.pearson_delta`.

    Returns
    -------
    The distance.

    Examples
    --------
    >>> control = np.zeros((2, 2))
    >>> metrics.l2_delta(np.array([[3.0, 4.0]]), np.array([[0.0, 0.0]]), control)
    5.0
    """
    truth, guess = _deltas(real, pred, control, contexts, exclude)
    return float(np.linalg.norm(truth - guess))

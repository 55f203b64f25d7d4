"""Effect metrics of many conditions at once, from their pseudobulks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import Key, Pseudobulks, as_matrix, pseudobulks
from scldm_cd4.metrics.effects.delta import chance_level
from scldm_cd4.metrics.effects.rows import centred_rows, cosine_rows, pearson_rows, shift, spearman_rows
from scldm_cd4.metrics.effects.weights import RestScores, effect_weights, top_genes, welch_scores

Space = Literal["mean_log", "log_sum"]
TOP = (20, 50, 100)
ROWS = 128
"""Conditions that are compared at a time; bounds the memory."""


@dataclass(frozen=True)
class Matched:
    """Rows of the same conditions on both sides and of their controls.

    Attributes
    ----------
    keys
        The conditions, (K,).
    real, pred, control
        Rows in the real, the predicted and the real pseudobulks; ``pred`` is -1 where a condition was not predicted.
    """

    keys: tuple[Key, ...]
    real: np.ndarray
    pred: np.ndarray
    control: np.ndarray


def match(real: Pseudobulks, pred: Pseudobulks, control: str, *, allow_missing: bool = False) -> Matched:
    """Find the rows of every real perturbed condition and of the control of its context.

    Raises
    ------
    DataError
        If a context has no real control, or (unless ``allow_missing``) a condition is on one side only, or the genes
        differ in number.
    """
    if real.means.shape[1] != pred.means.shape[1]:
        raise DataError(f"{real.means.shape[1]} real and {pred.means.shape[1]} predicted genes; align them by name")
    keys = real.conditions(control)
    controls = real.rows([(*key[:-1], control) for key in keys])
    if (controls < 0).any():
        contexts = sorted({key[:-1] for key, row in zip(keys, controls, strict=True) if row < 0})
        raise DataError(f"no real control cells ({control!r}) in context {contexts}; add them or drop the context")
    rows, extra = pred.rows(keys), set(pred.conditions(control)) - set(keys)
    absent = [key for key, row in zip(keys, rows, strict=True) if row < 0]
    if (absent or extra) and not allow_missing:
        raise DataError(
            f"{len(absent)} real conditions were not predicted {absent[:3]}, {len(extra)} predicted ones have no real "
            f"cells {sorted(extra)[:3]}; drop them or pass allow_missing=True"
        )
    return Matched(keys, real.rows(keys), rows, controls)


def effect_table(
    real: Pseudobulks,
    pred: Pseudobulks,
    *,
    control: str,
    exclude: np.ndarray | None = None,
    train: Pseudobulks | None = None,
    halves: tuple[Pseudobulks, Pseudobulks] | None = None,
    scores: np.ndarray | None = None,
    space: Space = "mean_log",
    control_source: Literal["real", "pred"] = "real",
    budget: bool = False,
    top: Sequence[int] = TOP,
    allow_missing: bool = False,
) -> dict[str, np.ndarray]:
    r"""All effect metrics of all conditions, against the control of each context.

    With :math:`\delta = \bar x - \bar x_{ctrl}` on both sides, by default against the same real control:

    ============================ ============================================================ ===============
    name                         value                                                        best, no effect
    ============================ ============================================================ ===============
    ``pearson_delta``            correlation of the deltas over genes (cell-eval)             1, chance
    ``pearson_delta_chance``     what no signal at all gives (:func:`chance_level`)           -
    ``spearman_delta``           the same of their ranks                                      1, chance
    ``cosine_delta``             cosine of the deltas (perturbench)                           1, chance
    ``pearson_delta_top{k}``     the same over the k genes of largest real score              1, above chance
    ``pearson_delta_disjoint``   each side against another half of the controls               1, 0
    ``pearson_delta_pert``       shifts from the context's mean training perturbation         1, 0 (Systema)
    ``r2_delta``                 coefficient of determination of the deltas                   1, 0
    ``mse``, ``mae``             squared and absolute error of the means, per gene            0, the effect
    ``l2_delta``                 Euclidean length of the error                                0, the effect
    ``wmse``                     error weighted by the real effect (:func:`effect_weights`)   0, the effect
    ``wr2_delta``                R2 with these weights                                        1, 0 or below
    ``mse_corrected``            ``mse`` without the sampling variance of both sides          0, ``mse_effect``
    ``mse_effect``               squared real effect per gene without sampling variance       -
    ============================ ============================================================ ===============

    ``mse_corrected`` may be negative. The correction of the predicted side is at most that of the real side, so that
    a prediction gains nothing by noise (cell-eval2). Average it and ``mse_effect`` over conditions before taking the
    ratio: 0 is perfect, 1 is the control.

    Parameters
    ----------
    real, pred
        Pseudobulks of both sides over the same genes. Control rows of ``pred`` are not used.
    control
        Label of the control.
    exclude
        Genes to leave out of each condition, (K, genes), such as :func:`target_mask` of ``real.conditions(control)``.
    train
        Pseudobulks of the training cells, for ``pearson_delta_pert``; without it that is NaN.
    halves
        Pseudobulks of two disjoint halves of the real control cells (:func:`control_halves`); without it
        ``pearson_delta_disjoint`` is NaN.
    scores
        What the top genes are chosen by, (K, genes), from real cells only, best from cells that are not scored; the
        Welch t of the real condition against its control by default.
    space
        ``"mean_log"``: means of log-normalised values. ``"log_sum"``: logarithm of summed counts.
    control_source
        Control of the predicted deltas: the real one, or (as in cell-eval) the prediction's own.
    budget
        Also bound the sum of the corrections of the predicted side by the spread of the predicted profiles within a
        context, as cell-eval2 does since 0.20: a prediction whose cells scatter but whose means were pinned to the
        control gains nothing then. A context with one perturbation gets no correction at all.
    top
        Numbers of top genes.
    allow_missing
        Give NaN for conditions without prediction, and pass over predictions without real cells.

    Returns
    -------
    One array per name, (K,), in the order of ``real.conditions(control)``. NaN is undefined.

    Raises
    ------
    DataError
        If a control or a condition is missing, or ``space`` needs counts that the pseudobulks were made without.

    Examples
    --------
    >>> scores = metrics.effect_table(bulks, guess_bulks, control="NTC")
    >>> scores["pearson_delta"].shape == (len(bulks.conditions("NTC")),)
    True
    """
    matched = match(real, pred, control, allow_missing=allow_missing)
    shape = (len(matched.keys), real.means.shape[1])
    for name, given in (("exclude", exclude), ("scores", scores)):
        if given is not None and given.shape != shape:
            raise DataError(f"{name} is {given.shape}, expected {shape}: conditions x genes")
    x, real_noise = profiles(real, space)
    y, pred_noise = profiles(pred, space)
    own = None if control_source == "real" else _own_controls(pred, matched.keys, control)
    rest, centres = RestScores(real, control), _training_centres(train, control, space)
    claims = np.minimum(pred_noise[matched.pred], real_noise[matched.real])
    if budget:
        claims *= _shares(y[matched.pred], claims, matched.keys, None if exclude is None else ~exclude)
    parts = []
    for start in range(0, max(shape[0], 1), ROWS):
        rows = slice(start, start + ROWS)
        at, there, control_at = matched.real[rows], matched.pred[rows], matched.control[rows]
        keys, keep = matched.keys[rows], None if exclude is None else ~exclude[rows]
        dx = shift(x[at], x[control_at])
        dy = shift(y[there], x[control_at] if own is None else y[own[rows]])
        score = welch_scores(real, at, control_at) if scores is None else np.abs(scores[rows])
        part = {
            **_correlations(dx, dy, keep),
            **_top_correlations(dx, dy, score, top, keep),
            "pearson_delta_chance": chance_level(real.n[at], real.n[control_at], pred.n[there]),
            "pearson_delta_disjoint": _disjoint(x[at], y[there], keys, halves, control, space, keep),
            "pearson_delta_pert": _versus_training(x[at], y[there], keys, centres, keep),
            **_errors(dx, dy, x[at] - y[there], keep),
            **_weighted_errors(dx, dy, effect_weights(rest.scores(at), keep)),
            **_corrected(dx, x[at] - y[there], keep, claims[rows], real_noise[at], real_noise[control_at]),
        }
        parts.append(part)
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for values in table.values():
        values[matched.pred < 0] = np.nan
    return table


def profiles(bulks: Pseudobulks, space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Give the expression profiles in a space, (K, genes), and their sampling variance summed over genes, (K,).

    Raises
    ------
    DataError
        If the space is unknown, or needs counts that the pseudobulks were made without.
    """
    if space == "mean_log":
        return bulks.means, bulks.noise()
    if space != "log_sum":
        raise DataError(f"space={space!r} is not known; use 'mean_log' or 'log_sum'")
    if bulks.log_sum is None or bulks.log_sum_noise is None:
        raise DataError("space='log_sum' needs counts; make the pseudobulks with counts=")
    return bulks.log_sum, bulks.log_sum_noise


def _correlations(dx: np.ndarray, dy: np.ndarray, keep: np.ndarray | None) -> dict[str, np.ndarray]:
    return {
        "pearson_delta": pearson_rows(dx, dy, keep),
        "spearman_delta": spearman_rows(dx, dy, keep),
        "cosine_delta": cosine_rows(dx, dy, keep),
    }


def _top_correlations(
    dx: np.ndarray, dy: np.ndarray, score: np.ndarray, top: Sequence[int], keep: np.ndarray | None
) -> dict[str, np.ndarray]:
    if not top:
        return {}
    genes, counts = top_genes(score, max(top), keep)
    x, y = np.take_along_axis(dx, genes, axis=1), np.take_along_axis(dy, genes, axis=1)
    return {f"pearson_delta_top{k}": pearson_rows(x[:, :k], y[:, :k], counts[:, :k]) for k in top}


def _own_controls(pred: Pseudobulks, keys: Sequence[Key], control: str) -> np.ndarray:
    rows = pred.rows([(*key[:-1], control) for key in keys])
    if (rows < 0).any():
        raise DataError("control_source='pred' needs predicted control cells in every context; use 'real'")
    return rows


def _errors(dx: np.ndarray, dy: np.ndarray, error: np.ndarray, keep: np.ndarray | None) -> dict[str, np.ndarray]:
    size = np.full(len(dx), dx.shape[1]) if keep is None else keep.sum(axis=1)
    error = _kept(error, keep)
    squares = np.square(_kept(dx - dy, keep)).sum(axis=1)
    total = np.square(centred_rows(dx, keep)).sum(axis=1)
    return {
        "mse": np.square(error).sum(axis=1) / size,
        "mae": np.abs(error).sum(axis=1) / size,
        "l2_delta": np.sqrt(squares),
        "r2_delta": 1.0 - np.divide(squares, total, out=np.full_like(total, np.nan), where=total > 0),
    }


def _weighted_errors(dx: np.ndarray, dy: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    error = (weights * np.square(dx - dy)).sum(axis=1)
    mean = (weights * dx).sum(axis=1, keepdims=True)
    total = (weights * np.square(dx - mean)).sum(axis=1)
    return {"wmse": error, "wr2_delta": 1.0 - np.divide(error, total, out=np.full_like(total, np.nan), where=total > 0)}


def _corrected(
    dx: np.ndarray,
    error: np.ndarray,
    keep: np.ndarray | None,
    claims: np.ndarray,
    real_noise: np.ndarray,
    control_noise: np.ndarray,
) -> dict[str, np.ndarray]:
    size = np.full(len(dx), dx.shape[1]) if keep is None else keep.sum(axis=1)
    distance, effect = (np.square(_kept(side, keep)).sum(axis=1) for side in (error, dx))
    return {
        "mse_corrected": (distance - claims - real_noise) / size,
        "mse_effect": (effect - real_noise - control_noise) / size,
    }


def _shares(y: np.ndarray, claims: np.ndarray, keys: Sequence[Key], keep: np.ndarray | None) -> np.ndarray:
    """Part of the claimed corrections that the spread of the predicted profiles within each context covers, (K,)."""
    kept = np.ones(y.shape, dtype=bool) if keep is None else keep
    weights = 1.0 / np.maximum(kept.sum(axis=1), 1)
    contexts = [key[:-1] for key in keys]
    out = np.ones(len(keys))
    for context in dict.fromkeys(contexts):
        own = np.array([other == context for other in contexts])
        weight = np.where(kept[own], weights[own, None], 0.0)
        total = np.maximum(weight.sum(axis=0), np.finfo(float).tiny)
        centred = y[own] - (weight * y[own]).sum(axis=0) / total
        spread = np.where(kept[own].sum(axis=0) > 1, (weight * np.square(centred)).sum(axis=0), 0.0).sum()
        claim = weights[own] @ claims[own]
        out[own] = min(1.0, spread / claim) if claim > 0 else 1.0
    return out


def _kept(values: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    return values if keep is None else np.where(keep, values, 0.0)


def _disjoint(
    x: np.ndarray,
    y: np.ndarray,
    keys: Sequence[Key],
    halves: tuple[Pseudobulks, Pseudobulks] | None,
    control: str,
    space: Space,
    keep: np.ndarray | None,
) -> np.ndarray:
    """Correlate shifts from different halves of the controls, both ways round."""
    if halves is None:
        return np.full(len(keys), np.nan)
    controls = [(*key[:-1], control) for key in keys]
    rows = [half.rows(controls) for half in halves]
    first, second = (profiles(half, space)[0][row] for half, row in zip(halves, rows, strict=True))
    values = (
        pearson_rows(shift(x, first), shift(y, second), keep) + pearson_rows(shift(x, second), shift(y, first), keep)
    ) / 2
    values[(rows[0] < 0) | (rows[1] < 0)] = np.nan
    return values


def _training_centres(train: Pseudobulks | None, control: str, space: Space) -> dict[Key, np.ndarray]:
    """Mean profile of the training perturbations of each context, each perturbation with equal weight."""
    groups: dict[Key, list[int]] = {}
    for row, key in enumerate(() if train is None else train.keys):
        if key[-1] != control:
            groups.setdefault(key[:-1], []).append(row)
    profile = np.empty(0) if train is None else profiles(train, space)[0]
    return {context: profile[rows].mean(axis=0) for context, rows in groups.items()}


def _versus_training(
    x: np.ndarray, y: np.ndarray, keys: Sequence[Key], centres: dict[Key, np.ndarray], keep: np.ndarray | None
) -> np.ndarray:
    """Correlate shifts from the mean profile of the context's training perturbations; NaN where it has none."""
    if not centres:
        return np.full(len(keys), np.nan)
    nothing = np.full(x.shape[1], np.nan)
    centre = np.stack([centres.get(key[:-1], nothing) for key in keys])
    return pearson_rows(shift(x, centre), shift(y, centre), keep)


def control_halves(
    values: Any, codes: np.ndarray, keys: Sequence[Key], *, control: str, counts: Any = None, seed: int = 0
) -> tuple[Pseudobulks, Pseudobulks]:
    """Pseudobulks of two disjoint halves of the control cells of each context.

    Parameters
    ----------
    values, codes, keys, counts
        As for :func:`pseudobulks`.
    control
        Label of the control.
    seed
        Which cells come into which half.

    Returns
    -------
    The two halves. A context with a single control cell is in the first only.

    Examples
    --------
    >>> first, second = metrics.control_halves(values, codes, keys, control="NTC", seed=0)
    """
    rng, codes = np.random.default_rng(seed), np.asarray(codes)
    controls = [code for code, key in enumerate(keys) if key[-1] == control]
    sides = np.full((2, len(codes)), -1)
    for label, code in enumerate(controls):
        cells = rng.permutation(np.flatnonzero(codes == code))
        sides[0, cells[0::2]] = sides[1, cells[1::2]] = label
    halves = []
    for side in sides:
        present = np.unique(side[side >= 0])
        rows = np.flatnonzero(side >= 0)
        local = np.searchsorted(present, side[rows])
        raw = None if counts is None else as_matrix(counts)[rows]
        own = [keys[controls[label]] for label in present]
        halves.append(pseudobulks(as_matrix(values)[rows], local, own, counts=raw))
    return halves[0], halves[1]

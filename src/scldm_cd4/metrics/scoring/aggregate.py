"""From one row per condition to one row per metric: means, anchored scores, ranks, intervals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.registry import METRICS, RANKED

How = Literal["mean", "median", "weighted"]
PREFIX = "baseline_"


def value_columns(table: Any) -> list[str]:
    """Columns of a table that hold values of a metric."""
    fixed = ("value", "floor", "ceiling", "ceiling_interpolated")
    return [c for c in table.columns if c in fixed or c.startswith((PREFIX, "matched_"))]


def aggregate(
    table: Any,
    how: How = "mean",
    *,
    by: str | Sequence[str] | None = None,
    max_missing: float = 1.0,
    intervals: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
) -> Any:
    """Average a table over conditions, contexts with equal weight.

    Parameters
    ----------
    table
        From :func:`evaluate`.
    how
        ``mean`` or ``median`` over the conditions of a context, then the mean over contexts; ``weighted``: mean over
        all conditions with the real cells as weights.
    by
        Columns to keep apart, such as ``"context"``.
    max_missing
        Refuse where a larger share of the conditions is undefined.
    intervals
        Whether to add a 95 % interval of ``value`` (``value_low``, ``value_high``), see :func:`bootstrap`.
    n_boot, seed
        Of the intervals.

    Returns
    -------
    One row per metric (and level of ``by``): averages of all columns of values, each over the conditions where it is
    defined; ``n_conditions``, and ``n_valid`` where ``value`` is.

    Raises
    ------
    DataError
        If the table is not one of :func:`evaluate`, ``how`` is unknown, or too much is undefined.

    Examples
    --------
    >>> int(metrics.aggregate(table).loc["pearson_delta", "n_conditions"]) > 0
    True
    """
    keep = _by(table, by)
    if how not in ("mean", "median", "weighted"):
        raise DataError(f"how={how!r} is not known; use 'mean', 'median' or 'weighted'")
    columns = value_columns(table)
    grouped = table.groupby([*keep, "metric"], sort=False, observed=True)
    if how == "weighted":
        out = grouped[[*columns, "n_real"]].apply(lambda rows: _weighted(rows, columns))
    else:
        inner = table.groupby([*dict.fromkeys([*keep, "metric", "context"])], sort=False, observed=True)
        within = getattr(inner[columns], how)()
        out = within.groupby(level=[*keep, "metric"], sort=False, observed=True).mean()
    out["n_conditions"] = grouped.size()
    out["n_valid"] = grouped["value"].count()
    missing = 1.0 - out["n_valid"] / out["n_conditions"]
    if (missing > max_missing).any():
        worst = missing.idxmax()
        raise DataError(
            f"{worst}: {missing.max():.0%} of the conditions are undefined, more than max_missing={max_missing:.0%}; "
            "see the notes of the table"
        )
    if intervals:
        bounds = bootstrap(table, lambda rows: aggregate(rows, how, by=by)["value"], n_boot=n_boot, seed=seed)
        out = out.join(bounds.rename(columns={"low": "value_low", "high": "value_high"}))
    return out


def _weighted(rows: Any, columns: Sequence[str]) -> Any:
    import pandas as pd

    weights = rows["n_real"].to_numpy(dtype=np.float64)
    out = {}
    for column in columns:
        values = rows[column].to_numpy(dtype=np.float64)
        known = ~np.isnan(values)
        total = weights[known].sum()
        out[column] = (values[known] * weights[known]).sum() / total if total > 0 else np.nan
    return pd.Series(out)


def score(
    table: Any,
    baseline: str | None = None,
    ceiling: str = "ceiling",
    *,
    by: str | Sequence[str] | None = None,
    clip: tuple[float, float] | None = None,
    intervals: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
) -> Any:
    r"""Place the prediction between a baseline (0) and a repeat of the experiment (1).

    :math:`(\bar u - \bar b) / (\bar r - \bar b)` of the averages over the conditions where all three are defined
    (contexts with equal weight), unclipped: below 0 is worse than the baseline. Values ``matched`` to the ceiling are
    used (equal number of cells, separate controls). Where the best value lies inside the range, distances to it are
    scored. A prediction that is undefined because it does not change anything counts as the baseline, so silence earns
    nothing.

    Parameters
    ----------
    table
        From :func:`evaluate` with ceilings and training cells.
    baseline
        Name of a baseline in the table; ``control`` by default.
    ceiling
        ``ceiling`` or ``ceiling_interpolated``.
    by
        Columns to keep apart, such as ``"context"``.
    clip
        Bounds of the score of each metric, if any.
    intervals
        Whether to add a 95 % interval (``score_low``, ``score_high``), see :func:`bootstrap`.
    n_boot, seed
        Of the intervals.

    Returns
    -------
    One row per metric: ``value``, ``baseline``, ``ceiling`` (averages), ``score``, ``n_valid`` conditions, and
    ``is_resolved``: whether the ceiling beats the baseline by twice the standard error of their difference over
    conditions, without which the score means nothing.

    Raises
    ------
    DataError
        If the table has no such columns.

    Examples
    --------
    >>> metrics.score(table, "additive").columns[:3].tolist()
    ['value', 'baseline', 'ceiling']
    """
    import pandas as pd

    name = f"{PREFIX}{baseline or 'control'}"
    needed = {"matched_value": "value", f"matched_{name}": "baseline", ceiling: "ceiling"}
    if absent := [column for column in needed if column not in table]:
        have = [column.removeprefix(PREFIX) for column in table.columns if column.startswith(PREFIX)]
        raise DataError(
            f"the table lacks {absent}; a score needs training cells, ceilings, and one of the baselines {have}"
        )
    keep = _by(table, by)
    rows = table[list(dict.fromkeys([*keep, "context", "perturbation", "metric", *needed]))].rename(columns=needed)
    silent = rows["value"].isna() & rows["baseline"].notna() & rows["ceiling"].notna() & table["value"].isna()
    scored = np.array([METRICS[m].family in RANKED for m in rows["metric"]], dtype=bool)
    rows["value"] = rows["value"].where(~(silent & scored & (table["n_pred"] > 0)), rows["baseline"])
    for column in needed.values():
        rows[column] = _distance_to_target(rows[column].to_numpy(dtype=np.float64), rows["metric"])
    rows = rows[rows[list(needed.values())].notna().all(axis=1)]
    levels = [*dict.fromkeys([*keep, "metric", "context"])]
    means = rows.groupby(levels, sort=False, observed=True)[list(needed.values())].mean()
    out = means.groupby(level=[*keep, "metric"], sort=False, observed=True).mean()
    gap = out["ceiling"] - out["baseline"]
    out["score"] = ((out["value"] - out["baseline"]) / gap).where(gap != 0)
    if clip is not None:
        out["score"] = out["score"].clip(*clip)
    signs = np.array([METRICS[m].sign for m in out.index.get_level_values("metric")])
    out["n_valid"] = rows.groupby([*keep, "metric"], sort=False, observed=True).size()
    out["is_resolved"] = _resolved(rows, out.index, signs)
    out = out.reindex(table.groupby([*keep, "metric"], sort=False, observed=True).size().index)
    out["n_valid"] = out["n_valid"].fillna(0).astype(int)
    out["is_resolved"] = out["is_resolved"].eq(True)
    if intervals:
        bounds = bootstrap(
            table, lambda t: score(t, baseline, ceiling, by=by, clip=clip)["score"], n_boot=n_boot, seed=seed
        )
        out = out.join(bounds.rename(columns={"low": "score_low", "high": "score_high"}))
    assert isinstance(out, pd.DataFrame)
    return out


def _distance_to_target(values: np.ndarray, metrics: Any) -> np.ndarray:
    """Take the distance to the best value where it lies inside the range."""
    best = np.array([METRICS[m].best if METRICS[m].direction == "target" else np.nan for m in metrics])
    return np.where(np.isnan(best), values, np.abs(values - best))


def _resolved(rows: Any, index: Any, signs: np.ndarray) -> Any:
    """Whether the ceiling beats the baseline by twice the standard error of their paired difference."""
    gap = (rows["ceiling"] - rows["baseline"]).groupby([rows[name] for name in index.names], sort=False, observed=True)
    error = (gap.std() / np.sqrt(gap.count())).reindex(index)
    return -signs * gap.mean().reindex(index) > 2 * error


def rank_average(tables: Any, *, ceiling: bool = False, metrics: Sequence[str] | None = None) -> Any:
    """Rank methods against each other, families of metrics with equal weight.

    Within each condition and metric the methods are ranked (1 is best, ties share the mean rank, an undefined value is
    worst; a method that is undefined throughout is left out). Ranks are averaged over conditions, then over the metrics
    of a family, then over families, so that many similar columns of one family do not decide.

    Parameters
    ----------
    tables
        One table of :func:`evaluate`: the prediction (``value``) and its baselines are ranked. Or several by name, of
        the same conditions: their values and the baselines of the first are ranked.
    ceiling
        Whether the ceiling is ranked too, all methods matched to its number of cells.
    metrics
        Which metrics; by default those of the table that the registry marks for ranking.

    Returns
    -------
    One row per method, best first: the mean rank of each family, ``rank`` over families, and ``n_undefined``.

    Raises
    ------
    DataError
        If there are fewer than two methods, or the tables have different conditions.

    Examples
    --------
    >>> methods = metrics.rank_average(table)
    >>> bool(methods["rank"].is_monotonic_increasing)
    True
    """
    import pandas as pd

    given: Mapping[str, Any] = tables if isinstance(tables, Mapping) else {"prediction": tables}
    index = ["context", "perturbation", "metric"]
    first = next(iter(given.values())).set_index(index)
    prefix = "matched_" if ceiling else ""
    methods = {name: table.set_index(index)[f"{prefix}value"] for name, table in given.items()}
    methods |= {c.removeprefix(prefix + PREFIX): first[c] for c in first.columns if c.startswith(prefix + PREFIX)}
    if ceiling:
        methods["ceiling"] = first["ceiling"]
    if len(methods) < 2:
        raise DataError("a rank needs at least two methods: give several tables, or one with baselines")
    if any(len(m) != len(first) or not m.index.isin(first.index).all() for m in methods.values()):
        raise DataError("the tables have different conditions or metrics; evaluate all methods on the same cells")
    values = pd.DataFrame({name: column.reindex(first.index) for name, column in methods.items()})
    names = values.index.get_level_values("metric")
    chosen = [m for m in dict.fromkeys(names) if (METRICS[m].ranked if metrics is None else m in metrics)]
    chosen = [m for m in chosen if METRICS[m].family in RANKED]
    values = values[names.isin(chosen) & values.notna().any(axis=1)].dropna(axis=1, how="all")
    names = values.index.get_level_values("metric")
    loss = values.to_numpy(dtype=np.float64).copy()
    for metric in dict.fromkeys(names):
        rows = names == metric
        loss[rows] = np.vectorize(METRICS[metric].loss)(loss[rows])
    ranks = pd.DataFrame(np.nan_to_num(loss, nan=np.inf), index=values.index, columns=values.columns).rank(axis=1)
    by_metric = ranks.groupby(level="metric", sort=False).mean()
    by_family = by_metric.groupby([METRICS[m].family for m in by_metric.index], sort=False).mean()
    out = by_family.T
    out["rank"] = by_family.mean()
    out["n_undefined"] = values.isna().sum()
    return out.sort_values("rank", kind="stable")


def bootstrap(
    table: Any, statistic: Callable[[Any], Any], *, n_boot: int = 1000, level: float = 0.95, seed: int = 0
) -> Any:
    """Percentile intervals of a statistic of a table, from redrawn perturbations and then contexts.

    Perturbations are drawn with replacement, then of each its contexts. All metrics and columns of a condition stay
    together, so differences between columns are paired.

    Parameters
    ----------
    table
        From :func:`evaluate`.
    statistic
        Gives a Series for a table.
    n_boot
        Redraws.
    level
        Of the interval.
    seed
        Of the draws.

    Returns
    -------
    ``low`` and ``high`` by the index of the statistic; NaN with fewer than three perturbations.

    Examples
    --------
    >>> intervals = metrics.bootstrap(table, lambda t: t.groupby("metric")["value"].mean(), n_boot=20)
    >>> list(intervals.columns)
    ['low', 'high']
    """
    import pandas as pd

    whole = statistic(table)
    labels, codes = np.unique(table["perturbation"].to_numpy(dtype=str), return_inverse=True)
    if len(labels) < 3:
        return pd.DataFrame({"low": np.nan, "high": np.nan}, index=whole.index)
    contexts = table["context"].to_numpy(dtype=str)
    blocks = []
    for label in range(len(labels)):
        rows = np.flatnonzero(codes == label)
        blocks.append([rows[contexts[rows] == context] for context in dict.fromkeys(contexts[rows])])
    rng, draws = np.random.default_rng(seed), []
    for _ in range(n_boot):
        picked: list[np.ndarray] = []
        for label in rng.integers(len(labels), size=len(labels)):
            own = blocks[label]
            picked.extend(own[i] for i in rng.integers(len(own), size=len(own)))
        draws.append(statistic(table.iloc[np.concatenate(picked)]).reindex(whole.index))
    stacked = pd.concat(draws, axis=1).to_numpy(dtype=np.float64)
    known = ~np.isnan(stacked).all(axis=1)
    bounds = np.full((2, len(whole)), np.nan)
    bounds[:, known] = np.nanquantile(stacked[known], [(1 - level) / 2, (1 + level) / 2], axis=1)
    return pd.DataFrame({"low": bounds[0], "high": bounds[1]}, index=whole.index)


def _by(table: Any, by: str | Sequence[str] | None) -> list[str]:
    keep = [by] if isinstance(by, str) else list(by or [])
    wanted = ("context", "perturbation", "metric", "value", *keep)
    if absent := [column for column in wanted if column not in getattr(table, "columns", [])]:
        raise DataError(f"the table lacks the columns {absent}; give a table of metrics.evaluate")
    return keep

"""The only list of metrics: what each is, which way is better, and what it gives when there is nothing to find."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from scldm_cd4._errors import DataError

Family = Literal["distribution", "effect", "discrimination", "de", "quality"]
Direction = Literal["higher", "lower", "target"]
RANKED: tuple[Family, ...] = ("distribution", "effect", "discrimination", "de")
"""Families that enter a rank average, each with equal weight."""


@dataclass(frozen=True)
class Metric:
    """What a reader of a table needs to know of a metric.

    Attributes
    ----------
    name
        What it is called in tables.
    family
        Group of metrics that see the same thing; a rank average gives each family equal weight.
    direction
        ``higher`` or ``lower`` is better, or near ``best`` is better (``target``).
    best
        Value of a perfect prediction; for distances the expected value of a perfect one.
    range
        Lowest and highest possible value; None is unbounded.
    chance
        Value without any signal: a number, the name of a column that holds it per condition, or None where it is not
        known in advance.
    space
        Where it is computed: ``pcs`` (principal components of reference cells), ``mean_log`` (means of log-normalised
        values), ``log_sum`` (logarithm of summed counts), ``cells``.
    min_cells
        Cells on each side below which it is undefined.
    title
        One line for readers.
    floor
        What stands in the column ``floor``: the value of a repeat (``repeat``: distances and errors, which noise alone
        keeps from 0), or of no signal (``chance``: agreement).
    ranked
        Whether it enters rank averages; of several that say almost the same one is chosen.

    Examples
    --------
    >>> metrics.registry.METRICS["mmd2"].best
    0.0
    """

    name: str
    family: Family
    direction: Direction
    best: float
    range: tuple[float | None, float | None]
    chance: float | str | None
    space: str
    title: str
    min_cells: int = 2
    floor: Literal["repeat", "chance"] = "chance"
    ranked: bool = True

    def loss(self, value: float) -> float:
        """How far a value is from the best, larger is worse; NaN stays."""
        return abs(value - self.best) if self.direction == "target" else self.sign * value

    @property
    def sign(self) -> float:
        """1 where lower is better, -1 where higher is."""
        return -1.0 if self.direction == "higher" else 1.0


def _distance(name: str, title: str, low: float | None = 0.0, *, min_cells: int = 2, ranked: bool = True) -> Metric:
    return Metric(
        name, "distribution", "lower", 0.0, (low, None), None, "pcs", title, min_cells, floor="repeat", ranked=ranked
    )


def _agreement(
    name: str,
    family: Family,
    title: str,
    *,
    range: tuple[float | None, float | None] = (-1.0, 1.0),
    chance: float | str | None = 0.0,
    space: str = "mean_log",
    min_cells: int = 1,
    ranked: bool = True,
) -> Metric:
    return Metric(name, family, "higher", 1.0, range, chance, space, title, min_cells, ranked=ranked)


def _error(name: str, title: str, low: float | None = 0.0, *, space: str = "log_sum", ranked: bool = True) -> Metric:
    return Metric(name, "effect", "lower", 0.0, (low, None), None, space, title, 1, floor="repeat", ranked=ranked)


def _de(
    name: str, title: str, chance: float | str | None = None, *, low: float | None = 0.0, ranked: bool = False
) -> Metric:
    return _agreement(name, "de", title, range=(low, 1.0), chance=chance, space="cells", min_cells=2, ranked=ranked)


_ALL = (
    _distance("mmd2", "squared MMD, RBF, bandwidth the median distance of real cells, unbiased", None),
    _distance("mmd2_multi", "the same, mean over five bandwidths", None, ranked=False),
    _distance("energy_distance", "energy distance, Euclidean, unbiased", None),
    _distance("w1", "1-Wasserstein distance, exact", ranked=False),
    _distance("w2", "2-Wasserstein distance, exact, rooted"),
    _distance("frechet_distance", "Frechet distance of Gaussians, not rooted", min_cells=60, ranked=False),
    Metric(
        "one_nn_accuracy",
        "distribution",
        "target",
        0.5,
        (0.0, 1.0),
        None,
        "pcs",
        "how often the nearest neighbour is of the same side, at equal numbers",
        4,
        floor="repeat",
    ),
    _agreement(
        "precision",
        "distribution",
        "share of predicted cells among real ones",
        range=(0.0, 1.0),
        chance=None,
        space="pcs",
        min_cells=10,
    ),
    _agreement(
        "recall",
        "distribution",
        "share of real cells among predicted ones",
        range=(0.0, 1.0),
        chance=None,
        space="pcs",
        min_cells=10,
    ),
    _agreement(
        "density",
        "distribution",
        "real balls around a predicted cell over k",
        range=(0.0, None),
        chance=None,
        space="pcs",
        min_cells=10,
        ranked=False,
    ),
    _agreement(
        "coverage",
        "distribution",
        "share of real balls that hold a predicted cell",
        range=(0.0, 1.0),
        chance=None,
        space="pcs",
        min_cells=10,
        ranked=False,
    ),
    _agreement(
        "r2_mean", "distribution", "R2 of gene means; high for control cells too", range=(None, 1.0), ranked=False
    ),
    _agreement("r2_variance", "distribution", "R2 of gene variances", range=(None, 1.0), min_cells=2, ranked=False),
    _agreement("pearson_delta", "effect", "correlation of shifts from the control", chance="pearson_delta_chance"),
    _agreement("pearson_delta_disjoint", "effect", "the same, each side against other control cells", ranked=False),
    _agreement("pearson_delta_pert", "effect", "correlation of shifts from the mean training perturbation"),
    _agreement("pearson_delta_top20", "effect", "correlation of shifts, 20 top genes", chance=None, ranked=False),
    _agreement("pearson_delta_top50", "effect", "correlation of shifts, 50 top genes", chance=None, ranked=False),
    _agreement("pearson_delta_top100", "effect", "correlation of shifts, 100 top genes", chance=None, ranked=False),
    _agreement("spearman_delta", "effect", "rank correlation of shifts", chance="pearson_delta_chance", ranked=False),
    _agreement("cosine_delta", "effect", "cosine of shifts", chance="pearson_delta_chance", ranked=False),
    _agreement("r2_delta", "effect", "R2 of shifts", range=(None, 1.0), ranked=False),
    _error("mse", "mean squared error of profiles", ranked=False),
    _error("mae", "mean absolute error of profiles", ranked=False),
    _error("l2_delta", "Euclidean error of shifts"),
    _error("wmse", "squared error weighted by the real effect"),
    _agreement("wr2_delta", "effect", "weighted R2 of shifts", range=(None, 1.0), chance=None, ranked=False),
    _error("mse_corrected", "squared error less the noise of both sides", None, ranked=False),
    _agreement(
        "discrimination_cosine",
        "discrimination",
        "rank of the right effect in its context, cosine",
        range=(0.0, 1.0),
        chance=0.5,
        space="log_sum",
    ),
    _agreement(
        "discrimination_l1",
        "discrimination",
        "the same, L1 (can be raised by scaling)",
        range=(0.0, 1.0),
        chance=0.5,
        space="log_sum",
        ranked=False,
    ),
    _agreement(
        "discrimination_l2",
        "discrimination",
        "the same, L2",
        range=(0.0, 1.0),
        chance=0.5,
        space="log_sum",
        ranked=False,
    ),
    _de("de_precision", "share of predicted significant genes that are real", "de_prevalence"),
    _de("de_recall", "share of real significant genes that are predicted"),
    _de("de_f1", "F1 of significant genes", ranked=True),
    _de("de_jaccard", "Jaccard index of significant genes"),
    _de("de_overlap", "overlap of as many top genes as are significant"),
    *(_de(f"de_overlap_top{k}", f"overlap of the top {k} significant genes") for k in (20, 50, 100)),
    *(_de(f"de_precision_top{k}", f"precision of the top {k} predicted genes") for k in (20, 50, 100)),
    _de("de_roc_auc", "area under the ROC curve of |z|", 0.5, ranked=True),
    _de("de_pr_auc", "average precision of |z|", "de_prevalence"),
    _de("de_spearman_lfc", "rank correlation of fold changes of significant genes", 0.0, low=-1.0, ranked=True),
    Metric(
        "de_lfc_nmae",
        "de",
        "lower",
        0.0,
        (0.0, None),
        1.0,
        "cells",
        "error of fold changes over their size",
        floor="repeat",
        ranked=False,
    ),
    _de("de_direction_match", "share of significant genes with the right sign", 0.5),
    _de("de_direction_yield", "right signs over the larger number of significant genes"),
    _de("de_direction_reach", "depth down to which 9 of 10 signs are right"),
    Metric(
        "memorisation",
        "quality",
        "target",
        1.0,
        (0.0, None),
        1.0,
        "pcs",
        "distance to the nearest training cell over that of held-out cells",
    ),
    Metric(
        "library_log2_ratio",
        "quality",
        "target",
        0.0,
        (None, None),
        0.0,
        "cells",
        "log2 ratio of median counts per cell",
        1,
    ),
    Metric(
        "zero_fraction_difference",
        "quality",
        "target",
        0.0,
        (-1.0, 1.0),
        0.0,
        "cells",
        "share of zeros, predicted less real",
        1,
    ),
    Metric(
        "variance_log2_ratio",
        "quality",
        "target",
        0.0,
        (None, None),
        0.0,
        "mean_log",
        "log2 ratio of the total variance of cells",
    ),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
"""All metrics of tables by name."""

_PAPER = (
    "mmd2",
    "energy_distance",
    "w2",
    "pearson_delta",
    "pearson_delta_pert",
    "l2_delta",
    "discrimination_cosine",
    "de_precision",
    "de_recall",
    "de_f1",
)
PROFILES: Mapping[str, tuple[str, ...]] = {
    "minimal": ("energy_distance", "pearson_delta", "discrimination_cosine", "de_f1"),
    "paper": _PAPER,
    "distribution": tuple(metric.name for metric in _ALL if metric.family == "distribution"),
    "full": tuple(METRICS),
}
"""Metrics of a table by the name of the profile."""


def resolve(profile: str | Iterable[str]) -> tuple[str, ...]:
    """Give the metrics of a profile, or check a list of metrics; in the order of :data:`METRICS`.

    Parameters
    ----------
    profile
        Name of a profile (``minimal``, ``paper``, ``distribution``, ``full``), or names of metrics.

    Returns
    -------
    Names of metrics.

    Raises
    ------
    DataError
        If the profile or a metric is unknown, or there is none.

    Examples
    --------
    >>> metrics.registry.resolve(["mmd2", "pearson_delta"])
    ('mmd2', 'pearson_delta')
    """
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise DataError(f"profile={profile!r} is not known; profiles are {', '.join(PROFILES)}, or give metrics")
        return tuple(name for name in METRICS if name in PROFILES[profile])
    names = list(profile)
    if not names or (unknown := [name for name in names if name not in METRICS]):
        raise DataError(f"metrics {unknown if names else names} are not known; metrics are {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)

"""Metrics of generated cells: AnnData or arrays in, numbers and tables out. Knows nothing of the model."""

from scldm_cd4.metrics import baselines, compat, ranking, registry
from scldm_cd4.metrics.cells.projection import Projection, fit_projection
from scldm_cd4.metrics.cells.pseudobulk import (
    Pseudobulks,
    condition_codes,
    group_means,
    log_normalize,
    pseudobulks,
    target_mask,
)
from scldm_cd4.metrics.de.rank_tests import DETests, context_test, control_ranks, de_genes, de_recovery, de_tests
from scldm_cd4.metrics.de.ranks import ControlRanks, RankTest, benjamini_hochberg, combine_tests
from scldm_cd4.metrics.de.recovery import area_under_curves, de_table
from scldm_cd4.metrics.distribution.energy import (
    control_distances,
    energy_correlation,
    energy_distance,
    within_distance,
)
from scldm_cd4.metrics.distribution.frechet import frechet_distance
from scldm_cd4.metrics.distribution.memorisation import (
    memorisation,
    memorisation_table,
    memorised_share,
    nearest_distance,
)
from scldm_cd4.metrics.distribution.mmd import MULTI_SCALES, median_distance, mmd2, permutation_test
from scldm_cd4.metrics.distribution.moments import r2, r2_mean, r2_variance
from scldm_cd4.metrics.distribution.neighbours import one_nn_accuracy, prdc
from scldm_cd4.metrics.distribution.reconstruction import (
    intercept_nb,
    mse,
    nb_error,
    pcc,
    reconstruction,
    sample_counts,
    zeros_accuracy,
)
from scldm_cd4.metrics.distribution.table import DISTRIBUTION_METRICS, DistributionReference, distribution_table
from scldm_cd4.metrics.distribution.wasserstein import wasserstein
from scldm_cd4.metrics.effects.delta import (
    chance_level,
    context_delta,
    cosine_delta,
    l2_delta,
    pearson_delta,
    safe_pearson,
    spearman_delta,
)
from scldm_cd4.metrics.effects.discrimination import discrimination, effect_distances
from scldm_cd4.metrics.effects.table import control_halves, effect_table
from scldm_cd4.metrics.effects.weights import effect_weights, top_genes, welch_scores
from scldm_cd4.metrics.page.report import report
from scldm_cd4.metrics.scoring.aggregate import aggregate, bootstrap, rank_average, score
from scldm_cd4.metrics.scoring.anchored import Anchored, anchored_score, mean_and_error
from scldm_cd4.metrics.scoring.evaluate import evaluate

__all__ = [
    "Anchored",
    "ControlRanks",
    "DETests",
    "DISTRIBUTION_METRICS",
    "DistributionReference",
    "MULTI_SCALES",
    "Projection",
    "Pseudobulks",
    "RankTest",
    "aggregate",
    "anchored_score",
    "area_under_curves",
    "baselines",
    "benjamini_hochberg",
    "bootstrap",
    "chance_level",
    "combine_tests",
    "compat",
    "condition_codes",
    "context_delta",
    "context_test",
    "control_distances",
    "control_halves",
    "control_ranks",
    "cosine_delta",
    "de_genes",
    "de_recovery",
    "de_table",
    "de_tests",
    "discrimination",
    "distribution_table",
    "effect_distances",
    "effect_table",
    "effect_weights",
    "energy_correlation",
    "energy_distance",
    "evaluate",
    "fit_projection",
    "frechet_distance",
    "group_means",
    "intercept_nb",
    "l2_delta",
    "log_normalize",
    "mean_and_error",
    "median_distance",
    "memorisation",
    "memorisation_table",
    "memorised_share",
    "mmd2",
    "mse",
    "nb_error",
    "nearest_distance",
    "one_nn_accuracy",
    "pcc",
    "pearson_delta",
    "permutation_test",
    "prdc",
    "pseudobulks",
    "r2",
    "r2_mean",
    "r2_variance",
    "rank_average",
    "ranking",
    "reconstruction",
    "registry",
    "report",
    "safe_pearson",
    "sample_counts",
    "score",
    "spearman_delta",
    "target_mask",
    "top_genes",
    "wasserstein",
    "welch_scores",
    "within_distance",
    "zeros_accuracy",
]


def __dir__() -> list[str]:
    return sorted(__all__)

"""Metrics of generated cells: AnnData or arrays in, numbers and tables out. Knows nothing of the model."""

from scldm_cd4.metrics._de import ControlRanks, benjamini_hochberg, combine_tests, context_test, de_genes, de_recovery
from scldm_cd4.metrics._delta import chance_level, context_delta, pearson_delta, safe_pearson
from scldm_cd4.metrics._distribution import energy_distance, wasserstein, within_distance
from scldm_cd4.metrics._projection import Projection, fit_projection
from scldm_cd4.metrics._pseudobulk import group_means, log_normalize
from scldm_cd4.metrics._reconstruction import intercept_nb, mse, nb_error, pcc
from scldm_cd4.metrics._score import Anchored, anchored_score, mean_and_error

__all__ = [
    "Anchored",
    "ControlRanks",
    "Projection",
    "anchored_score",
    "benjamini_hochberg",
    "chance_level",
    "combine_tests",
    "context_delta",
    "context_test",
    "de_genes",
    "de_recovery",
    "energy_distance",
    "fit_projection",
    "group_means",
    "intercept_nb",
    "log_normalize",
    "mean_and_error",
    "mse",
    "nb_error",
    "pcc",
    "pearson_delta",
    "safe_pearson",
    "wasserstein",
    "within_distance",
]

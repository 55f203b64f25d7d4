"""Data sets for trying the package: simulated CD4+ T cell Perturb-seq with known truth."""

from scldm_cd4.datasets.synthetic import synthetic_cd4, true_log2fc

__all__ = ["synthetic_cd4", "true_log2fc"]


def __dir__() -> list[str]:
    return sorted(__all__)

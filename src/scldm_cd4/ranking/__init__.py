"""Which perturbations lead toward a wanted effect."""

from scldm_cd4.ranking.effects import EffectSource
from scldm_cd4.ranking.perturbations import rank, rank_perturbations

__all__ = ["EffectSource", "rank", "rank_perturbations"]

"""Which perturbations lead toward a wanted effect."""

from scldm_cd4.ranking.effects import Arm, Change, Control, EffectSource
from scldm_cd4.ranking.perturbations import rank_perturbations

__all__ = ["Arm", "Change", "Control", "EffectSource", "rank_perturbations"]


def __dir__() -> list[str]:
    return sorted(__all__)

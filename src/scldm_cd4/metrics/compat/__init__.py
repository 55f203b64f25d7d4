"""Other packages' conventions, to set our numbers beside published ones."""

from scldm_cd4.metrics.compat.conventions import CONVENTIONS, Convention, evaluate, vcc2026_score

__all__ = ["CONVENTIONS", "Convention", "evaluate", "vcc2026_score"]

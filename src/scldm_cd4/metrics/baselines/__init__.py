"""Simple predictions that any model should beat."""

from scldm_cd4.metrics.baselines.predictions import BASELINES, Baseline, emit, get, predict

__all__ = ["BASELINES", "Baseline", "emit", "get", "predict"]

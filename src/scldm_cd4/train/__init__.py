"""Training of the two stages: the only place that imports Lightning."""

from scldm_cd4.train.runner import TrainResult, fit

__all__ = ["TrainResult", "fit"]

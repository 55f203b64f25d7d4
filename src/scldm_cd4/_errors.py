"""The errors that this package raises on purpose."""


class ScldmError(Exception):
    """Base of every error that scldm_cd4 raises on purpose."""


class DataError(ScldmError, ValueError):
    """The cells, labels or files given cannot be used as they are."""


class UnknownCategoryError(ScldmError, ValueError):
    """A perturbation, donor or time point that the model was not trained on."""


class GeneMismatchError(ScldmError, ValueError):
    """The genes of the data and of the model do not fit together."""


class CheckpointError(ScldmError, ValueError):
    """A saved model is incomplete, damaged or of an unknown format."""


class NotTrainedError(ScldmError, RuntimeError):
    """The method needs a trained model."""


class TrainingError(ScldmError, RuntimeError):
    """Training could not go on; the model holds the last good weights."""

"""Generate and rank CD4+ T cell perturbation responses with a latent flow-matching transformer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scldm_cd4._errors import (
    CheckpointError,
    DataError,
    GeneMismatchError,
    NotTrainedError,
    ScldmError,
    TrainingError,
    UnknownCategoryError,
)
from scldm_cd4._settings import settings

if TYPE_CHECKING:
    from scldm_cd4 import datasets, metrics, pl, pp
    from scldm_cd4.data.store import open_cells
    from scldm_cd4.model import CD4Model

__version__ = "0.1.0"

__all__ = [
    "CD4Model",
    "CheckpointError",
    "DataError",
    "GeneMismatchError",
    "NotTrainedError",
    "ScldmError",
    "TrainingError",
    "UnknownCategoryError",
    "__version__",
    "datasets",
    "metrics",
    "open_cells",
    "pl",
    "pp",
    "settings",
]


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is first asked for (PEP 562)."""
    if name == "CD4Model":
        value = import_module("scldm_cd4.model").CD4Model
    elif name == "open_cells":
        value = import_module("scldm_cd4.data.store").open_cells
    elif name in ("datasets", "metrics", "pl", "pp"):
        value = import_module(f"scldm_cd4.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""Defaults of a session, for calls that leave them open."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scldm_cd4._errors import DataError


class Settings:
    """Defaults for every model of this session; arguments of a call take precedence.

    Attributes
    ----------
    seed
        Of calls without ``seed``; None draws one, which is recorded with the result.
    batch_size
        Cells per network pass when generating; None goes by the device.
    num_workers
        Processes that prepare batches in training, and threads that generate; None goes by the machine.
    progress
        Show progress bars; None shows them on a terminal or in a notebook only.
    device
        Where new models compute: ``"auto"`` is CUDA where there is one, else the CPU.
    compile
        Compile the flow network with `torch.compile` to generate and to rank: some ten seconds at the first call of a
        session, then 1.1 to 1.2 times as fast on a CPU (latents 1.2 to 1.3). Needs a C++ compiler; without one a
        warning says so. Latents differ from those made without by rounding, and with them a few counts; ``uns`` says
        how cells were made.

    Examples
    --------
    >>> with settings.override(seed=0, progress=False):
    ...     settings.seed
    0
    """

    _KINDS: dict[str, tuple[type, ...]] = {
        "seed": (int, type(None)),
        "batch_size": (int, type(None)),
        "num_workers": (int, type(None)),
        "progress": (bool, type(None)),
        "device": (str,),
        "compile": (bool,),
    }

    def __init__(self) -> None:
        self.seed: int | None = None
        self.batch_size: int | None = None
        self.num_workers: int | None = None
        self.progress: bool | None = None
        self.device: str = "auto"
        self.compile: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._KINDS:
            raise DataError(f"there is no setting {name!r}; settings: {', '.join(self._KINDS)}")
        kinds = self._KINDS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise DataError(f"the setting {name!r} takes {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
        if type(value) is int and value < (1 if name == "batch_size" else 0):
            raise DataError(f"the setting {name!r} cannot be {value}")
        object.__setattr__(self, name, value)

    @contextmanager
    def override(self, **values: Any) -> Iterator["Settings"]:
        """Change settings inside a ``with`` block; they are as before after it, also after an error."""
        before = dict(vars(self))
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


settings = Settings()
"""The settings of this session."""

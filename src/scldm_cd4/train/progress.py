"""What a user sees of a training: one bar per stage or lines in a log, and nothing of Lightning's own talk."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.warnings import PossibleUserWarning

from scldm_cd4._console import Lines, new_bar
from scldm_cd4.train.plans import StagePlan, n_cells

LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
NOISE = (
    r".*does not have many workers",
    r".*available but not used",
    r".*`LeafSpec`",
    r".*LeafSpec.*",
    r".*tensorboardX",
    r".*srun",
    r"Checkpoint directory",
)
WARM = 5.0
"""Seconds of a stage before its length is estimated; the first steps are slow."""
LOSS_EVERY = 1.0
"""Seconds between two looks at the loss, which wait for the device."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence tips, device lines and warnings of Lightning that a user cannot act on, inside the block."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            for message in NOISE:
                warnings.filterwarnings("ignore", message=message)
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Progress(pl.Callback):
    """How far a stage has come: a bar with cells, loss, cells per second and time left, or lines to the logger.

    Parameters
    ----------
    name
        The stage.
    total
        Cells of all epochs.
    bar
        Whether to draw a bar.
    """

    def __init__(self, name: str, total: int, *, bar: bool) -> None:
        self.name, self.total, self.wanted = name, total, bar
        self.bar: Any = None
        self.lines: Lines | None = None
        self.seen = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where a resumed run left off."""
        if not trainer.is_global_zero:
            return
        done = min(self.total, round(self.total * trainer.global_step / max(1, trainer.estimated_stepping_batches)))
        if not self.wanted:
            self.lines = Lines(self.name, self.total - done, "cells", after=WARM)
        else:
            self.bar = new_bar(self.total, self.name, "cells", initial=done)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on."""
        if self.lines is not None:
            self.lines.update(n_cells(batch) * trainer.world_size)
        if self.bar is None:
            return
        now = time.monotonic()
        if now - self.seen > LOSS_EVERY and isinstance(pl_module, StagePlan) and pl_module.train_loss.n:
            self.seen = now
            loss = float(pl_module.train_loss.total) / pl_module.train_loss.n
            self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self.bar.update(n_cells(batch) * trainer.world_size)

    def close(self) -> None:
        """Close the bar; may be called twice."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

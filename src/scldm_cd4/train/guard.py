"""Watch over a stage: history, best weights, early stopping, bad losses, interrupts and checkpoints."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from scldm_cd4._errors import TrainingError
from scldm_cd4.train.plans import Mean, StagePlan

SAVE_EVERY = 60.0
"""Seconds between two checkpoints on disk."""
GRACE = 0.2
"""Share of the epochs whose validation losses do not count: with few held-out cells a lucky early one would win."""
AGREE_EVERY = 10
"""Optimiser steps after which several processes ask each other whether to save or to stop."""
CHECK_EVERY = 50
"""Steps between two looks at the loss on devices where a look makes the processor wait."""


class Guard(pl.Callback):
    """Keeps the record and the good weights of one stage.

    Parameters
    ----------
    every
        Epochs between two validations, which are also the times at which weights are kept.
    patience
        Validations without a better loss after which the stage ends; None never ends early and keeps the last weights.
    constants
        Further columns of the history.
    checkpoint
        File for the training state, rewritten while training; None writes nothing.
    """

    def __init__(
        self,
        *,
        every: int,
        patience: int | None,
        constants: dict[str, float] | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.every, self.patience, self.constants, self.checkpoint = every, patience, constants or {}, checkpoint
        self.rows: list[dict[str, float]] = []
        self.kept: dict[str, Any] | None = None
        self.best, self.wait = math.inf, 0
        self.interrupted = self.stopped_early = self.saved_inside = False
        self.saved = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights of the start."""
        if self.kept is None:
            self.kept = _plan(pl_module).snapshot()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss; honour an interrupt; save from time to time."""
        loader: Any = trainer.train_dataloader
        loader.done = batch_idx + 1
        if pl_module.device.type == "cpu" or batch_idx % CHECK_EVERY == 0:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss became {float(loss)} at step {trainer.global_step}")
        ending = batch_idx + 1 == trainer.num_training_batches  # then the end of the epoch saves
        # gradients gathered over several batches are no part of a checkpoint: stop and save after optimiser steps
        stepped = ending or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.world_size > 1 and (batch_idx + 1) % (AGREE_EVERY * trainer.accumulate_grad_batches):
            stepped = ending  # the processes stop and save together: they ask each other now and then
        if stepped and not ending:
            due = self._due(trainer)
            trainer.should_stop = trainer.should_stop or self.interrupted
            if due or self.interrupted:
                self._save(trainer)
                self.saved_inside = self.interrupted

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch to the history and keep the weights if they are the ones to keep."""
        plan = _plan(pl_module)
        train, held_out = _mean(plan.train_loss, trainer), _mean(plan.validation_loss, trainer)
        epoch = trainer.current_epoch
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        row = {"epoch": epoch, "train_loss": train, "validation_loss": held_out, **self.constants, "lr": float(lr)}
        self.rows.append(row)
        for name in ("train_loss", "validation_loss"):
            plan.log(name, row[name], rank_zero_only=True)
        validated = not math.isnan(held_out) or (trainer.num_val_batches and (epoch + 1) % self.every == 0)
        if validated and not math.isfinite(held_out):
            raise TrainingError(f"the validation loss became {held_out} after epoch {epoch}")
        if validated or (epoch + 1) % self.every == 0:
            self._keep(trainer, plan, held_out)
        due = self._due(trainer)
        trainer.should_stop = trainer.should_stop or self.interrupted
        if not self.saved_inside and (due or trainer.should_stop or epoch + 1 == trainer.max_epochs):
            self._save(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        """Return whether to save by now, and take note of an interrupt, of any process."""
        due = time.monotonic() - self.saved > SAVE_EVERY
        if trainer.world_size > 1:
            flags = torch.tensor([float(due), float(self.interrupted)], device=trainer.strategy.root_device)
            due, self.interrupted = (value > 0 for value in trainer.strategy.reduce(flags, reduce_op="sum").tolist())
        return due

    def _keep(self, trainer: pl.Trainer, plan: StagePlan, held_out: float) -> None:
        settled = trainer.current_epoch + 1 > GRACE * (trainer.max_epochs or 0)
        if self.patience is None or math.isnan(held_out) or not settled:
            self._take(plan)
        elif held_out < self.best:
            self._take(plan)
            self.best, self.wait = held_out, 0
        else:
            self.wait += 1
            if self.wait >= self.patience:
                self.stopped_early = trainer.should_stop = True

    def _take(self, plan: StagePlan) -> None:
        if not all(torch.isfinite(p).all() for p in plan.network.parameters()):
            raise TrainingError("a weight of the network became infinite or not a number")
        self.kept = plan.snapshot()

    def _save(self, trainer: pl.Trainer) -> None:
        self.saved = time.monotonic()
        if self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"rows": self.rows, "kept": self.kept, "best": self.best, "wait": self.wait}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.rows, self.kept = list(state_dict["rows"]), state_dict["kept"]
        self.best, self.wait = state_dict["best"], state_dict["wait"]

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """Let the first interrupt end the stage after the step in hand; the second is a KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def handle(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _plan(module: pl.LightningModule) -> StagePlan:
    assert isinstance(module, StagePlan)
    return module


def _mean(mean: Mean, trainer: pl.Trainer) -> float:
    """Mean over the cells of all processes; not a number without cells."""
    total, n = mean.take()
    if trainer.world_size > 1:
        both = torch.tensor([total, n], dtype=torch.float64, device=trainer.strategy.root_device)
        total, n = trainer.strategy.reduce(both, reduce_op="sum").tolist()
    return total / n if n else math.nan

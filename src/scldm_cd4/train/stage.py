"""Training of one stage under Lightning."""

import gc
import math
import os
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from torch.utils.data import Dataset

from scldm_cd4._compile import compiler_error
from scldm_cd4._console import wants_progress
from scldm_cd4._errors import DataError, TrainingError
from scldm_cd4._precision import KINDS, choose
from scldm_cd4.config import StageConfig
from scldm_cd4.train.checkpoint_io import SafetensorsIO, read_state
from scldm_cd4.train.guard import Guard
from scldm_cd4.train.launch import processes, require_launcher
from scldm_cd4.train.loaders import Batch, make_loader
from scldm_cd4.train.memory import kept_memory
from scldm_cd4.train.plans import StagePlan
from scldm_cd4.train.progress import Progress, quiet
from scldm_cd4.train.rng import isolated_rng

N_VALIDATIONS = 25
"""About so many validations are made in a run."""
REMEDY = (
    "Training stopped and the model holds the last good weights. Try a lower learning rate (plan_kwargs={'lr': ...}), "
    "a larger batch, or fp32 (precision='32'), and check that the counts are raw and have no extreme values."
)


@dataclass(frozen=True)
class Hardware:
    """Where and how a stage runs, in Lightning's words."""

    accelerator: str = "auto"
    devices: Any = "auto"
    precision: Any = "auto"
    num_workers: int = 0
    progress: bool | None = None
    compile: bool = False
    """Compile the training step; all batches then have one size."""
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def accumulate(self) -> int:
        """Batches whose gradients make one optimiser step."""
        return int(self.trainer_kwargs.get("accumulate_grad_batches", 1))


@dataclass
class StageResult:
    """What came of a stage."""

    history: pd.DataFrame
    seconds: float
    batch_size: int
    n_steps: int
    notes: list[str]
    interrupted: bool


def n_epochs(
    config: StageConfig, n: int, batch_size: int, max_epochs: int | None = None, *, accumulate: int = 1
) -> int:
    """Epochs of a stage on `n` cells: those asked for, else of the configuration, else as `target_steps` needs.

    A step takes `accumulate` batches.
    """
    chosen = max_epochs if max_epochs is not None else config.max_epochs
    if chosen is None:
        per_epoch = math.ceil(math.ceil(n / batch_size) / accumulate)
        return min(config.epoch_limit, math.ceil(config.target_steps / per_epoch))
    return _whole(chosen, "max_epochs")


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise DataError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def train_stage(
    plan: StagePlan,
    train: Dataset[Batch],
    validation: Dataset[Batch] | None,
    config: StageConfig,
    *,
    seed: int,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    validation_batch_size: int | None = None,
    hardware: Hardware | None = None,
    early_stopping: bool = True,
    resume_from: Path | None = None,
    checkpoint: Path | None = None,
    constants: dict[str, float] | None = None,
    name: str = "training",
) -> StageResult:
    """Train the network of a plan; it ends with the weights to use, in evaluation mode.

    Parameters
    ----------
    plan
        Step and losses.
    train, validation
        Items are batches at arrays of positions. Without validation cells there is no early stopping.
    config
        Used for epochs and batch size where these are not given.
    seed
        Of the order of the cells; the plan has its own.
    early_stopping
        End when the validation loss no longer falls, and keep the best weights; else keep the last.
    resume_from
        File of training state to go on from.
    checkpoint
        File to write training state to.
    constants
        Further columns of the history.

    Raises
    ------
    TrainingError
        The loss or a weight became infinite or not a number; the network then holds the last good weights.
    CheckpointError
        `resume_from` cannot be read.

    Notes
    -----
    The global generators of torch, numpy and Python are as before. Where memory runs out, the stage starts again with
    half the batch, down to one cell, with a warning: the result is that of the smaller batch.
    """
    hardware = hardware or Hardware()
    require_launcher(hardware.devices)
    n = len(train)  # type: ignore[arg-type]
    if n < 1:
        raise DataError(f"{name}: there are no cells to train on")
    batch = min(config.batch_size if batch_size is None else _whole(batch_size, "batch_size"), n)
    start = {k: v.detach().to("cpu", copy=True) for k, v in plan.network.state_dict().items()}
    began, notes = time.monotonic(), []
    while True:
        try:
            run = _Run(plan, config, n, batch, max_epochs, early_stopping and validation is not None, hardware, seed)
            guard, n_steps = run.fit(
                train,
                validation,
                validation_batch_size or batch * processes()[1],
                resume_from,
                checkpoint,
                constants or {},
                name,
            )
            break
        except RuntimeError as error:
            if not is_out_of_memory(error) or batch == 1 or processes()[1] > 1:  # the others would wait for ever
                raise
            batch //= 2
            notes.append(f"out of memory: batch_size halved to {batch}")
        # outside the except block, so that the traceback no longer holds the tensors of the step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"{name}: the memory ran out; starting again with batch_size={batch}", UserWarning, stacklevel=2)
        plan.network.load_state_dict(start)
    if guard.stopped_early:
        notes.append(f"stopped early after {len(guard.rows)} epochs; the best weights were kept")
    if guard.interrupted:
        notes.append(f"interrupted after {n_steps} steps; the weights of that moment were kept")
    history = pd.DataFrame(guard.rows, columns=["epoch", "train_loss", "validation_loss", *(constants or {}), "lr"])
    return StageResult(history.set_index("epoch"), time.monotonic() - began, batch, n_steps, notes, guard.interrupted)


@dataclass
class _Run:
    """One attempt at a stage, with a given batch size."""

    plan: StagePlan
    config: StageConfig
    n: int
    batch: int
    max_epochs: int | None
    early: bool
    hardware: Hardware
    seed: int

    def fit(
        self,
        train: Dataset[Batch],
        validation: Dataset[Batch] | None,
        validation_batch: int,
        resume_from: Path | None,
        checkpoint: Path | None,
        constants: dict[str, float],
        name: str,
    ) -> tuple[Guard, int]:
        """Train; return the guard and the optimiser steps made."""
        plan, accumulate = self.plan, self.hardware.accumulate
        world = processes()[1]
        epochs = n_epochs(self.config, self.n, self.batch * world, self.max_epochs, accumulate=accumulate)
        every = max(1, epochs // N_VALIDATIONS)
        patience = max(5, math.ceil(0.2 * epochs / every)) if self.early else None
        guard = Guard(every=every, patience=patience, constants=constants, checkpoint=checkpoint)
        hardware = resolve_hardware(self.hardware)
        progress = Progress(name, epochs * self.n, bar=wants_progress(hardware.progress))
        options: dict[str, Any] = {
            "num_workers": hardware.num_workers,
            "pin_memory": hardware.accelerator in ("gpu", "cuda"),
            "even": hardware.compile,
        }
        loader = make_loader(train, self.batch, self.seed, **options)
        if resume_from is not None:  # Lightning's own attempt comes too late, after the length of the run was asked for
            (position,) = read_state(resume_from)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
            loader.load_state_dict(position)
        held_out = None if validation is None else make_loader(validation, validation_batch, None)
        plan.begin()
        plan.network.train()
        if hardware.compile:
            plan.compile_step()
        catching = guard.catching_interrupts()
        with isolated_rng(self.seed), quiet(), catching, matmuls(self.hardware), kept_memory():
            trainer = self._trainer(hardware, epochs, every, len(loader), [guard, progress])
            try:
                trainer.fit(plan, loader, held_out, ckpt_path=resume_from and str(resume_from))
            except TrainingError as error:
                self._restore(guard)
                raise TrainingError(f"{name}: {error}. {REMEDY}") from None
            except SystemExit as stop:  # how Lightning ends on a KeyboardInterrupt
                if not isinstance(stop.__context__, KeyboardInterrupt):
                    raise
                guard.interrupted = True
            finally:
                progress.close()
        if guard.interrupted:
            plan.network.eval()
        else:
            self._restore(guard)
        return guard, trainer.global_step

    def _restore(self, guard: Guard) -> None:
        if guard.kept is not None:
            self.plan.restore(guard.kept)
        self.plan.network.eval()

    def _trainer(self, hardware: Hardware, epochs: int, every: int, n_batches: int, callbacks: list[Any]) -> pl.Trainer:
        extra = dict(hardware.trainer_kwargs)
        options: dict[str, Any] = {
            "max_epochs": epochs,
            "accelerator": hardware.accelerator,
            "devices": hardware.devices,
            "precision": hardware.precision,
            "gradient_clip_val": self.config.clip_norm or None,
            "check_val_every_n_epoch": every,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10**9,
            "use_distributed_sampler": False,
            "callbacks": [*callbacks, *extra.pop("callbacks", [])],
            "plugins": [SafetensorsIO(), *extra.pop("plugins", [])],
        }
        target = self.config.target_steps * hardware.accumulate
        if self.max_epochs is None and self.config.max_epochs is None and n_batches > target:
            options["limit_train_batches"] = target  # one pass over the cells would be longer
        if processes()[1] > 1:
            options["num_nodes"] = processes()[1] // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            options["strategy"] = "ddp"  # every parameter takes part in every step
        return pl.Trainer(**options | extra)


def resolve_hardware(hardware: Hardware) -> Hardware:
    """Replace ``auto``: CUDA where it is, one device unless started by torchrun, bf16 on CUDA and fp32 elsewhere."""
    accelerator, devices, precision = _accelerator(hardware), hardware.devices, hardware.precision
    if devices == "auto":
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if precision == "auto":
        bf16 = accelerator in ("gpu", "cuda") and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16-mixed" if bf16 else "32-true"
    precision = {"fp32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed"}.get(precision, precision)
    return replace(hardware, accelerator=accelerator, devices=devices, precision=precision)


def _accelerator(hardware: Hardware) -> str:
    if hardware.accelerator != "auto":
        return hardware.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def matmuls(hardware: Hardware) -> AbstractContextManager[None]:
    """Return the context in which fp32 products are made as the precision asks; Lightning itself casts to bf16."""
    device = {"gpu": "cuda"}.get(_accelerator(hardware), _accelerator(hardware))
    if device not in ("cpu", "cuda") or str(hardware.precision) not in ("auto", *KINDS):
        return nullcontext()  # a precision of Lightning's own
    return choose(hardware.precision, torch.device(device)).matmuls()


def without_compiler(hardware: Hardware) -> tuple[Hardware, str | None]:
    """Return the hardware, not to be compiled for where that cannot be, and then a sentence that says so."""
    if not hardware.compile:
        return hardware, None
    error = compiler_error({"gpu": "cuda"}.get(_accelerator(hardware), _accelerator(hardware)))
    if error is None:
        return hardware, None
    return replace(hardware, compile=False), f"compile=True is not possible here, training goes on without: {error}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a GPU or in its allocator on the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text and ("memory" in text)

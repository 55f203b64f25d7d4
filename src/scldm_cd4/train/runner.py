"""Training of both stages, one after the other."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4.config import STAGES, ModelConfig, StageConfig
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.splits import Split
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.train.checkpoint_io import (
    RECORD,
    has_state,
    read_state,
    recorded_seed,
    recorded_split,
    write_json,
    write_split,
    write_state,
)
from scldm_cd4.train.effects import set_label_effects
from scldm_cd4.train.initialise import initialise_from_data
from scldm_cd4.train.labels import settle_labels
from scldm_cd4.train.latent_cache import cached_latents, discard
from scldm_cd4.train.latents import encode_rows, inference_batch_size, latent_bytes
from scldm_cd4.train.launch import connect, idle_devices, processes, require_launcher, wait_for_all
from scldm_cd4.train.loaders import CountBatches, LatentBatches
from scldm_cd4.train.options import by_stage, check_keywords, stage_configs
from scldm_cd4.train.plans import FlowPlan, VAEPlan
from scldm_cd4.train.plateau import LatentUse, Profile, latent_use
from scldm_cd4.train.rng import isolated_rng, key_seed
from scldm_cd4.train.stage import Hardware, StageResult, train_stage, without_compiler
from scldm_cd4.train.theta import refit_theta

Stage = Literal["both", "vae", "flow"]
MAX_VALIDATION = 1_000
"""Cells that a validation looks at."""
MAX_LATENT_BYTES = 4 * 2**30
"""Cached latents above this size go to a file, where there is a folder for it."""
STREAMED_LATENT_BYTES = 2**24
"""The same for cells that are read from files, whose training should take as little memory as their number allows."""


@dataclass
class TrainResult:
    """What came of a training; dicts have the keys ``vae`` and ``flow``."""

    seed: int = 0
    history: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Losses by epoch."""
    seconds: dict[str, float] = field(default_factory=dict)
    batch_size: dict[str, int] = field(default_factory=dict)
    n_steps: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a user should know: early stops, halved batches."""
    interrupted: bool = False
    trained: dict[str, bool] = field(default_factory=dict)
    """Whether the stage ran to its end, in this call or in the one resumed."""
    theta_refitted: bool = False
    latent_use: LatentUse | None = None
    """Held-out likelihoods that tell whether the decoder uses the latent."""
    dit: DiT | None = None
    """The flow network; it holds the averaged weights, which generate."""
    online: dict[str, Tensor] | None = None
    """Its weights at the last step, without averaging."""


def fit(
    vae: VAE,
    dit_factory: Callable[[], DiT],
    cells: CellData,
    split: Split,
    config: ModelConfig,
    *,
    seed: int | None = None,
    stage: Stage = "both",
    max_epochs: int | Mapping[str, int] | None = None,
    batch_size: int | Mapping[str, int] | None = None,
    plan_kwargs: Mapping[str, Any] | None = None,
    accelerator: str = "auto",
    devices: Any = "auto",
    precision: Any = "auto",
    early_stopping: bool = True,
    resume_from: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    num_workers: int = 0,
    progress: bool | None = None,
    compile: bool = False,
    result: TrainResult | None = None,
    **trainer_kwargs: Any,
) -> TrainResult:
    """Train the autoencoder, then the flow on its latents.

    Parameters
    ----------
    vae
        The autoencoder, trained in place.
    dit_factory
        Gives the flow network when its stage begins, fresh or trained before.
    cells, split
        The cells and their parts.
    config
        How each stage is trained.
    seed
        Of everything drawn. None takes the one of the training resumed, else draws one; the result tells which.
    stage
        Which stages to train; ``flow`` takes the autoencoder as it is.
    max_epochs, batch_size
        One value, or a dict with keys ``vae`` and ``flow``.
    plan_kwargs
        Changes of the `StageConfig`, such as ``{"lr": 1e-3}``, or a dict of them by stage.
    resume_from
        Folder given as `checkpoint_dir` before; goes on where that training stopped.
    checkpoint_dir
        Folder for training state, about once a minute and at the end of a stage; None writes nothing.
    num_workers
        Processes that prepare batches of counts.
    progress
        Show a bar; None on a terminal or in a notebook only.
    compile
        Compile the decoder and the flow network for training with `torch.compile`, which takes up to a minute and a
        C++ compiler. Where that cannot be, training goes on without and warns once. Batches then have one size, for
        which a few cells are repeated in each epoch.
    result
        Filled as stages end, so that a caller knows what an exception left.
    trainer_kwargs
        Passed to ``lightning.pytorch.Trainer``; with ``accumulate_grad_batches`` an optimiser step takes so many
        batches, and steps, schedules and averages count optimiser steps.

    Raises
    ------
    DataError
        A stage or a setting is unknown, `checkpoint_dir` holds the state of another training, that of `resume_from`
        had other cells, genes or parts, or there are no labels for the flow.
    TrainingError
        A loss became infinite or not a number; the network holds the last good weights.
    CheckpointError
        `resume_from` has no usable training state.

    Notes
    -----
    Warns when the trained decoder makes little use of the latent.
    """
    if stage not in ("both", *STAGES):
        raise DataError(f"stage must be 'both', 'vae' or 'flow', got {stage!r}")
    check_keywords(trainer_kwargs, inspect.signature(fit).parameters)
    settings = {
        "max_epochs": by_stage(max_epochs, "max_epochs"),
        "batch_size": by_stage(batch_size, "batch_size"),
        "config": stage_configs(config, plan_kwargs),
    }
    asked = Hardware(accelerator, devices, precision, num_workers, progress, compile, trainer_kwargs)
    hardware, note = without_compiler(asked)
    require_launcher(devices)
    connect(accelerator)
    resume, folder = (None if path is None else Path(path) for path in (resume_from, checkpoint_dir))
    seed = _resolve_seed(seed, resume)
    job = _Job(vae, cells, split, seed, settings, hardware, early_stopping, resume, folder, result or TrainResult())
    if note is not None:
        job.result.notes.append(note)
        warnings.warn(note, UserWarning, stacklevel=2)
    if idle := idle_devices():
        job.result.notes.append(idle)
        warnings.warn(idle, UserWarning, stacklevel=2)
    if stage in ("both", "vae"):
        job.train_vae()
    if stage in ("both", "flow") and not job.result.interrupted:
        job.train_flow(dit_factory)
    return job.result


@dataclass
class _Job:
    """A training in progress."""

    vae: VAE
    cells: CellData
    split: Split
    seed: int
    settings: dict[str, dict[str, Any]]
    hardware: Hardware
    early_stopping: bool
    resume_from: Path | None
    folder: Path | None
    result: TrainResult = field(default_factory=TrainResult)
    scratch: Any = None
    """Folder for latents where none was given."""

    def __post_init__(self) -> None:
        if self.resume_from is not None:
            if not has_state(self.resume_from):
                raise CheckpointError(f"there is no training state in {self.resume_from}")
            self.folder = self.folder or self.resume_from
        if self.folder is not None and self.folder != self.resume_from and has_state(self.folder):
            raise DataError(
                f"{self.folder} holds the state of another training: resume_from= goes on, or choose another"
            )
        self.result.seed = self.seed
        self.writes = self.folder is not None and processes()[0] == 0
        if self.resume_from is not None:
            recorded = recorded_split(self.resume_from, self.cells)
            if recorded is not None and not np.array_equal(recorded.parts, self.split.parts):
                raise DataError(
                    f"the training in {self.resume_from} held out other cells: leave out split= and shares to resume it"
                )
        if self.folder is not None and self.writes:
            write_json(self.folder / RECORD, {"seed": self.seed})
            write_split(self.folder, self.split, self.cells.registry)
        generator = np.random.default_rng(key_seed(self.seed, 10))
        held_out = self.split.validation
        if len(held_out) > MAX_VALIDATION:
            held_out = np.sort(generator.choice(held_out, MAX_VALIDATION, replace=False))
        self.held_out: NDArray[np.int64] = held_out

    def train_vae(self) -> None:
        """Train the autoencoder, refit its dispersions, and look whether the latent is used."""
        config: StageConfig = self.settings["config"]["vae"]
        if self._take_finished_vae():
            return
        rows, vae = self.split.train, self.vae
        generator = np.random.default_rng(key_seed(self.seed, 11))
        if config.data_init:
            with isolated_rng(key_seed(self.seed, 12)):
                initialise_from_data(vae, self.cells, rows, generator)
        profile = Profile.fit(self.cells, rows, np.random.default_rng(key_seed(self.seed, 13)))

        def batches(rows: NDArray[np.int64], key: int) -> CountBatches:
            return CountBatches(
                self.cells,
                rows,
                expressed=vae.config.encode == "expressed",
                shown=config.shown,
                shown_whole=config.shown_whole,
                seed=key_seed(self.seed, key),
            )

        held_out = batches(self.held_out, 16) if len(self.held_out) else None
        compared = held_out or batches(rows[:MAX_VALIDATION], 16)
        mean_profile = profile.nll(vae, compared)
        result = self._stage(
            "vae",
            VAEPlan(vae, config, key_seed(self.seed, 14)),
            batches(rows, 17),
            held_out,
            validation_batch_size=inference_batch_size(vae.n_genes),
            constants={"mean_profile_nll": mean_profile},
        )
        if vae.config.label_rank and self.cells.labels is not None:
            set_label_effects(vae, self.cells, rows, np.random.default_rng(key_seed(self.seed, 19)))
        if config.refit_theta:
            generator = np.random.default_rng(key_seed(self.seed, 15))
            whole = [
                CountBatches(self.cells, r, expressed=vae.config.encode == "expressed") for r in (rows, self.held_out)
            ]
            self.result.theta_refitted = refit_theta(vae, whole[0], generator, whole[1] if len(self.held_out) else None)
        if result.interrupted:
            return
        self.result.latent_use = use = latent_use(vae, compared, mean_profile)
        if use.ignored:
            self.result.notes.append(use.warning())
            warnings.warn(use.warning(), UserWarning, stacklevel=4)
        if self.folder is not None and self.writes:
            state = {"network": vae.state_dict(), "rows": self.result.history["vae"].reset_index().to_dict("records")}
            write_state(state | {"theta_refitted": self.result.theta_refitted}, self.folder / "vae_done.safetensors")

    def train_flow(self, dit_factory: Callable[[], DiT]) -> None:
        """Encode all cells once and train the flow on their latents."""
        if (labels := self.cells.labels) is None:
            raise DataError("the flow stage needs labels: build the cells with labels=True")
        config: StageConfig = self.settings["config"]["flow"]
        with isolated_rng(key_seed(self.seed, 20)):
            dit = dit_factory()
        parts = [self._latents(rows, name) for name, rows in (("train", self.split.train), ("held_out", self.held_out))]
        train, held_out = (
            LatentBatches(z, torch.from_numpy(labels[rows].astype(np.int32)), balance=config.balance)
            if z is not None
            else None
            for z, rows in zip(parts, (self.split.train, self.held_out), strict=True)
        )
        plan = FlowPlan(dit, config, key_seed(self.seed, 21))
        self._stage("flow", plan, train, held_out, hardware=replace(self.hardware, num_workers=0))
        self.result.online = {k: v.detach().to("cpu", copy=True) for k, v in dit.state_dict().items()}
        if plan.ema is not None:
            plan.ema.to(next(dit.parameters()).device).copy_to(dit)
        if self.vae.config.label_rank and not self.result.interrupted:
            assert train is not None  # there are training cells
            seed = key_seed(self.seed, 22)
            settle_labels(self.vae, dit, self.cells, self.split.train, train.latents, train.labels, seed)
        self._forget_latents()
        self.result.dit = dit

    def _latents(self, rows: NDArray[np.int64], name: str) -> Tensor | None:
        if not len(rows):
            return None
        streamed, shared = self.cells.block > 1, processes()[1] > 1 and self.folder is not None
        most = STREAMED_LATENT_BYTES if streamed else MAX_LATENT_BYTES
        if not shared and (latent_bytes(self.vae.config, len(rows)) <= most or (self.folder is None and not streamed)):
            return encode_rows(self.vae, self.cells, rows)
        if self.folder is None and self.scratch is None:
            self.scratch = TemporaryDirectory(prefix="scldm_cd4_")
        folder = self.folder or Path(self.scratch.name if self.scratch is not None else ".")
        return cached_latents(self.vae, self.cells, rows, folder / f"latents_{name}.bin")

    def _forget_latents(self) -> None:
        wait_for_all()
        if self.scratch is not None:
            self.scratch.cleanup()
        if self.folder is not None and self.writes and not self.result.interrupted:
            for name in ("train", "held_out"):
                discard(self.folder / f"latents_{name}.bin")

    def _stage(self, name: str, plan: Any, train: Any, held_out: Any, **options: Any) -> StageResult:
        resume = None if self.resume_from is None else self.resume_from / f"{name}.safetensors"
        options = {"hardware": self.hardware} | options
        result = train_stage(
            plan,
            train,
            held_out,
            self.settings["config"][name],
            seed=key_seed(self.seed, 30, list(STAGES).index(name)),
            max_epochs=self.settings["max_epochs"][name],
            batch_size=self.settings["batch_size"][name],
            early_stopping=self.early_stopping,
            resume_from=resume if resume is not None and resume.is_file() else None,
            checkpoint=None if self.folder is None else self.folder / f"{name}.safetensors",
            name=STAGES[name],
            **options,
        )
        out = self.result
        out.history[name], out.seconds[name], out.batch_size[name] = result.history, result.seconds, result.batch_size
        out.n_steps[name], out.interrupted = result.n_steps, result.interrupted
        out.trained[name] = not result.interrupted
        world, accumulate = processes()[1], self.hardware.accumulate
        if world * accumulate > 1:
            lr = self.settings["config"][name].lr
            out.notes.append(
                f"{name}: effective batch {result.batch_size * world * accumulate} = {result.batch_size} x {world} "
                f"processes x {accumulate} accumulated, learning rate {lr:g}, not scaled by these"
            )
        out.notes += [f"{name}: {note}" for note in result.notes]
        return result

    def _take_finished_vae(self) -> bool:
        path = None if self.resume_from is None else self.resume_from / "vae_done.safetensors"
        if path is None or not path.is_file():
            return False
        state = read_state(path)
        self.vae.load_state_dict(state["network"])
        self.vae.eval()
        self.result.history["vae"] = pd.DataFrame(state["rows"]).set_index("epoch")
        self.result.theta_refitted, self.result.trained["vae"] = state["theta_refitted"], True
        self.result.notes.append("vae: taken from the training that was resumed")
        return True


def _resolve_seed(seed: int | None, resume: Path | None) -> int:
    if resume is None:
        return int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
    recorded = recorded_seed(resume)
    if seed is not None and seed != recorded:
        raise DataError(f"the training in {resume} has seed {recorded}, not {seed}: leave seed out to resume it")
    return recorded

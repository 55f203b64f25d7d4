"""The command that trains: by a preset, or by a config in the style of the reference."""

import argparse
import os
import shutil
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scldm_cd4 import CD4Model, open_cells
from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4.checkpoint import job as jobs
from scldm_cd4.checkpoint.native import load_folder
from scldm_cd4.checkpoint.reference import CLASS_NAMES
from scldm_cd4.cli._arguments import KEYS
from scldm_cd4.cli._config import compose
from scldm_cd4.cli._paths import say
from scldm_cd4.config import PRESETS, STAGES, FlowConfig, ModelConfig, StageConfig, VAEConfig
from scldm_cd4.data.files import open_h5ad
from scldm_cd4.train.checkpoint_io import RECORD, has_state, recorded_seed


@dataclass(frozen=True)
class Plan:
    """What is to be trained on which cells."""

    config: ModelConfig
    stage: str
    data: Path
    keys: dict[str, Any]
    seed: int | None
    vae: str | None
    job: jobs.Job | None = None


def train(options: argparse.Namespace) -> str:
    """Train, and save the model."""
    processes = take_launcher(os.environ)
    first = os.environ.get("RANK", "0") == "0"
    state = options.out.with_name(f".{options.out.name}.training")
    if options.out.exists() and not options.overwrite:
        if options.resume and _is_model(options.out) and not has_state(state):
            return f"{options.out}\n"  # it ended before
        if not options.resume:
            raise DataError(f"--out {options.out} exists; give another folder, or --overwrite to replace it")
    elif options.out.exists() and not _is_model(options.out) and any(options.out.iterdir()):
        raise DataError(f"--out {options.out} is no saved model, and is not replaced; give another folder")
    plan = _by_config(options) if options.config_name is not None else _by_preset(options)
    if processes > 1 and plan.seed is None and not options.resume:
        raise DataError("several processes need one seed: give --seed N")
    adata = open_cells(plan.data) if options.stream or plan.data.is_dir() else open_h5ad(plan.data)
    CD4Model.setup_anndata(adata, **plan.keys)
    if plan.job is not None:
        _check_sizes(plan, adata)
    model = _model(plan, adata, options)
    stages = {name: _stage(plan.config, name, options) for name in (STAGES if plan.stage == "both" else [plan.stage])}
    accumulate = _accumulated(plan.job)
    for name, stage in stages.items() if first else ():
        say(describe(name, stage, processes, accumulate))
    arguments = _arguments(options, plan, state, accumulate)
    model.train(stage=plan.stage, checkpoint_dir=state, **arguments)
    if any(model.training_[name]["interrupted"] for name in stages):
        raise KeyboardInterrupt
    if not first:
        return ""
    model.save(options.out, overwrite=options.overwrite or options.resume)
    shutil.rmtree(state, ignore_errors=True)
    if options.test and model.is_trained_:
        say(f"held-out cells are scored by: scldm-cd4 evaluate {plan.data} --model {options.out}")
    return f"{options.out}\n"


def take_launcher(environ: MutableMapping[str, str]) -> int:
    """Return the number of processes; under SLURM, set the variables that torchrun would have set.

    Parameters
    ----------
    environ
        Variables of the process; ``srun`` gives SLURM_PROCID, SLURM_NTASKS and SLURM_NTASKS_PER_NODE.
    """
    tasks = int(environ.get("SLURM_NTASKS", 1))
    if "WORLD_SIZE" not in environ and tasks > 1 and "SLURM_PROCID" in environ:
        nodes = int(environ.get("SLURM_NNODES", 1))
        environ["WORLD_SIZE"], environ["RANK"] = str(tasks), environ["SLURM_PROCID"]
        environ["LOCAL_WORLD_SIZE"] = environ.get("SLURM_NTASKS_PER_NODE", str(tasks // nodes))
        environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
        environ.setdefault("MASTER_ADDR", environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        environ.setdefault("MASTER_PORT", str(20_000 + int(environ.get("SLURM_JOB_ID", 0)) % 20_000))
    return int(environ.get("WORLD_SIZE", 1))


def describe(name: str, stage: StageConfig, processes: int, accumulate: int) -> str:
    """Return a sentence on learning rate and batch that are in effect."""
    cells = stage.batch_size * processes * accumulate
    return (
        f"{STAGES[name]}: effective learning rate {stage.lr:g} (not scaled by the number "
        f"of processes), effective batch {cells} cells = {stage.batch_size} x {processes} processes x {accumulate} "
        "accumulated"
    )


def _by_preset(options: argparse.Namespace) -> Plan:
    if options.overrides or options.config_dir is not None:
        raise DataError("KEY=VALUE and --config-dir change a config: name it with --config-name")
    if options.data is None or options.perturbation_key is None:
        raise DataError("give the h5ad of the cells, and --perturbation-key (the obs column of the perturbations)")
    stage = options.stage or ("flow" if options.vae else "both")
    if (stage == "flow") != (options.vae is not None):
        raise DataError("--stage flow needs a trained autoencoder, --vae MODEL, and --vae is for the flow alone")
    keys = {name: getattr(options, name) for name in KEYS}
    return Plan(PRESETS[options.preset or "small"], stage, options.data, keys, options.seed, options.vae)


def _by_config(options: argparse.Namespace) -> Plan:
    if options.preset is not None or options.stage is not None:
        raise DataError("--config-name gives sizes and stage: leave out --preset and --stage")
    job = compose(options.config_name, options.config_dir, options.overrides)
    stage = "flow" if job.has("model.module.diffusion_model") else "vae"
    config = replace(
        PRESETS["cd4"],
        vae=jobs.configured(job, VAEConfig(), jobs.vae_fields(job)),
        flow=jobs.configured(job, FlowConfig(), jobs.flow_fields(job)) if stage == "flow" else FlowConfig(),
        **{f"train_{stage}": jobs.stage_config(job, stage)},
    )
    data = options.data
    if data is None:
        key = "datamodule.datamodule.train_adata_path"
        if not job.has(key):
            raise DataError(f"give the h5ad of the cells, or {key}=FILE")
        data = Path(job.text(key))
    named = set(job.get("datamodule.label_encoder.class_vocab_sizes") or {})
    keys: dict[str, Any] = {
        f"{role}_key": getattr(options, f"{role}_key") or (name if name in named else None)
        for role, name in CLASS_NAMES.items()
    }
    keys |= {"control": options.control or jobs.control_name(job) or "NTC", "layer": options.layer}
    seed = options.seed if options.seed is not None else (job.whole("seed") if job.has("seed") else None)
    return Plan(config, stage, data, keys, seed, _vae_of(options, job) if stage == "flow" else None, job)


def _vae_of(options: argparse.Namespace, job: jobs.Job) -> str:
    if options.vae is not None:
        return str(options.vae)
    at = "model.module.vae_as_tokenizer.load_from_checkpoint"
    if not (job.has(f"{at}.ckpt_path") and job.has(f"{at}.job_name")):
        raise DataError("the flow needs a trained autoencoder: --vae MODEL, or vae_model_params.ckpt_path=FOLDER")
    folder = Path(job.text(f"{at}.ckpt_path")) / job.text(f"{at}.job_name")
    return str(folder / f"epoch={job.whole(f'{at}.epoch')}.ckpt" if job.has(f"{at}.epoch") else folder)


def _check_sizes(plan: Plan, adata: Any) -> None:
    """Refuse cells that do not have the sizes that the config gives."""
    assert plan.job is not None
    problems = []
    said = jobs.n_genes(plan.job)
    if said is not None and said != adata.n_vars:
        problems.append(f"datamodule.label_encoder.n_genes={adata.n_vars} (the config says {said})")
    columns = {CLASS_NAMES[role]: plan.keys[f"{role}_key"] for role in CLASS_NAMES}
    for name, size in jobs.class_sizes(plan.job).items():
        column = columns.get(name)
        found = 0 if column is None else adata.obs[column].nunique()
        if found != size:
            problems.append(f"datamodule.label_encoder.class_vocab_sizes.{name}={found} (the config says {size})")
    if problems:
        raise DataError(f"the cells have other sizes than the config; add {', '.join(problems)}")


def _model(plan: Plan, adata: Any, options: argparse.Namespace) -> CD4Model:
    if plan.stage != "flow":
        model = CD4Model(adata, plan.config)
    else:
        assert plan.vae is not None
        model = CD4Model.from_pretrained(plan.vae, adata=adata, allow_pickle=options.allow_pickle)
        config = replace(model.config, flow=plan.config.flow, train_flow=plan.config.train_flow)
        model._state.config, model._state.dit = config, None
    model.to_device(options.device)
    return model


def _stage(config: ModelConfig, name: str, options: argparse.Namespace) -> StageConfig:
    stage: StageConfig = getattr(config, f"train_{name}")
    return stage if options.batch_size is None else replace(stage, batch_size=options.batch_size)


def _arguments(options: argparse.Namespace, plan: Plan, state: Path, accumulate: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "max_epochs": options.max_epochs,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "seed": plan.seed,
        "split": {"validation": options.validation} | ({"test": options.test} if options.test else {}),
    }
    if plan.job is not None:
        precision = plan.job.get("training.trainer.precision", 32)
        out |= {"early_stopping": False, "precision": "32-true" if str(precision) in ("32", "32.0") else str(precision)}
        out["accumulate_grad_batches"] = accumulate
    if options.device != "auto":
        kind, _, number = options.device.partition(":")
        out |= {"accelerator": kind, "devices": [int(number)] if number.isdigit() else "auto"}
    if options.resume:
        if (state / RECORD).exists():
            out["seed"] = recorded_seed(state)
        if has_state(state):
            out |= {"resume_from": state, "seed": None}
        say(
            "going on with the training"
            if has_state(state)
            else "no state was written yet: starting from the beginning"
        )
    elif has_state(state):
        if not options.overwrite:
            raise DataError(f"{state} holds a training that did not end: --resume goes on, --overwrite starts again")
        shutil.rmtree(state)
    return out


def _accumulated(job: jobs.Job | None) -> int:
    key = "training.trainer.accumulate_grad_batches"
    return job.whole(key) if job is not None and job.has(key) else 1


def _is_model(path: Path) -> bool:
    try:
        load_folder(path)
    except CheckpointError:
        return False
    return True

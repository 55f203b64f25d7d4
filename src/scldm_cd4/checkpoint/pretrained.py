"""A folder in the reference's layout, turned into what a model is made of."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4.checkpoint import job as jobs
from scldm_cd4.checkpoint.folder import check_link
from scldm_cd4.checkpoint.native import MANIFEST
from scldm_cd4.checkpoint.reference import CLASS_NAMES, Reference, from_reference, read_safetensors
from scldm_cd4.checkpoint.vocabulary import (
    FILE,
    Vocabulary,
    find_size_factors,
    is_registry,
    read_json,
    read_size_factors,
    read_vocabulary,
)
from scldm_cd4.config import PRESETS, ROLES, FlowConfig, ModelConfig, VAEConfig
from scldm_cd4.registry import Registry
from scldm_cd4.size_factors import SizeFactors

WEIGHTS, CONFIG, REGISTRY, CHECKSUMS = "model.safetensors", "config.yaml", "registry.json", "checksums.json"
Copy = Literal["auto", "ema", "online"]


@dataclass(frozen=True)
class Options:
    """How a reference checkpoint is read; see `scldm_cd4.CD4Model.from_pretrained`."""

    vocabulary: Any = None
    size_factors: Any = None
    control: str | None = None
    weights: Copy = "auto"
    allow_pickle: bool = False
    columns: Mapping[str, str] | None = None
    vae: Mapping[str, Any] = field(default_factory=dict)
    flow: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pretrained:
    """What a model is made of."""

    config: ModelConfig
    registry: Registry
    vae_state: dict[str, Tensor]
    dit_state: dict[str, Tensor]
    """Empty for a job of the autoencoder alone."""
    facts: dict[str, Any]
    """Where the weights come from, as plain values."""


def is_reference(path: Path) -> bool:
    """Whether a path is a file of weights, or a folder with such files that this package did not save."""
    if path.is_file():
        return path.suffix in (".safetensors", ".ckpt")
    return path.is_dir() and not (path / MANIFEST).exists() and bool(_candidates(path) or (path / CONFIG).exists())


def has_vocabulary(path: Path) -> bool:
    """Whether genes and labels stand beside the weights."""
    folder = path if path.is_dir() else path.parent
    return (folder / FILE).is_file() or (folder / REGISTRY).is_file()


def read_reference(source: str | Path, options: Options) -> Pretrained:
    """Read a checkpoint of the reference.

    Parameters
    ----------
    source
        The folder of a job (weights and ``config.yaml``), or its file of weights.
    options
        What the folder does not hold.

    Raises
    ------
    CheckpointError
        Something is missing, damaged, or does not fit; all that does not fit is named.
    """
    path = _weights_file(Path(source).expanduser())
    _verify(path.parent)
    job = jobs.Job.read(path.parent / CONFIG) if (path.parent / CONFIG).exists() else None
    tensors = _open(path, options.allow_pickle)
    columns = _class_columns(tensors, options.columns)
    names = {role: name for role, name in columns.items() if name is not None}
    found = _convert(tensors, job, names, options)
    _refuse_non_finite(found)
    options = replace(options, vocabulary=_opened(options.vocabulary, path.parent))
    vocabulary = _vocabulary(path.parent, columns, options, job)
    _check_sizes(found, vocabulary, job, columns)
    config = _model_config(found, job, options)
    step = tensors.get("ema_model.step")
    facts = {
        "layout": "scLDM.CD4 reference",
        "weights": found.weights,
        "ema_step": None if step is None else int(step),
        "n_tensors": len(tensors),
    }
    size_factors = _size_factors(path.parent, vocabulary, options)
    registry = _with_training_cells(vocabulary.registry(size_factors), options.vocabulary)
    return Pretrained(config, registry, found.vae_state, found.dit_state, facts)


def _candidates(folder: Path) -> list[Path]:
    first = [folder / WEIGHTS, folder / "last.ckpt"]
    others = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".ckpt") and p not in first)
    return [p for p in [*first, *others] if p.exists()]


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise CheckpointError(f"there is no file or folder {source}")
    found = _candidates(source)
    if not found:
        raise CheckpointError(f"{source} holds no weights: neither {WEIGHTS} nor a .ckpt file")
    safe = [p for p in found if p.suffix == ".safetensors"]
    chosen = safe or found
    if len(chosen) > 1 and chosen[0].name not in (WEIGHTS, "last.ckpt"):
        names = ", ".join(p.name for p in chosen)
        raise CheckpointError(f"{source} holds several files of weights ({names}): name the one to read")
    return chosen[0]


def _open(path: Path, allow_pickle: bool) -> Mapping[str, Tensor]:
    check_link(path)
    if path.suffix != ".ckpt":
        return read_safetensors(path)
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a Lightning checkpoint, a pickled file. Pass allow_pickle=True if you trust where it comes "
            "from: its tensors are then read, and nothing in it is run"
        )
    from scldm_cd4.checkpoint.inert import read_lightning

    return read_lightning(path)


def _verify(folder: Path) -> None:
    """Compare the files of an exported folder with its checksums; other folders have none."""
    path = folder / CHECKSUMS
    if not path.exists():
        return
    for name, expected in read_json(path).items():
        if name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(f"{path} names {name!r}, which is outside the folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing")
        check_link(folder / name)
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise CheckpointError(f"{folder / name} is damaged: its checksum is not the one that was written")


def _class_columns(tensors: Mapping[str, Tensor], given: Mapping[str, str] | None) -> dict[str, str | None]:
    """Return the class name by role; None for a role that the checkpoint does not know."""
    present = {key.split("class_embeddings.")[1].split(".")[0] for key in tensors if "class_embeddings." in key}
    known: dict[str, str] = dict(CLASS_NAMES) if given is None else dict(given)
    if unknown := sorted(set(known) - set(ROLES)):
        raise CheckpointError(f"columns= maps the roles {', '.join(ROLES)} to class names, not {', '.join(unknown)}")
    if not present:
        return {role: known.get(role) for role in ROLES}
    if lost := sorted(present - set(known.values())):
        raise CheckpointError(
            f"the checkpoint has the condition classes {', '.join(sorted(present))}: say what {', '.join(lost)} means, "
            "for example columns={'perturbation': ..., 'donor': ...}"
        )
    if given is not None and (lost := sorted(set(given.values()) - present)):
        raise CheckpointError(
            f"the checkpoint has no condition class {', '.join(lost)}, but {', '.join(sorted(present))}"
        )
    columns = {role: known[role] if known.get(role) in present else None for role in ROLES}
    if columns["perturbation"] is None:
        raise CheckpointError(
            "the checkpoint has no class of perturbations: name it with columns={'perturbation': ...}"
        )
    return columns


def _convert(
    tensors: Mapping[str, Tensor], job: jobs.Job | None, names: Mapping[str, str], options: Options
) -> Reference:
    vae = (jobs.vae_fields(job) if job else {}) | dict(options.vae)
    flow = (jobs.flow_fields(job) if job else {}) | dict(options.flow)
    read = job or jobs.Job({}, "vae=, flow=")
    jobs.configured(read, VAEConfig(), vae)
    jobs.configured(read, FlowConfig(), flow)
    try:
        return from_reference(tensors, weights=options.weights, class_names=names, vae=vae, flow=flow)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        where = (
            f"{job.where} and the weights do not fit together" if job else f"there is no {CONFIG} beside the weights"
        )
        raise CheckpointError(f"{where}: {error}") from error


def _refuse_non_finite(found: Reference) -> None:
    states = {"vae_model.": found.vae_state, "diffusion_model.": found.dit_state}
    bad = [p + k for p, state in states.items() for k, v in state.items() if not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(f"these tensors hold values that are not finite: {', '.join(bad[:5])}")


def _vocabulary(folder: Path, columns: Mapping[str, str | None], options: Options, job: jobs.Job | None) -> Vocabulary:
    source = options.vocabulary
    if source is None:
        if not (folder / FILE).is_file():
            raise CheckpointError(
                f"the checkpoint in {folder} holds no gene names and labels, and there is no {FILE} beside it: pass "
                "vocabulary= (the training AnnData, its h5ad file, or a JSON file with 'genes' and the labels of "
                f"{', '.join(repr(c) for c in columns.values() if c)} in the order of their codes)"
            )
        check_link(folder / FILE)
        source = folder / FILE
    vocabulary = Vocabulary.of(source) if isinstance(source, Registry) else read_vocabulary(source, columns)
    levels = vocabulary.levels["perturbation"]
    if options.control is not None:
        if options.control not in levels:
            raise CheckpointError(f"control={options.control!r} is not among the perturbations of the vocabulary")
        return replace(vocabulary, control=options.control)
    named = vocabulary.control or (jobs.control_name(job) if job else None) or "NTC"
    return replace(vocabulary, control=named if named in levels else None)


def _opened(source: Any, folder: Path) -> Any:
    """Open an h5ad file, or the registry beside the weights; anything else is as it was."""
    if source is None and (folder / REGISTRY).is_file():
        check_link(folder / REGISTRY)
        source = read_json(folder / REGISTRY)
    if isinstance(source, Mapping) and is_registry(source):
        return Registry.from_dict(source)
    if isinstance(source, str | Path) and Path(source).suffix == ".h5ad":
        from scldm_cd4.data.files import open_h5ad

        return open_h5ad(Path(source).expanduser(), backed=True)
    return source


def _with_training_cells(registry: Registry, source: Any) -> Registry:
    """Count the training cells of each condition, and take their library sizes where none were given."""
    if isinstance(source, Registry):
        return replace(source, control=registry.control, size_factors=registry.size_factors)
    if source is None or isinstance(source, str | Path | Mapping):
        return registry
    from scldm_cd4.data.cells import CellData

    try:
        cells = CellData.from_adata(source, registry)
    except DataError as error:
        warnings.warn(
            f"numbers of training cells and library sizes could not be taken from the vocabulary's AnnData: {error}",
            UserWarning,
            stacklevel=2,
        )
        return registry
    assert cells.labels is not None
    known = registry.with_training(cells.labels, cells.library)
    return known if registry.size_factors is None else replace(known, size_factors=registry.size_factors)


def _check_sizes(
    found: Reference, vocabulary: Vocabulary, job: jobs.Job | None, columns: Mapping[str, str | None]
) -> None:
    problems = []
    if len(vocabulary.genes) != found.n_genes:
        problems.append(f"{len(vocabulary.genes)} genes are given, the weights have {found.n_genes}")
    if found.vocabulary is not None:
        for role, size in zip(ROLES, found.vocabulary, strict=True):
            if (n := len(vocabulary.levels[role])) != size:
                name = columns[role] or role
                problems.append(f"{name}: {n} labels are given, the weights have {size}")
    if job is not None:
        said = jobs.n_genes(job)
        if said is not None and said != found.n_genes:
            problems.append(f"{job.where} says {said} genes, the weights have {found.n_genes}")
        sizes = dict(zip((columns[r] for r in ROLES), found.vocabulary or (None,) * 3, strict=True))
        for name, size in jobs.class_sizes(job).items():
            if sizes.get(name) is not None and sizes[name] != size:
                problems.append(f"{job.where} says {size} labels of {name}, the weights have {sizes[name]}")
    if problems:
        raise CheckpointError("the vocabulary does not fit the checkpoint: " + "; ".join(problems))


def _model_config(found: Reference, job: jobs.Job | None, options: Options) -> ModelConfig:
    flow = found.flow or jobs.configured(job or jobs.Job({}, "flow="), FlowConfig(), dict(options.flow))
    config = replace(PRESETS["cd4"], vae=found.vae, flow=flow)
    if job is None:
        return config
    if jobs.sees_expressed_genes_only(job):
        warnings.warn(
            f"{job.where} trained the encoder on expressed genes padded to one length. Here it sees all genes, so "
            "latents of given cells differ from the reference's; generated cells do not",
            UserWarning,
            stacklevel=2,
        )
    try:
        if found.flow is None:
            return replace(config, train_vae=jobs.stage_config(job, "vae"))
        return replace(config, train_flow=jobs.stage_config(job, "flow"))
    except CheckpointError:  # how it was trained is not needed to use it
        return config


def _size_factors(folder: Path, vocabulary: Vocabulary, options: Options) -> SizeFactors | None:
    source = options.size_factors
    if source is None and isinstance(options.vocabulary, Registry):
        return options.vocabulary.size_factors
    source = find_size_factors(folder) if source is None else source
    if source is None or isinstance(source, SizeFactors):
        return source
    return read_size_factors(source, vocabulary)

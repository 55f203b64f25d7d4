"""The ``config.yaml`` of a reference training job: plain data, read key by key.

Only what is asked for is looked at. Interpolations ``${a.b}`` are followed, with one inside another too; resolvers
(``${name:...}``) are never called, and ``_target_`` names nothing that is imported.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from scldm_cd4._errors import CheckpointError
from scldm_cd4.config import PRESETS, FlowConfig, StageConfig, VAEConfig

MAX_BYTES = 2**20
MAX_DEPTH = 32
IGNORED_RESOLVERS = ("eval", "now")
"""Resolvers in the reference's own files, at keys that nothing here asks for."""

_ENCODER, _DECODER = "model.module.vae_model.encoder", "model.module.vae_model.decoder"
_INPUT, _HEAD = "model.module.vae_model.input_layer", "model.module.vae_model.decoder_head"
_FLOW, _VOCABULARY = "model.module.diffusion_model", "datamodule.label_encoder.class_vocab_sizes"
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_MISSING = object()


class Job:
    """Nested settings, read by dotted keys.

    Parameters
    ----------
    values
        The tree as it stands in the file.
    where
        What to call it in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    @classmethod
    def read(cls, path: str | Path) -> "Job":
        """Read a YAML file of plain values.

        Raises
        ------
        CheckpointError
            The file is missing, too large, or no plain YAML.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_BYTES} that such a file may have")
        return cls(parse_yaml(path.read_bytes(), str(path)), str(path))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, its interpolations followed; `default` where it is absent.

        Raises
        ------
        CheckpointError
            An interpolation points nowhere, at itself, or asks for a resolver.
        """
        value = self._find(key, 0)
        return default if value is _MISSING else self._plain(value, 0)

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self.get(key) is not None

    def number(self, key: str) -> float:
        """Return a number; ``1e-8``, which YAML takes for a string, too."""
        value = self.get(key)
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        except (TypeError, ValueError):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, where a number is expected") from None

    def whole(self, key: str) -> int:
        """Return a whole number."""
        value = self.number(key)
        if value != int(value):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, where a whole number is expected")
        return int(value)

    def truth(self, key: str) -> bool:
        """Return a truth value."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, where true or false is expected")
        return value

    def text(self, key: str) -> str:
        """Return a string."""
        value = self.get(key)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, where a word is expected")
        return value

    def refuse(self, key: str, why: str) -> None:
        """Raise CheckpointError for a setting that has no counterpart here."""
        raise CheckpointError(f"{self.where}: {key} is {self.get(key)!r}; {why}")

    def _find(self, key: str, depth: int) -> Any:
        node: Any = self.values
        for part in key.split("."):
            if isinstance(node, str):
                node = self._follow(node, depth)
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, Mapping) and part in node:
                node = node[part]
            else:
                return _MISSING
        return node

    def _plain(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            value = self._follow(value, depth)
        if isinstance(value, Mapping):
            return {str(k): self._plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [self._plain(v, depth + 1) for v in value]
        return value

    def _follow(self, text: str, depth: int) -> Any:
        """Return what a string with interpolations stands for."""
        start = text
        while (match := _INNERMOST.search(text)) is not None:
            depth += 1
            if depth > MAX_DEPTH:
                raise CheckpointError(f"{self.where}: {start!r} leads back to itself, or too deep")
            value = self._target(match.group(1), depth)
            if match.group() == text:
                return self._follow(value, depth) if isinstance(value, str) else value
            if isinstance(value, Mapping | list):
                raise CheckpointError(f"{self.where}: {start!r} puts a group of settings into a string")
            text = text[: match.start()] + str(value) + text[match.end() :]
        return text

    def _target(self, key: str, depth: int) -> Any:
        if ":" in key:
            name = key.split(":")[0]
            raise CheckpointError(
                f"{self.where}: the resolver {name!r} in '${{{key}}}' is not called; write the value itself"
            )
        value = self._find(key.strip(), depth)
        if value is _MISSING:
            raise CheckpointError(f"{self.where}: '${{{key}}}' points to nothing")
        return self._follow(value, depth) if isinstance(value, str) else value


def parse_yaml(data: bytes | str, where: str) -> dict[str, Any]:
    """Return the mapping that plain YAML holds.

    Raises
    ------
    CheckpointError
        It is not readable, or holds tags, references to itself, or no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)  # the text of the error would quote the file
        at = "" if mark is None else f" (line {mark.line + 1})"
        raise CheckpointError(f"{where} is no plain YAML{at}: {getattr(error, 'problem', None) or 'damaged'}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds no settings")
    return values


def refuse_resolvers(text: str, where: str) -> None:
    """Raise CheckpointError where a text asks for a resolver that could read from outside the settings."""
    for found in re.finditer(r"\$\{\s*([^\s${}:]+)\s*:", text):
        if found.group(1) not in IGNORED_RESOLVERS:
            raise CheckpointError(
                f"{where}: the resolver '{found.group(1)}' is refused: settings are data, write the value itself"
            )


def vae_fields(job: Job) -> dict[str, Any]:
    """Return the fields of `VAEConfig` that a job gives.

    Raises
    ------
    CheckpointError
        A setting has no counterpart here, or encoder and decoder differ.
    """
    shared: dict[str, tuple[str, Callable[[str], Any]]] = {
        "width": ("n_embed", job.whole),
        "n_tokens": ("n_inducing_points", job.whole),
        "n_channels": ("n_embed_latent", job.whole),
        "n_layers": ("n_layer", job.whole),
        "n_heads": ("n_head", job.whole),
        "n_cross_heads": ("n_head_cross", job.whole),
        "multiple_of": ("multiple_of", job.whole),
        "bias": ("bias", job.truth),
        "dropout": ("dropout", job.number),
        "norm_eps": ("layernorm_eps", job.number),
        "projection": ("latent_projection_type", job.text),
    }
    out: dict[str, Any] = {}
    for name, (key, read) in shared.items():
        if job.has(f"{_ENCODER}.{key}"):
            out[name] = read(f"{_ENCODER}.{key}")
            if job.has(f"{_DECODER}.{key}") and read(f"{_DECODER}.{key}") != out[name]:
                job.refuse(f"{_DECODER}.{key}", f"the encoder has {out[name]!r}, and both must be alike here")
    if job.has(f"{_ENCODER}.positional_encoding"):
        out["positional"] = job.truth(f"{_ENCODER}.positional_encoding")
    if job.has(f"{_DECODER}.shared_embedding"):
        out["shared_embedding"] = job.truth(f"{_DECODER}.shared_embedding")
    if job.has(f"{_INPUT}.agg_func"):
        out["aggregation"] = job.text(f"{_INPUT}.agg_func")
    _only(job, f"{_ENCODER}.norm_layer", "layernorm")
    _only(job, f"{_DECODER}.use_adaln", False)
    return out | _head_fields(job)


def _head_fields(job: Job) -> dict[str, Any]:
    at = _HEAD
    if not job.has(at) and job.has("model.decoder_name"):
        at = f"model.decoder_head.{job.text('model.decoder_name')}"
    if not job.has(f"{at}._target_"):
        return {}
    heads = {"NegativeBinomialTransformerLayer": "nb", "NegativeBinomialTransformerLayerDecoupled": "decoupled"}
    name = job.text(f"{at}._target_").rsplit(".", 1)[-1]
    if name not in heads:
        job.refuse(f"{at}._target_", f"of the heads only {', '.join(heads)} are known here")
    out: dict[str, Any] = {"head": heads[name]}
    if job.has(f"{at}.shared_theta"):
        out["theta"] = "gene" if job.truth(f"{at}.shared_theta") else "cell_gene"
    if name.endswith("Decoupled") and job.has(f"{at}.use_gene_bias"):
        out["gene_bias"] = job.truth(f"{at}.use_gene_bias")
    return out


def flow_fields(job: Job) -> dict[str, Any]:
    """Return the fields of `FlowConfig` that a job gives; empty for a job of the autoencoder.

    The network is built from ``diffusion_model.nnet`` where there is one, and what stands beside that is ignored, as
    the reference does; in base scLDM ``diffusion_model`` is the network itself.
    """
    at = f"{_FLOW}.nnet" if job.has(f"{_FLOW}.nnet") else _FLOW
    keys: dict[str, tuple[str, Callable[[str], Any]]] = {
        "width": ("n_embed", job.whole),
        "n_layers": ("n_layer", job.whole),
        "n_heads": ("n_head", job.whole),
        "multiple_of": ("multiple_of", job.whole),
        "bias": ("bias", job.truth),
        "norm_eps": ("layernorm_eps", job.number),
        "p_drop": ("cfg_dropout_prob", job.number),
        "label_dropout": ("condition_strategy", job.text),
    }
    _only(job, f"{at}.norm_layer", "layernorm")
    _only(job, f"{at}.use_gpt_for_gene_ko", False)
    if job.has(f"{at}.dropout") and job.number(f"{at}.dropout") != 0:
        job.refuse(f"{at}.dropout", "the flow network has no dropout here")
    return {name: read(f"{at}.{key}") for name, (key, read) in keys.items() if job.has(f"{at}.{key}")}


def stage_config(job: Job, stage: str) -> StageConfig:
    """Return how a job trains its stage, ``vae`` or ``flow``; what it leaves open is as in the released run.

    Raises
    ------
    CheckpointError
        A setting has no counterpart here.
    """
    prefix, base = ("vae", PRESETS["cd4"].train_vae) if stage == "vae" else ("diffusion", PRESETS["cd4"].train_flow)
    optimizer, schedule = f"model.module.{prefix}_optimizer", f"model.module.{prefix}_scheduler"
    keys: dict[str, tuple[str, Callable[[str], Any]]] = {
        "lr": (f"{optimizer}.lr", job.number),
        "weight_decay": (f"{optimizer}.weight_decay", job.number),
        "eps": (f"{optimizer}.eps", job.number),
        "final_lr": (f"{schedule}.final_lr_factor", job.number),
        "clip_norm": ("training.trainer.gradient_clip_val", job.number),
        "batch_size": ("model.batch_size", job.whole),
        "max_epochs": ("training.num_epochs", job.whole),
        "ema_decay": ("model.module.ema_decay", job.number),
        "ema_every": ("model.module.ema_update_every", job.whole),
    }
    found = {name: read(key) for name, (key, read) in keys.items() if job.has(key)}
    if job.has(f"{optimizer}.betas"):
        found["betas"] = (job.number(f"{optimizer}.betas.0"), job.number(f"{optimizer}.betas.1"))
    _only(job, "datamodule.datamodule.sample_genes", "none", "all genes are decoded")
    _only(job, f"{optimizer}.caution", False)
    _only(job, f"{schedule}.decay_type", "cosine")
    _only(job, f"{schedule}.fract_decay", 1.0)
    _only(job, f"{schedule}.init_div_factor", 100)
    _only(job, "training.trainer.gradient_clip_algorithm", "norm")
    return replace(base, **found)


def class_sizes(job: Job) -> dict[str, int]:
    """Return the sizes of the vocabularies by class name, in the order of the job; those that are null are left out."""
    names = job.get(_VOCABULARY) or {}
    if not isinstance(names, Mapping):
        raise CheckpointError(f"{job.where}: {_VOCABULARY} holds no sizes by class name")
    return {name: job.whole(f"{_VOCABULARY}.{name}") for name, size in names.items() if size is not None}


def n_genes(job: Job) -> int | None:
    """Return the number of genes that a job gives."""
    key = "datamodule.label_encoder.n_genes"
    return job.whole(key) if job.has(key) else None


def sees_expressed_genes_only(job: Job) -> bool:
    """Whether the encoder of a job was shown the expressed genes alone, padded to one length."""
    return job.get("datamodule.datamodule.sample_genes", "none") != "none"


def control_name(job: Job) -> str | None:
    """Return the label of unperturbed cells that a job gives."""
    keys = (f"{_FLOW}.nnet.control_perturbation_name", f"{_FLOW}.control_perturbation_name")
    return next((job.text(key) for key in keys if job.has(key)), None)


def configured(job: Job, base: Any, found: Mapping[str, Any]) -> Any:
    """Return a configuration with the fields found in a job.

    Raises
    ------
    CheckpointError
        A value is not among those allowed.
    """
    part = {VAEConfig: "vae", FlowConfig: "flow"}[type(base)]
    try:
        given = {f.name: found[f.name] for f in fields(base) if f.name in found}
        return getattr(replace(PRESETS["cd4"], **{part: base}).with_overrides(**{part: given}), part)
    except ValueError as error:
        raise CheckpointError(f"{job.where}: {error}") from error


def _only(job: Job, key: str, known: Any, why: str = "") -> None:
    if job.has(key) and job.get(key) != known:
        job.refuse(key, f"only {known!r} is known here" + (f": {why}" if why else ""))

"""A model in the reference's layout: all the names that its strict loader asks for, and its ``config.yaml``."""

import hashlib
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scldm_cd4._errors import CheckpointError
from scldm_cd4.checkpoint.folder import write_folder
from scldm_cd4.checkpoint.job import parse_yaml
from scldm_cd4.checkpoint.native import independent, to_json
from scldm_cd4.checkpoint.pretrained import CHECKSUMS, CONFIG, REGISTRY, WEIGHTS
from scldm_cd4.checkpoint.reference import CLASS_NAMES, to_reference
from scldm_cd4.checkpoint.vocabulary import FACTORS
from scldm_cd4.config import ModelConfig, VAEConfig
from scldm_cd4.registry import Registry
from scldm_cd4.size_factors import SizeFactors

README = "README.md"
FILES = (WEIGHTS, CONFIG, REGISTRY, FACTORS, README, CHECKSUMS)
OURS_ALONE = ("log_counts", "mask_padding", "encode", "kl_weight", "linear_rank", "label_rank")
"""Settings that change what the network computes and that the reference does not have."""
CARD = """# A model in the layout of scLDM.CD4

`model.safetensors` and `config.yaml` are as the reference reads them. `registry.json` holds what that layout lacks:
genes and labels in the order of their codes, library sizes and numbers of training cells. `size_factors.json` gives
mean and standard deviation of the natural logarithm of the counts per cell by `timepoint_donor`, for the reference's
sampler.
Read all of it with `scldm_cd4.CD4Model.from_pretrained(folder)`.

The online and the averaged weights of the flow are the same here. For research use; no clinical decisions.
"""


def packaged_config(name: str) -> dict[str, Any]:
    """Return a packaged config, ``cd4_vae`` or ``cd4_fm``, whole and without its list of defaults."""
    values = parse_yaml(files("scldm_cd4").joinpath("configs", f"{name}.yaml").read_bytes(), f"{name}.yaml")
    for base in values.pop("defaults", []):
        if base != "_self_":
            values = _merged(packaged_config(base), values)
    return values


def export_reference(
    path: str | Path,
    config: ModelConfig,
    registry: Registry,
    vae_state: Mapping[str, Tensor],
    dit_state: Mapping[str, Tensor],
    *,
    record: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write a folder in the reference's layout, all of it or nothing.

    Parameters
    ----------
    path
        The folder.
    config, registry, vae_state, dit_state
        The model; `dit_state` is empty where only the autoencoder is trained.
    record
        Facts on the training, for the step of the running average.
    overwrite
        Replace a folder that this function wrote.

    Raises
    ------
    CheckpointError
        The model has parts that the reference does not know, or the folder cannot be written.
    FileExistsError
        There is something at `path`, and it may not be replaced.
    """
    import yaml

    _refuse_ours(config)
    tensors = _all_names(to_reference(vae_state, dit_state), _steps(record))
    values = _settings(config, registry, bool(dit_state))
    contents: dict[str, Any] = {
        CONFIG: yaml.safe_dump(values, sort_keys=False).encode(),
        REGISTRY: to_json(registry.to_dict()),
        README: CARD.encode(),
    }
    if registry.size_factors is not None:
        contents[FACTORS] = to_json(_factors(registry.size_factors))
    needed = sum(map(len, contents.values())) + sum(t.nbytes for t in tensors.values())
    contents[WEIGHTS] = lambda file: save_file(independent(tensors), file, metadata={"format": "pt"})
    return write_folder(
        path, contents, (CHECKSUMS, _checksums), known=FILES, needed=needed + 2**20, overwrite=overwrite
    )


def _refuse_ours(config: ModelConfig) -> None:
    plain = VAEConfig()
    ours = [
        f"vae.{name}={getattr(config.vae, name)!r}"
        for name in OURS_ALONE
        if getattr(config.vae, name) != getattr(plain, name)
    ]
    if config.vae.head == "poisson":
        ours.append("vae.head='poisson'")
    if config.flow.label_dropout == "independent":
        ours.append("flow.label_dropout='independent'")
    if config.flow.norm_eps != config.vae.norm_eps:
        ours.append(f"flow.norm_eps={config.flow.norm_eps} beside vae.norm_eps={config.vae.norm_eps}")
    if ours:
        raise CheckpointError(
            f"the reference has no counterpart of {', '.join(ours)}; models of the preset 'cd4' can be exported"
        )


def _steps(record: Mapping[str, Any]) -> int:
    flow, pretrained = record.get("flow", {}), record.get("pretrained", {})
    return int(flow.get("n_steps") or pretrained.get("ema_step") or 0)


def _all_names(named: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """Add compiled aliases and the copies of the running average."""
    out = dict(named)
    for key, tensor in named.items():
        part, name = key.split(".", 1)
        out[f"{part}_compiled._orig_mod.{name}"] = tensor
        if part == "diffusion_model":
            out |= {f"ema_model.{copy}.{name}": tensor for copy in ("online_model", "ema_model")}
    if any(key.startswith("ema_model.") for key in out):
        out |= {"ema_model.initted": torch.tensor(True), "ema_model.step": torch.tensor(step)}
    return out


def _settings(config: ModelConfig, registry: Registry, with_flow: bool) -> dict[str, Any]:
    """Return the tree of ``config.yaml``."""
    values = packaged_config("cd4_fm" if with_flow else "cd4_vae")
    vae, flow, stage = config.vae, config.flow, config.train_flow if with_flow else config.train_vae
    head = {"nb": "negative_binomial", "decoupled": "negative_binomial_decoupled"}[vae.head]
    head += "_shared_theta" if vae.theta == "gene" else "_unshared_theta"
    prefix = "model.module"
    encoder = {
        "n_layer": vae.n_layers,
        "n_inducing_points": vae.n_tokens,
        "n_embed": vae.width,
        "n_embed_latent": vae.n_channels,
        "n_head": vae.n_heads,
        "n_head_cross": vae.n_cross_heads,
        "dropout": vae.dropout,
        "bias": vae.bias,
        "multiple_of": vae.multiple_of,
        "layernorm_eps": vae.norm_eps,
        "positional_encoding": vae.positional,
        "latent_projection_type": vae.projection,
    }
    sizes = {CLASS_NAMES[a.role]: len(a) for a in registry.attributes}
    changes: dict[str, Any] = {
        "datamodule.label_encoder.n_genes": registry.n_genes,
        "datamodule.label_encoder.class_vocab_sizes": dict(sorted(sizes.items())),
        "datamodule.label_encoder.condition_strategy": flow.label_dropout,
        "training.num_epochs": stage.max_epochs,
        "training.trainer.gradient_clip_val": stage.clip_norm,
        "model.batch_size": stage.batch_size,
        "model.decoder_name": head,
        **{f"{prefix}.vae_model.encoder.{key}": value for key, value in encoder.items()},
        f"{prefix}.vae_model.decoder.shared_embedding": vae.shared_embedding,
        f"{prefix}.vae_model.input_layer.agg_func": vae.aggregation,
        **_optimiser(f"{prefix}.vae", config.train_vae),
    }
    if vae.head == "decoupled":
        changes[f"model.decoder_head.{head}.use_gene_bias"] = vae.gene_bias
    if with_flow:
        network = {
            "n_embed": flow.width,
            "n_layer": flow.n_layers,
            "n_head": flow.n_heads,
            "bias": flow.bias,
            "multiple_of": flow.multiple_of,
            "cfg_dropout_prob": flow.p_drop,
            "condition_strategy": flow.label_dropout,
        }
        changes |= {f"{prefix}.diffusion_model.nnet.{key}": value for key, value in network.items()}
        changes |= _optimiser(f"{prefix}.diffusion", config.train_flow)
        changes |= {f"{prefix}.ema_decay": stage.ema_decay, f"{prefix}.ema_update_every": stage.ema_every}
        if registry.control is not None:
            changes[f"{prefix}.diffusion_model.nnet.control_perturbation_name"] = registry.control
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[last] = value
    return values


def _optimiser(at: str, stage: Any) -> dict[str, Any]:
    return {
        f"{at}_optimizer.lr": stage.lr,
        f"{at}_optimizer.weight_decay": stage.weight_decay,
        f"{at}_optimizer.betas": list(stage.betas),
        f"{at}_optimizer.eps": stage.eps,
        f"{at}_scheduler.final_lr_factor": stage.final_lr,
    }


def _factors(factors: SizeFactors) -> dict[str, dict[str, float]]:
    """Return the flat tables of the reference; keys are ``timepoint_donor``."""
    contexts = {f"{t}_{d}": s for t, by_donor in factors.contexts.items() for d, s in by_donor.items()}
    if len(contexts) != sum(map(len, factors.contexts.values())) or not all(
        math.isfinite(s.sd) for s in contexts.values()
    ):
        raise CheckpointError("time points and donors, joined by '_', do not name each context once: rename them")
    return {"mean": {k: s.mean for k, s in contexts.items()}, "sd": {k: s.sd for k, s in contexts.items()}}


def _checksums(folder: Path) -> bytes:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return to_json(found)


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out

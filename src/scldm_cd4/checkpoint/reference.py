"""Weights of the reference scLDM.CD4 and of this package's networks, one into the other.

The parameter names below a module are the same on both sides. The reference's files add prefixes (VAE, flow, EMA copy,
compiled aliases that hold the same numbers again) and call the condition attributes by column names. Vocabularies, gene
names and size factors are not in such files, and neither is what leaves no trace in the shapes: numbers of heads,
norm eps, and the count aggregations without parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scldm_cd4._errors import CheckpointError
from scldm_cd4.config import PRESETS, ROLES, Aggregation, FlowConfig, VAEConfig

State = dict[str, Tensor]

CLASS_NAMES = {
    "donor": "donor_id",
    "timepoint": "experimental_perturbation_time_point",
    "perturbation": "guide_target_ensembl",
}
"""What the reference calls each attribute."""

# for each part, where it may stand; the first place that holds a tensor wins ("_orig_mod." is removed before)
_VAE = ("vae_model.", "vae_model_compiled.")
_ONLINE = ("diffusion_model.nnet.", "diffusion_model_compiled.nnet.", "ema_model.online_model.nnet.")
_EMA = ("ema_model.ema_model.nnet.",)
_BASE_ONLINE = ("diffusion_model.", "diffusion_model_compiled.", "ema_model.online_model.")
_BASE_EMA = ("ema_model.ema_model.",)
"""Base scLDM has no wrapper around the diffusion transformer."""
_SCALARS = ("ema_model.initted", "ema_model.step")
_VAE_PARTS = ("input_layer.", "encoder.", "decoder.", "decoder_head.")
_OURS_ALONE = ("encoder.latent_log_variance.",)


@dataclass(frozen=True)
class Reference:
    """Weights of the reference, renamed for `nn.VAE` and `nn.DiT`, and the sizes of these."""

    vae_state: State
    dit_state: State
    """Empty for a file of the autoencoder alone."""
    vae: VAEConfig
    flow: FlowConfig | None
    n_genes: int
    vocabulary: tuple[int, int, int] | None
    """Numbers of donors, time points and perturbations."""
    weights: Literal["ema", "online"] | None
    """Which copy of the flow's weights was taken."""
    absent: tuple[str, ...] = ()
    """Attributes that the flow does not know; they have one level, whose vector is zero."""


def read_safetensors(path: str | Path) -> Mapping[str, Tensor]:
    """Open the tensors of one safetensors file, each read when asked for; nothing is ever unpickled.

    Raises
    ------
    CheckpointError
        There is no such file, or it is damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise CheckpointError(
            f"{path} is a pickled checkpoint, which is read only where it is trusted: pass allow_pickle=True and the "
            "file as it was written, with the ending .ckpt"
        )
    with _explained(path):
        return _Tensors(path, safe_open(path, "pt"))


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file by name; copies in the file that nobody asks for take no memory."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path, self.handle, self.names = path, handle, tuple(handle.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with _explained(self.path):
            return self.handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors, it is damaged or of another kind: {error}"
        ) from error


def split_reference(
    tensors: Mapping[str, Tensor],
    *,
    weights: Literal["auto", "ema", "online"] = "auto",
    class_names: Mapping[str, str] | None = None,
) -> tuple[State, State, Literal["ema", "online"] | None]:
    """Sort tensors under the reference's names into states of `nn.VAE` and `nn.DiT`.

    Parameters
    ----------
    tensors
        A state dict of the reference, with or without compiled aliases and EMA copies; or one of base scLDM.
    weights
        Copy of the flow's weights: the running average, the last step's, or (``auto``) the average where there is one.
    class_names
        What the file calls each attribute, by role; None for `CLASS_NAMES`.

    Returns
    -------
    The state of the VAE, that of the DiT (empty if the file has none), and which copy was taken.

    Raises
    ------
    CheckpointError
        A name belongs to no part, there is no VAE, or the copy asked for is missing.
    """
    if weights not in ("auto", "ema", "online"):
        raise ValueError(f"weights must be 'auto', 'ema' or 'online', got {weights!r}")
    named = {key.replace("_orig_mod.", ""): key for key in tensors}
    wrapped = any(key.startswith((*_ONLINE, *_EMA)) for key in named)
    in_online, in_ema = (_ONLINE, _EMA) if wrapped else (_BASE_ONLINE, _BASE_EMA)
    known = (*_VAE, *in_online, *in_ema)
    if unexpected := [key for key in named if not key.startswith(known) and key not in _SCALARS]:
        raise CheckpointError(f"these are no tensors of a reference checkpoint: {', '.join(sorted(unexpected))}")
    vae, online, ema = (_collect(named, prefixes) for prefixes in (_VAE, in_online, in_ema))
    if not vae:
        raise CheckpointError("the checkpoint has no autoencoder (no tensor called vae_model.*)")
    if weights == "ema" and not ema and online:
        raise CheckpointError("the checkpoint has no EMA copy (ema_model.ema_model.nnet.*); take weights='online'")
    if weights == "online" and not online and ema:
        raise CheckpointError("the checkpoint has no online flow weights (diffusion_model.nnet.*); take weights='ema'")
    vae_state = {name: tensors[key] for name, key in vae.items()}
    if not (ema or online):
        return vae_state, {}, None
    taken: Literal["ema", "online"] = "ema" if ema and weights != "online" else "online"
    dit_state = {name: tensors[key] for name, key in (ema if taken == "ema" else online).items()}
    return vae_state, _rename_classes(dit_state, {v: k for k, v in (class_names or CLASS_NAMES).items()}), taken


def from_reference(
    tensors: Mapping[str, Tensor],
    *,
    weights: Literal["auto", "ema", "online"] = "auto",
    class_names: Mapping[str, str] | None = None,
    vae: Mapping[str, Any] | None = None,
    flow: Mapping[str, Any] | None = None,
) -> Reference:
    """Turn a reference state dict of any size into states and configurations of this package's networks.

    Parameters
    ----------
    tensors, weights, class_names
        As for `split_reference`. A role that `class_names` leaves out gets a table of zeros, which adds nothing.
    vae, flow
        Fields of `VAEConfig` and `FlowConfig` that the shapes do not tell. ``n_heads`` and ``n_cross_heads`` are needed
        unless the sizes are the released ones; ``norm_eps`` is 1e-8 and ``head`` "nb" unless given.

    Raises
    ------
    CheckpointError
        Tensors are missing, unexpected or of the wrong shape; all are named.
    ValueError
        A field that the shapes do not tell was not given.
    """
    vae_state, dit_state, taken = split_reference(tensors, weights=weights, class_names=class_names)
    absent = tuple(role for role in ROLES if role not in (class_names or CLASS_NAMES)) if dit_state else ()
    for role in absent:
        dit_state[f"class_embeddings.{role}.weight"] = torch.zeros(2, _shape(dit_state, "pos_embed", 3)[2])
    vae_config = _vae_config(vae_state, dict(vae or {}))
    n_genes = _shape(vae_state, "input_layer.gene_embedding.weight")[0] - 1
    problems = _mismatches(_expected_vae(vae_config, n_genes), vae_state, "vae_model.")
    flow_config, vocabulary = None, None
    if dit_state:
        tables = (_shape(dit_state, f"class_embeddings.{role}.weight") for role in ROLES)
        vocabulary = cast("tuple[int, int, int]", tuple(rows - 1 for rows, _ in tables))
        flow_config = _flow_config(dit_state, dict(flow or {}))
        _, n_tokens, width = _shape(dit_state, "pos_embed", 3)
        if width != flow_config.width:
            raise CheckpointError(f"diffusion_model.nnet.pos_embed has width {width}, the network {flow_config.width}")
        expected = _expected_dit(flow_config, n_tokens, vae_config.n_channels, vocabulary)
        problems += _mismatches(expected, dit_state, "diffusion_model.nnet.")
    if problems:
        raise CheckpointError("the checkpoint does not fit the networks: " + "; ".join(problems))
    return Reference(
        _float32(vae_state), _float32(dit_state), vae_config, flow_config, n_genes, vocabulary, taken, absent
    )


def to_reference(vae_state: Mapping[str, Tensor], dit_state: Mapping[str, Tensor]) -> State:
    """Name the states of `nn.VAE` and `nn.DiT` as the reference does (without EMA copies and compiled aliases).

    Raises
    ------
    CheckpointError
        The state has parts that the reference does not know.
    """
    if extra := [k for k in vae_state if not k.startswith(_VAE_PARTS) or k.startswith(_OURS_ALONE)]:
        raise CheckpointError(f"the reference has no counterpart of {', '.join(sorted(extra))}")
    named = {_VAE[0] + key: tensor for key, tensor in vae_state.items()}
    return named | {_ONLINE[0] + key: tensor for key, tensor in _rename_classes(dit_state, CLASS_NAMES).items()}


def _collect(named: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Names in the file by name below the module."""
    out: dict[str, str] = {}
    for prefix in reversed(prefixes):
        out |= {name.removeprefix(prefix): key for name, key in named.items() if name.startswith(prefix)}
    return out


def _rename_classes(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    out = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "class_embeddings":
            parts[1] = names.get(parts[1], parts[1])
        out[".".join(parts)] = tensor
    return out


def _shape(state: Mapping[str, Tensor], key: str, n_dims: int = 2) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"the checkpoint has no tensor {_reference_name(key)}, so its sizes cannot be told")
    shape = tuple(state[key].shape)
    if len(shape) != n_dims or 0 in shape:
        raise CheckpointError(f"{_reference_name(key)} has shape {shape}, which is no table of {n_dims} dimensions")
    return shape


def _reference_name(key: str) -> str:
    part = _ONLINE[0] if key.startswith(("class_embeddings.", "blocks.", "pos_embed")) else _VAE[0]
    return part + next(iter(_rename_classes({key: torch.empty(0)}, CLASS_NAMES)))


def _float32(state: State) -> State:
    return {key: tensor.float() for key, tensor in state.items()}


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _multiple_of(width: int, hidden: int, given: Any = None) -> int:
    """Return a rounding that gives this hidden width: the given one, else the smallest from the reference's 4 on."""
    target = int(8 * width / 3)
    first = [given] if isinstance(given, int) and given > 0 else []
    return next((m for m in (*first, 4, 8, 16, 32, 64, 128, 256, 2, 1) if -(-target // m) * m == hidden), 4)


def _check_heads(
    found: Mapping[str, Any], released: Any, given: Mapping[str, Any], names: tuple[str, ...], part: str
) -> None:
    same = all(getattr(released, name) == found[name] for name in ("width", "n_layers"))
    if not same and (missing := [name for name in names if name not in given]):
        example = ", ".join(f"{name!r}: ..." for name in missing)
        raise ValueError(
            "numbers of heads leave no trace in the weights and the sizes are not the released ones: "
            f"give {part}={{{example}}} as in the config.yaml of the training run"
        )


def _vae_config(state: State, given: dict[str, Any]) -> VAEConfig:
    hidden, width = _shape(state, "encoder.ca_layer.mlp.w1.weight")
    cross = "encoder.encoder_latent_ca.inducing_points" in state
    latent = _shape(state, f"encoder.encoder_latent_{'ca.inducing_points' if cross else 'input.0.weight'}")
    decoupled = any(f"decoder_head.{name}.weight" in state for name in ("theta_embed", "gene_bias"))
    found: dict[str, Any] = {
        "width": width,
        "n_tokens": _shape(state, "encoder.ca_layer.inducing_points")[0],
        "n_channels": latent[1] if cross else latent[0],
        "n_layers": _count(state, "encoder.encoder_layers."),
        "multiple_of": _multiple_of(width, hidden, given.get("multiple_of")),
        "bias": "encoder.ca_layer.attn.c_attn.bias" in state,
        "projection": "cross_attention" if cross else "mlp",
        "positional": "encoder.pos_embed" in state,
        "shared_embedding": "decoder.gene_embedding.weight" not in state,
        "theta": "cell_gene" if _shape(state, "decoder_head.params.weight")[0] == 2 else "gene",
        "gene_bias": "decoder_head.gene_bias.weight" in state,
    } | _aggregation(state, given)
    if decoupled:
        found["head"] = "decoupled"
    _check_heads(found, PRESETS["cd4"].vae, given, ("n_heads", "n_cross_heads"), "vae")
    return _merge(VAEConfig(), found, given, "vae")


def _aggregation(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    at = "input_layer.projection."
    if at + "bin_embeddings" in state:
        n_bins, hidden = _shape(state, at + "mlp_count.2.weight")
        return {"aggregation": "softbin", "n_bins": n_bins, "bin_hidden": hidden}
    by_key: dict[str, Aggregation] = {"count_embedding.weight": "proj", "mix.weight": "projconcat"}
    for key, aggregation in by_key.items():
        if at + key in state:
            return {"aggregation": aggregation}
    if "aggregation" not in given:
        raise ValueError(
            "the count aggregation leaves no trace in these weights: give vae={'aggregation': ...}, one of "
            "'log1p', 'log1pzero', 'sqrt', 'anscombe'"
        )
    return {}


def _flow_config(state: State, given: dict[str, Any]) -> FlowConfig:
    hidden, width = _shape(state, "blocks.0.mlp.w1.weight")
    found = {
        "width": width,
        "n_layers": _count(state, "blocks."),
        "multiple_of": _multiple_of(width, hidden, given.get("multiple_of")),
        "bias": "input_proj.bias" in state,
    }
    _check_heads(found, PRESETS["cd4"].flow, given, ("n_heads",), "flow")
    return _merge(FlowConfig(), found, given, "flow")


def _merge(base: Any, found: dict[str, Any], given: dict[str, Any], part: str) -> Any:
    if wrong := {name: (value, found[name]) for name, value in given.items() if found.get(name, value) != value}:
        said = "; ".join(
            f"{name} is given as {value!r}, the weights say {real!r}" for name, (value, real) in wrong.items()
        )
        raise ValueError(f"{part}: {said}")
    config = replace(base, **(found | given))
    for name in ("n_heads", "n_cross_heads"):
        heads = getattr(config, name, 1)
        if not isinstance(heads, int) or heads < 1 or config.width % heads:
            raise ValueError(f"{part}: {name}={heads!r} does not divide the width {config.width}")
    return config


def _expected_vae(config: VAEConfig, n_genes: int) -> State:
    from scldm_cd4.nn import VAE

    with torch.device("meta"):
        return VAE(config, n_genes).state_dict()


def _expected_dit(config: FlowConfig, n_tokens: int, n_channels: int, vocabulary: tuple[int, int, int]) -> State:
    from scldm_cd4.nn import DiT

    with torch.device("meta"):
        return _rename_classes(DiT(config, n_tokens, n_channels, vocabulary).state_dict(), {})


def _mismatches(expected: State, state: State, prefix: str) -> list[str]:
    problems = []
    if missing := sorted(set(expected) - set(state)):
        problems.append("missing " + ", ".join(prefix + key for key in missing))
    if unexpected := sorted(set(state) - set(expected)):
        problems.append("unexpected " + ", ".join(prefix + key for key in unexpected))
    problems += [
        f"{prefix}{key} has shape {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in sorted(set(expected) & set(state))
        if expected[key].shape != state[key].shape
    ]
    return problems

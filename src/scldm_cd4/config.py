"""Sizes and training settings as frozen data; imports nothing heavy.

A preset is data, not code: `PRESETS` maps its name to a `ModelConfig`.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args

ROLES = ("donor", "timepoint", "perturbation")
"""The condition attributes, in the one order that labels, vocabularies and embeddings keep everywhere."""

STAGES = {"vae": "autoencoder", "flow": "flow"}
"""The stages of training, in their order, and what they are called."""

Aggregation = Literal["softbin", "log1p", "log1pzero", "sqrt", "anscombe", "proj", "projconcat"]
Head = Literal["nb", "decoupled", "poisson"]
Dropout = Literal["joint", "mutually_exclusive", "independent"]


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between counts and latent tokens.

    The defaults are the architecture choices of the released model; its sizes are in the preset ``cd4``.

    Examples
    --------
    >>> config.VAEConfig(n_tokens=32).latent_tokens
    32
    """

    width: int = 256
    """Width E of every token."""
    n_tokens: int = 256
    """Latent tokens S (inducing points of the encoder)."""
    n_channels: int = 16
    """Channels L of each latent token."""
    n_layers: int = 8
    """Self-attention blocks, in the encoder and in the decoder each."""
    n_heads: int = 4
    """Attention heads."""
    n_cross_heads: int = 4
    """Heads of the attention between genes and latent tokens."""
    multiple_of: int = 4
    """The hidden width of the gated MLPs is rounded up to a multiple of this."""
    bias: bool = False
    """Biases in attention and projections."""
    dropout: float = 0.0
    """Share of values dropped after attention, in training."""
    norm_eps: float = 1e-8
    """Added to the variance in normalisation."""
    aggregation: Aggregation = "softbin"
    """How a gene's vector and its count make a token."""
    n_bins: int = 10
    """Learned vectors that ``softbin`` mixes."""
    bin_hidden: int = 64
    """Hidden width of the network that weighs them."""
    log_counts: bool = False
    """``softbin`` sees ln(1 + count) instead of the raw count."""
    projection: Literal["mlp", "cross_attention"] = "mlp"
    """``cross_attention`` ends in 16 learned tokens, whatever `n_tokens`."""
    positional: bool = False
    """A learned position table after the encoder's cross-attention."""
    shared_embedding: bool = True
    """The decoder queries with the gene vectors of the input layer."""
    head: Head = "nb"
    """Distribution of the counts, ``nb`` (released), ``decoupled`` (without the softmax over genes) or ``poisson``."""
    theta: Literal["gene", "cell_gene"] = "gene"
    """One dispersion per gene, or one per cell and gene."""
    gene_bias: bool = False
    """A bias per gene in the decoupled head."""
    mask_padding: bool = False
    """Padding genes take no part in attention (the released model attends to them)."""
    encode: Literal["all", "expressed"] = "all"
    """The genes that the encoder sees, all of the panel or those with a count."""
    kl_weight: float = 0.0
    """0 is the released deterministic autoencoder; above 0 the latent gets a Gaussian posterior."""
    linear_rank: int = 0
    """Rank of a linear path beside encoder and decoder (0 for none, as released)."""
    label_rank: int = 0
    """Rank of the mean effects of labels that the latents leave untold and that are added to the gene logits: exact up
    to as many labels, the largest directions above (0: the decoder sees no labels, as released)."""

    @property
    def latent_tokens(self) -> int:
        """The number of tokens of the latent."""
        return 16 if self.projection == "cross_attention" else self.n_tokens


@dataclass(frozen=True)
class FlowConfig:
    """The diffusion transformer that gives velocities in the latent space.

    Examples
    --------
    >>> config.FlowConfig(label_dropout="independent").p_drop
    0.1
    """

    width: int = 512
    """Width D of every token."""
    n_layers: int = 8
    """Blocks."""
    n_heads: int = 8
    """Attention heads."""
    multiple_of: int = 4
    """The hidden width of the gated MLPs is rounded up to a multiple of this."""
    bias: bool = False
    """Biases in attention and projections."""
    norm_eps: float = 1e-8
    """Added to the variance in normalisation."""
    label_dropout: Dropout = "joint"
    """Which labels are dropped together in training (all, all but one, or each on its own)."""
    p_drop: float = 0.1
    """Probability with which labels are dropped."""
    label_std: float = 0.02
    """Standard deviation of the label embeddings at the start."""
    coupling: Literal["independent", "ot"] = "independent"
    """Pairs of noise and latents in training, as drawn or by optimal transport among cells of equal condition."""


@dataclass(frozen=True)
class StageConfig:
    """How one stage is trained.

    Examples
    --------
    >>> config.StageConfig(lr=1e-3, batch_size=64).lr
    0.001
    """

    lr: float = 1e-4
    """Highest learning rate."""
    weight_decay: float = 0.01
    """Of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    eps: float = 1e-8
    """Of AdamW."""
    clip_norm: float = 10.0
    """Largest norm of a gradient."""
    warmup: float = 0.1
    """Share of the steps with a rising learning rate."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of `lr` (cosine decay)."""
    batch_size: int = 128
    """Cells per step and process."""
    max_epochs: int | None = None
    """None goes by the number of cells, so that about `target_steps` are made in at most `epoch_limit` epochs."""
    target_steps: int = 2000
    """Steps to make where `max_epochs` is None."""
    epoch_limit: int = 200
    """Most epochs where `max_epochs` is None."""
    ema_decay: float = 0.9999
    """Decay of the running average of the weights, which generates."""
    ema_every: int = 10
    """Steps between two updates of it."""
    shown: tuple[float, float] | None = None
    """Range of the share of a cell's counts that the encoder sees while the decoder is trained on the others, drawn for
    each cell; None shows it the very counts that the decoder must give, as in the released recipe."""
    shown_whole: float = 0.0
    """Share of cells that `shown` leaves whole, seen and asked for alike."""
    genes_per_step: int | None = None
    """Genes decoded per training step, more where the panel is above 16 times that (None for all)."""
    theta_lr: float = 1.0
    """Factor on the learning rate of the dispersion table, which then has no weight decay."""
    refit_theta: bool = False
    """Fit the dispersions to the trained means at the end of the stage."""
    balance: float = 0.0
    """In the flow stage, a cell of a perturbation with n training cells is drawn in proportion to ``n ** -balance``."""
    data_init: bool = False
    """Start gene vectors and logits from the statistics of the training cells."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is decided before a model sees data.

    Examples
    --------
    >>> small = config.PRESETS["small"]
    >>> small.with_overrides(vae={"n_tokens": 32}).vae.n_tokens
    32
    """

    vae: VAEConfig = field(default_factory=VAEConfig)
    """The autoencoder."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The flow."""
    train_vae: StageConfig = field(default_factory=StageConfig)
    """Training of the autoencoder."""
    train_flow: StageConfig = field(default_factory=StageConfig)
    """Training of the flow."""

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Build from `to_dict`; unknown names are refused.

        Raises
        ------
        ValueError
            A name is unknown or a value is not among those allowed.
        """
        return _from_dict(cls, values)

    def with_overrides(self, **overrides: Any) -> "ModelConfig":
        """Return a copy with some fields changed.

        Parameters
        ----------
        overrides
            ``part={"name": value}``, for example ``vae={"n_tokens": 32}``.

        Returns
        -------
        A new configuration.

        Raises
        ------
        ValueError
            A part or a name is unknown.
        """
        config = self
        for part, changes in overrides.items():
            if part not in {f.name for f in fields(self)}:
                within = [p.name for p in fields(self) if hasattr(getattr(self, p.name), part)]
                hint = f"; it belongs to a part: {within[0]}={{{part!r}: ...}}" if within else ""
                raise ValueError(
                    f"no part {part!r} in the configuration; parts: {[f.name for f in fields(self)]}{hint}"
                )
            if not isinstance(changes, dict):
                raise ValueError(f"{part!r} takes a dict of changes, got {type(changes).__name__}")
            old = asdict(getattr(self, part))
            if unknown := sorted(set(changes) - set(old)):
                raise ValueError(f"unknown in {part!r}: {unknown}; known: {sorted(old)}")
            config = replace(config, **{part: _from_dict(type(getattr(self, part)), old | changes)})
        return config


def _from_dict(cls: Any, values: dict[str, Any]) -> Any:
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown in {cls.__name__}: {unknown}; known: {sorted(known)}")
    out = {}
    for name, value in values.items():
        kind = known[name].type
        if isinstance(kind, type) and is_dataclass(kind):
            value = _from_dict(kind, value)
        elif isinstance(value, list):
            value = tuple(value)
        allowed = get_args(kind)
        if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
            raise ValueError(f"{cls.__name__}.{name} must be one of {allowed}, got {value!r}")
        out[name] = value
    return cls(**out)


def resolve_config(config: "str | ModelConfig", **overrides: Any) -> ModelConfig:
    """Return the configuration meant by a preset's name or a `ModelConfig`, with overrides applied.

    Parameters
    ----------
    config
        Name of a preset, or a configuration.
    overrides
        Changes by part, as in `scldm_cd4.config.ModelConfig.with_overrides`.

    Returns
    -------
    The configuration.

    Raises
    ------
    ValueError
        The preset is unknown, or an override is.

    Examples
    --------
    >>> config.resolve_config("small", flow={"width": 192}).flow.width
    192
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"unknown preset {config!r}; presets: {sorted(PRESETS)}")
        config = PRESETS[config]
    return config.with_overrides(**overrides)


_SMALL_VAE = VAEConfig(
    width=64,
    n_tokens=16,
    n_channels=8,
    n_layers=2,
    n_heads=4,
    n_cross_heads=4,
    norm_eps=1e-6,
    log_counts=True,
    mask_padding=True,
    encode="expressed",
    linear_rank=32,
    label_rank=256,
)
_SMALL_FLOW = FlowConfig(width=128, n_layers=4, n_heads=4, norm_eps=1e-6, label_std=0.5)
_SMALL_TRAIN_VAE = StageConfig(
    lr=1.5e-3,
    warmup=0.05,
    final_lr=0.05,
    batch_size=64,
    target_steps=1500,
    epoch_limit=50,
    shown=(0.5, 0.9),
    shown_whole=0.5,
    genes_per_step=128,
    theta_lr=3.0,
    refit_theta=True,
    data_init=True,
)
_SMALL_TRAIN_FLOW = StageConfig(
    lr=1e-3,
    betas=(0.9, 0.999),
    clip_norm=1.0,
    warmup=0.05,
    final_lr=0.05,
    batch_size=64,
    target_steps=2500,
    epoch_limit=100,
    ema_decay=0.998,
    ema_every=1,
    balance=0.5,
)

PRESETS = {
    "tiny": ModelConfig(
        vae=replace(_SMALL_VAE, n_tokens=8, n_layers=1),
        flow=replace(_SMALL_FLOW, width=64, n_layers=2),
        train_vae=replace(_SMALL_TRAIN_VAE, target_steps=200),
        train_flow=replace(_SMALL_TRAIN_FLOW, target_steps=300),
    ),
    "small": ModelConfig(_SMALL_VAE, _SMALL_FLOW, _SMALL_TRAIN_VAE, _SMALL_TRAIN_FLOW),
    "cd4": ModelConfig(
        vae=VAEConfig(),
        flow=FlowConfig(),
        train_vae=StageConfig(max_epochs=60, batch_size=8),
        train_flow=StageConfig(lr=3e-5, betas=(0.9, 0.999), clip_norm=1.0, max_epochs=150, batch_size=64),
    ),
}

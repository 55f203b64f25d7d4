"""The diffusion transformer: velocity of a latent for a time and a condition.

Shapes: B cells, S tokens, L channels, D width. Labels are (B, 3) in the order of `config.ROLES`.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from scldm_cd4.config import ROLES, FlowConfig
from scldm_cd4.nn.layers import GatedMLP, SelfAttention

N_TIME_FEATURES = 256


def position_table(n_tokens: int, width: int) -> Tensor:
    """Return fixed [sin | cos] positions (1, S, D), in the float32 arithmetic of the released table."""
    half = width // 2
    frequency = np.arange(half, dtype=np.float32)
    frequency /= np.float32(half)
    frequency = (np.float32(1.0) / np.float32(10000.0) ** frequency).astype(np.float32)
    angle = np.outer(np.arange(n_tokens, dtype=np.float32), frequency)
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))[None]


def time_features(t: Tensor) -> Tensor:
    """Map times (B,) in [0, 1] -> [cos(t f) | sin(t f)] (B, 256), f_i = 10000^(-i / 128); t is not rescaled."""
    half = N_TIME_FEATURES // 2
    f = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * f[None]
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class TimeEmbedder(nn.Module):
    """Times to vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(N_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.mlp(time_features(t))


class DiTBlock(nn.Module):
    """Transformer block whose norms are modulated by the condition.

    The six chunks of the modulation are, in this order: scale, shift and gate of the attention, then scale, shift and
    gate of the MLP. The released weights need this order, although the final layer has shift before scale.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.ln_1 = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.attn = SelfAttention(width, config.n_heads, config.bias)
        self.ln_2 = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.mlp = GatedMLP(width, config.multiple_of)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, S, D) and condition (B, 1, D) -> (B, S, D)."""
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.adaln_modulation(c).chunk(6, dim=-1)  # (B, 1, D)
        x = torch.addcmul(x, gate_1, self.attn(modulate(self.ln_1(x), scale_1, shift_1)))
        return torch.addcmul(x, gate_2, self.mlp(modulate(self.ln_2(x), scale_2, shift_2)))


class FinalLayer(nn.Module):
    """Modulated norm and projection to latent channels; shift before scale."""

    def __init__(self, config: FlowConfig, n_channels: int) -> None:
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=False)
        self.linear = nn.Linear(width, n_channels, bias=config.bias)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias=config.bias))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, S, D) and condition (B, 1, D) -> (B, S, L)."""
        shift, scale = self.adaln_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), scale, shift))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x (1 + scale) + shift, for x (B, S, D) and scale and shift (B, 1, D), in one pass over the memory."""
    return torch.addcmul(shift, x, 1 + scale)


class DiT(nn.Module):
    """Velocity network of the flow in latent space.

    Parameters
    ----------
    config
        Sizes and initial scale of the label embeddings.
    n_tokens, n_channels
        Shape of the latent.
    vocabulary
        Number of donors, time points and perturbations. Each has one more embedding row, the last: the
        unconditional row for a dropped label.
    """

    def __init__(self, config: FlowConfig, n_tokens: int, n_channels: int, vocabulary: tuple[int, int, int]) -> None:
        super().__init__()
        self.config, self.vocabulary = config, tuple(vocabulary)
        self.class_embeddings = nn.ModuleDict(
            {role: nn.Embedding(n + 1, config.width) for role, n in zip(ROLES, vocabulary, strict=True)}
        )
        self.t_embedder = TimeEmbedder(config.width)
        self.pos_embed = nn.Parameter(position_table(n_tokens, config.width), requires_grad=False)
        self.input_proj = nn.Linear(n_channels, config.width, bias=config.bias)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config, n_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in self.class_embeddings.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=self.config.label_std)
        for layer in _linear(self.t_embedder.mlp):
            nn.init.normal_(layer.weight, std=0.02)
        # a fresh network is the identity in each block and gives velocity 0
        modulations = [block.adaln_modulation for block in self.blocks if isinstance(block, DiTBlock)]
        for layer in _linear(*modulations, self.final_layer):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def unconditional(self) -> Tensor:
        """The labels (3,) of a condition that is dropped whole."""
        return torch.tensor(self.vocabulary, device=self.pos_embed.device)

    def condition_embedding(self, labels: Tensor) -> Tensor:
        """Labels (B, 3) -> sum of the three embeddings (B, D)."""
        vectors = [self.class_embeddings[role](labels[:, i]) for i, role in enumerate(ROLES)]
        return vectors[0] + vectors[1] + vectors[2]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Latent (B, S, L), times (B,) and labels (B, 3) -> velocity (B, S, L)."""
        c = (self.t_embedder(t) + self.condition_embedding(labels))[:, None]  # (B, 1, D)
        h = self.input_proj(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        return self.final_layer(h, c)


def _linear(*parts: nn.Module) -> list[nn.Linear]:
    return [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]

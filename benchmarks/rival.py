"""A sampler in the manner of the reference, in plain terms: what this package is measured against.

It takes the same trained weights. At guidance weight 1 it does what weight 1 makes superfluous: the batch is doubled,
with the condition in both halves, and every velocity takes an unconditional and a conditional pass, weighted 0 and 1.
The flow is solved by torchdiffeq's adaptive dopri5 at the released tolerances, with 50 stored time points. Attention
is torch's ``flex_attention`` without compilation. Both halves are decoded, library sizes are drawn cell by cell, and
counts are drawn from gamma-Poisson mixtures for all rows.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm_cd4.nn import VAE, DiT

RTOL, ATOL, TIME_POINTS = 1e-3, 1e-6, 50


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention through uncompiled ``flex_attention``, which writes out the scores."""
    from torch.nn.attention import flex_attention as flex

    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # the same kernel, without a trace for every shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex.flex_attention(q.expand(len(k), -1, -1, -1).contiguous(), k.contiguous(), v.contiguous())


def heads(x: Tensor, n: int) -> Tensor:
    """(B, T, E) -> (B, n, T, E / n)."""
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def self_attention(layer: Any, x: Tensor) -> Tensor:
    """Fused projection, attention, output projection."""
    q, k, v = (heads(part, layer.n_heads) for part in layer.c_attn(x).split(x.shape[-1], dim=2))
    return layer.c_proj(eager_attention(q, k, v).transpose(1, 2).contiguous().view_as(x))


def gated_mlp(layer: Any, x: Tensor) -> Tensor:
    """SwiGLU."""
    return layer.c_proj(F.silu(layer.w1(x)) * layer.w2(x))


def velocity(dit: DiT, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Return what `DiT` gives, operation by operation."""
    c = dit.t_embedder(t) + dit.condition_embedding(labels)
    h = dit.input_proj(x) + dit.pos_embed
    for block in dit.blocks:
        parts = block.adaln_modulation(c).chunk(6, dim=-1)
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = (part.unsqueeze(1) for part in parts)
        h = h + gate_1 * self_attention(block.attn, block.ln_1(h) * (1 + scale_1) + shift_1)
        h = h + gate_2 * gated_mlp(block.mlp, block.ln_2(h) * (1 + scale_2) + shift_2)
    shift, scale = (part.unsqueeze(1) for part in dit.final_layer.adaln_modulation(c).chunk(2, dim=-1))
    return dit.final_layer.linear(dit.final_layer.norm(h) * (1 + scale) + shift)


def gene_block(block: Any, tokens: Tensor, genes: Tensor) -> Tensor:
    """Cross-attention of every gene (B, G, E) to the tokens of its cell (B, S, E), then the MLP."""
    k, v = (heads(part, block.attn.n_heads) for part in block.attn.c_attn(block.ln_1(tokens)).chunk(2, dim=-1))
    q = heads(block.attn.c_attn_q(block.ln_1q(genes)), block.attn.n_heads)
    y = genes + block.attn.c_proj(eager_attention(q, k, v).transpose(1, 2).contiguous().view_as(genes))
    return y + gated_mlp(block.mlp, block.ln_2(y))


def decode(vae: VAE, z: Tensor, library: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `VAE.decode` gives for all genes, with the gene queries projected for every cell."""
    decoder, genes = vae.decoder, torch.arange(1, vae.n_genes + 1, device=z.device)
    x = decoder.decoder_latent_input(z)
    for block in decoder.decoder_layers:
        x = x + self_attention(block.attn, block.ln_1(x))
        x = x + gated_mlp(block.mlp, block.ln_2(x))
    table = vae.input_layer.gene_embedding if vae.config.shared_embedding else decoder.gene_embedding
    h = gene_block(decoder.decoder_cross_attention, x, table(genes.expand(len(z), -1)))
    return vae.decoder_head(h, genes[None], library, vae._direct_logits(z, genes[None], labels))


@dataclass
class Rival:
    """The sampler of the reference on given networks."""

    vae: VAE
    dit: DiT
    guidance: float = 1.0
    doubled: bool = True
    """The batch stands twice, as the reference hands it to its solver."""
    evaluations: int = field(default=0, init=False)
    """Velocities asked for by the solver."""

    def field(self, t: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """Return the guided velocity from an unconditional and a conditional pass."""
        self.evaluations += 1
        times = torch.full((len(x),), float(t), device=x.device)
        null = velocity(self.dit, x, times, self.dit.unconditional.expand_as(labels))
        return null + self.guidance * (velocity(self.dit, x, times, labels) - null)

    @torch.no_grad()
    def latents(self, noise: Tensor, labels: Tensor, rtol: float = RTOL, atol: float = ATOL) -> Tensor:
        """Carry noise (B, S, L) to latents (B, S, L), or (2B, S, L) if `doubled`."""
        from torchdiffeq import odeint

        if self.doubled:
            noise, labels = torch.cat([noise, noise]), torch.cat([labels, labels])
        times = torch.linspace(0, 1, TIME_POINTS)
        return odeint(lambda t, x: self.field(t, x, labels), noise, times, rtol=rtol, atol=atol, method="dopri5")[-1]

    @torch.no_grad()
    def counts(self, z: Tensor, labels: Tensor, size_factors: nn.Module | Any) -> Tensor:
        """Draw counts (B, G) of latents; `size_factors` maps a cell's labels to (mean, sd) of its log library size."""
        sizes = []
        for row in labels:  # one distribution, one draw and one transfer per cell
            mean, sd = size_factors["_".join(str(x) for x in row.tolist()[:2])]
            sizes.append(torch.distributions.Normal(mean, sd).sample().exp().item())
        mu, theta = decode(self.vae, z, torch.tensor(sizes)[:, None], labels)
        rate = torch.distributions.Gamma(theta.expand_as(mu), theta / mu.clamp(min=1e-8)).sample()
        return torch.poisson(rate)

    def cells(self, noise: Tensor, labels: Tensor, size_factors: Any) -> Tensor:
        """Draw the counts of a batch; two draws of each latent if `doubled`."""
        labels_of_rows = torch.cat([labels, labels]) if self.doubled else labels
        return self.counts(self.latents(noise, labels), labels_of_rows, size_factors)

"""The last block of the decoder for many cells and all genes at once, without gradients.

The queries are the genes, the same for every cell, and of the output of the block only a projection to one or two
numbers per gene is needed. The output projection of the attention is applied to the values, of which there are few,
and that of the head to the last weights of the MLP; sums are taken in another order, no term is left out.

Shapes: B cells, S latent tokens, G genes, E width, H heads, d = E / H, F hidden width of the MLP, P numbers per gene.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm_cd4.nn.layers import CrossBlock

CPU_VALUES, GPU_VALUES = 2**18, 2**25
"""Values of a hidden layer that are laid out at once: on a CPU what its caches hold."""


def folds(block: CrossBlock, n_tokens: int) -> bool:
    """Return whether applying the output projection to the values takes fewer multiplications."""
    width = block.attn.c_proj.in_features
    return block.attn.n_heads * n_tokens <= n_tokens + width


def gene_outputs(block: CrossBlock, params: nn.Linear, x: Tensor, gene_vectors: Tensor) -> Tensor:
    """Map tokens (B, S, E) and gene vectors (G, E) to ``params(block(...))``, (B, G, P)."""
    n_cells, n_tokens, width = x.shape
    heads = block.attn.n_heads
    d = width // heads
    k, v = block.keys_values(x).view(n_cells, n_tokens, 2, heads, d).permute(2, 0, 3, 1, 4)  # (B, H, S, d)
    keys = x.new_zeros(n_cells, heads, d, heads, n_tokens)  # all heads side by side, 0 where they do not meet
    for h in range(heads):
        keys[:, h, :, h] = k[:, h].transpose(1, 2) / math.sqrt(d)
    keys = keys.view(n_cells, width, heads * n_tokens)
    project = block.attn.c_proj.weight.view(width, heads, d).permute(1, 2, 0)  # (H, d, E)
    values = (v @ project).reshape(n_cells, heads * n_tokens, width)
    queries = block.attn.c_attn_q(block.ln_1q(gene_vectors))  # (G, E)
    base = gene_vectors if block.attn.c_proj.bias is None else gene_vectors + block.attn.c_proj.bias
    last = params.weight @ block.mlp.c_proj.weight  # (P, F)
    values_at_once = CPU_VALUES if x.device.type == "cpu" else GPU_VALUES
    size = max(1, values_at_once // (n_cells * last.shape[1]) // 8) * 8
    out = []
    for q, e in zip(queries.split(size), base.split(size), strict=True):
        scores = torch.matmul(q, keys).view(n_cells, len(q), heads, n_tokens)
        gathered = scores.softmax(-1).view(n_cells, len(q), heads * n_tokens)
        y = torch.baddbmm(e.expand(n_cells, -1, -1), gathered, values)
        normed = block.ln_2(y)  # two products from it: the halves of one would be read across
        hidden = F.silu(block.mlp.w1(normed), inplace=True).mul_(block.mlp.w2(normed))
        out.append(F.linear(y, params.weight, params.bias) + F.linear(hidden, last))
    return torch.cat(out, dim=1)

"""Building blocks that the autoencoder and the diffusion transformer share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPLICIT_ATTENTION_KEYS = 16
"""On a CPU, attention over at most this many keys is written out: up to 3.7 times as fast as the fused kernel on one
CPU, as fast on another (docs/performance.md); over more keys the fused kernel was ahead."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Parameters
    ----------
    q
        Queries (B or 1, H, T, d).
    k, v
        Keys and values (B, H, W, d).
    mask
        (B, 1, 1, W), True where a key may be attended; None attends to all.

    Returns
    -------
    (B, H, T, d)
    """
    if q.device.type == "cpu" and k.shape[-2] <= EXPLICIT_ATTENTION_KEYS:
        scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)  # (B, H, T, W)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v, attn_mask=mask)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, T, E) -> (B, H, T, E / H), head j being the j-th contiguous slice of E."""
    b, t, e = x.shape
    return x.view(b, t, n_heads, e // n_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, d) -> (B, T, H d)."""
    b, h, t, d = x.shape
    return x.transpose(1, 2).reshape(b, t, h * d)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v."""

    def __init__(self, width: int, n_heads: int, bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.dropout(self.c_proj(merge_heads(attend(q, k, v))))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a source of another width."""

    def __init__(self, source_width: int, width: int, n_heads: int, bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn = nn.Linear(source_width, 2 * width, bias=bias)
        self.c_attn_q = nn.Linear(width, width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from queries (B or 1, T, E) to projected keys and values (B, W, 2E)."""
        k, v = (split_heads(part, self.n_heads) for part in keys_values.chunk(2, dim=-1))
        q = split_heads(self.c_attn_q(queries), self.n_heads)
        return self.dropout(self.c_proj(merge_heads(attend(q, k, v, mask))))


class GatedMLP(nn.Module):
    """SwiGLU: c_proj(SiLU(w1 x) * w2 x), hidden width 8/3 of the width rounded up to `multiple_of`."""

    def __init__(self, width: int, multiple_of: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = multiple_of * math.ceil(int(2 * (4 * width) / 3) / multiple_of)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        a, b = self.w1(x), self.w2(x)
        gated = F.silu(a) * b if torch.is_grad_enabled() else F.silu(a, inplace=True).mul_(b)
        return self.dropout(self.c_proj(gated))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then gated MLP, each with a residual."""

    def __init__(self, width: int, n_heads: int, multiple_of: int, bias: bool, dropout: float, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, n_heads, bias, dropout)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = GatedMLP(width, multiple_of, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    """Cross-attention block (MCAB): queries gather from a source; the residual is the un-normalised query.

    Parameters
    ----------
    n_queries
        Number of learned queries (inducing points); None when the caller brings the queries.
    """

    def __init__(
        self,
        source_width: int,
        width: int,
        n_heads: int,
        multiple_of: int,
        bias: bool,
        dropout: float,
        eps: float,
        n_queries: int | None = None,
    ) -> None:
        super().__init__()
        if n_queries is not None:
            self.inducing_points = nn.Parameter(torch.randn(n_queries, width))
        self.ln_1 = nn.LayerNorm(source_width, eps=eps)
        self.ln_1q = nn.LayerNorm(width, eps=eps)
        self.attn = CrossAttention(source_width, width, n_heads, bias, dropout)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = GatedMLP(width, multiple_of, dropout)

    def keys_values(self, source: Tensor) -> Tensor:
        """Project a source (..., E_source) to keys and values (..., 2E)."""
        return self.attn.c_attn(self.ln_1(source))

    def forward(self, keys_values: Tensor, queries: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Gather from `keys_values` (B, W, 2E) for queries (B or 1, T, E) -> (B, T, E)."""
        if queries is None:
            queries = self.inducing_points[None]  # (1, T, E)
        y = queries + self.attn(self.ln_1q(queries), keys_values, mask)
        return y + self.mlp(self.ln_2(y))

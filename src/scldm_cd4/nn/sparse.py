"""Latents of cells from their expressed genes alone, equal to those from all genes.

The queries of the encoder's first attention are learned and the same for every cell. Its softmax weights for a cell are
exp(s_gc) / sum_g exp(s_gc), where the score s_gc depends on gene g and count c alone. Sums over genes without counts
are therefore constants: sums over all genes at count 0, less those of the genes that the cell expresses, plus these at
their counts. Shapes: B cells, W expressed genes, H heads, S latent tokens, d width of a head, P pairs (gene, count).
"""

import math

import torch
from torch import Tensor

from scldm_cd4.nn.layers import merge_heads, split_heads
from scldm_cd4.nn.vae import VAE

MAX_DENSITY = 0.5
"""Share of expressed genes above which all genes are given to the encoder: each expressed gene is looked at twice."""
MIN_REST = 0.25
"""Weight that must stay, relative to all genes at count 0. Less would lose digits in the subtraction."""
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Terms of the sums that are laid out at once: on a CPU what its cache holds."""


class SparseEncoder:
    """The encoder of a trained `VAE` for cells given by their expressed genes.

    It holds sums made from the weights of this moment: build it anew when they have changed, which costs as much as
    encoding some cells. Cells whose sums cancel (`MIN_REST`) and batches above `MAX_DENSITY` are encoded from all
    genes. Latents differ from those of `VAE.encode` by rounding, about 1e-7 of their norm.

    Parameters
    ----------
    vae
        In evaluation mode.

    Raises
    ------
    ValueError
        `vae` attends to padding, so that there is nothing that these sums would equal, or is neither on a CPU nor on a
        CUDA device.
    """

    def __init__(self, vae: VAE) -> None:
        if not supports(vae):
            raise ValueError(
                "this autoencoder attends to padding, or its device has no double precision: use VAE.encode"
            )
        self.vae, self.n_heads = vae, vae.config.n_cross_heads
        self.all_genes = vae.config.encode == "all"
        cross = vae.encoder.ca_layer
        with torch.no_grad(), _full(vae):
            queries = cross.attn.c_attn_q(cross.ln_1q(cross.inducing_points[None]))
            q = split_heads(queries, self.n_heads)[0]  # (H, S, d)
            self.queries = (q / math.sqrt(q.shape[-1])).transpose(1, 2)  # (H, d, S)
            genes = torch.arange(1, vae.n_genes + 1, device=q.device)
            scores, values = self._scores(torch.zeros(len(genes), device=q.device), genes)
            self.reference = scores.amax(1, keepdim=True)  # (H, 1, S); keeps exp in range
            weights = (scores - self.reference).exp()  # (H, G, S)
            self.zero_sums = _weighted_sums(weights, values)[:, None]  # (H, 1, S, d + 1)
            subtracted = torch.cat([-weights, values], -1)
            self.zeros = torch.cat([torch.zeros_like(subtracted[:, :1]), subtracted], 1)  # row 0: padding

    @torch.no_grad()
    def __call__(self, counts: Tensor, genes: Tensor) -> Tensor:
        """Whole-number counts (B, W) of expressed genes (B, W), padded with 0 on the right -> latents (B, S, L)."""
        if self.all_genes and genes.shape[1] > MAX_DENSITY * self.vae.n_genes:
            return self._dense(counts, genes)
        with _full(self.vae):
            sums = self._sums(counts, genes)  # (H, B, S, d + 1)
            total = sums[..., -1]  # (H, B, S)
            heads = merge_heads((sums[..., :-1] / total[..., None]).transpose(0, 1))
        least = MIN_REST * self.zero_sums[..., -1] if self.all_genes else torch.finfo(torch.float32).tiny / 1e-7
        sound = (torch.isfinite(total) & (total > least)).all(-1).all(0)  # (B,)
        z = self.vae.latent(self.vae.encoder.tokens_from_heads(heads), counts, genes)
        if not sound.all():
            z[~sound] = self._dense(counts[~sound], genes[~sound])
        return z

    def _sums(self, counts: Tensor, genes: Tensor) -> Tensor:
        """Return sums of weighted values and, last, of weights (H, B, S, d + 1)."""
        base = int(counts.max()) + 1
        pairs, place = torch.unique(genes * base + counts.long(), return_inverse=True)
        scores, values = self._scores((pairs % base).to(counts.dtype), pairs // base)
        weights = scores.sub_(self.reference).exp_()
        weights[:, pairs < base] = 0.0  # padding
        table = torch.cat([weights, values], -1)  # (H, P, S + d + 1)
        n_queries, n_genes = weights.shape[-1], (genes > 0).sum(1)
        out = table.new_empty(self.n_heads, len(genes), n_queries, values.shape[-1])
        row_bytes = max(1, genes.shape[1] * table.shape[-1] * self.n_heads * table.element_size())
        step = max(1, CHUNK_BYTES[genes.device.type] // row_bytes)
        for rows in n_genes.argsort().split(step):  # cells of like numbers of genes, to lay out little padding
            width = int(n_genes[rows].max())
            out[:, rows] = _gathered(table, place[rows, :width], n_queries)
            if self.all_genes:
                out[:, rows] += _gathered(self.zeros, genes[rows, :width], n_queries)
        return (out.double() + self.zero_sums).float() if self.all_genes else out

    def _scores(self, counts: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Map counts and genes (P,) to scores (H, P, S), and values with a one behind (H, P, d + 1)."""
        keys_values = self.vae.encoder.ca_layer.keys_values(self.vae.input_layer(counts, genes))[None]
        k, v = (split_heads(part, self.n_heads)[0].float() for part in keys_values.chunk(2, -1))  # (H, P, d)
        return k @ self.queries, torch.cat([v, torch.ones_like(v[..., :1])], -1)

    def _dense(self, counts: Tensor, genes: Tensor) -> Tensor:
        return encode_densely(self.vae, counts, genes)


def encode_densely(vae: VAE, counts: Tensor, genes: Tensor) -> Tensor:
    """Encode counts (B, W) of expressed genes (B, W), padded with 0, to latents (B, S, L) by `VAE.encode`."""
    if vae.config.encode != "all":
        return vae.encode(counts, genes)
    whole = counts.new_zeros(len(counts), vae.n_genes + 1).scatter_(1, genes, counts)[:, 1:]
    return vae.encode(whole, torch.arange(1, vae.n_genes + 1, device=genes.device).expand(len(counts), -1))


def supports(vae: VAE) -> bool:
    """Whether the latents of `vae` do not depend on padding, on a device with double precision."""
    device = vae.encoder.ca_layer.inducing_points.device.type
    return (vae.config.encode == "all" or vae.config.mask_padding) and device in CHUNK_BYTES


def _full(vae: VAE) -> torch.autocast:
    """Keep sums of many weights in single precision, whatever the products of the networks are."""
    return torch.autocast(vae.encoder.ca_layer.inducing_points.device.type, enabled=False)


def _gathered(table: Tensor, place: Tensor, n_queries: int) -> Tensor:
    """Rows (H, P, S + d + 1) at places (B, W), summed over W as weights^T values (H, B, S, d + 1)."""
    h, (b, w) = len(table), place.shape
    rows = table.index_select(1, place.reshape(-1)).view(h * b, w, -1)
    return torch.bmm(rows[..., :n_queries].transpose(1, 2), rows[..., n_queries:]).view(h, b, n_queries, -1)


def _weighted_sums(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights^T values (H, S, d + 1) in double precision, one head after the other to save memory."""
    return torch.stack([w.double().T @ v.double() for w, v in zip(weights, values, strict=True)])

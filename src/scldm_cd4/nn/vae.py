"""The autoencoder between counts and latent tokens.

Shapes: B cells, W genes given, S latent tokens, L channels, E width. Gene indices are 1-based; 0 is padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm_cd4.config import ROLES, VAEConfig
from scldm_cd4.nn.decoding import folds, gene_outputs
from scldm_cd4.nn.layers import Block, CrossBlock
from scldm_cd4.nn.likelihood import nb_log_prob, poisson_log_prob

CROSS_PROJECTION_TOKENS = 16


class CountProjection(nn.Module):
    """A gene's vector e and its count c make a token."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.kind, self.log_counts = config.aggregation, config.log_counts
        if self.kind == "softbin":
            self.mlp_count = nn.Sequential(
                nn.Linear(1, config.bin_hidden), nn.SiLU(), nn.Linear(config.bin_hidden, config.n_bins)
            )
            self.bin_embeddings = nn.Parameter(torch.randn(config.n_bins, config.width))
        elif self.kind == "proj":
            self.count_embedding = nn.Linear(1, config.width)
        elif self.kind == "projconcat":
            self.mix = nn.Linear(2 * config.width, config.width)

    def forward(self, e: Tensor, c: Tensor) -> Tensor:
        """Vectors (..., E) and counts (...) -> tokens (..., E)."""
        c = c[..., None]
        if self.kind == "softbin":
            bins = self.mlp_count(torch.log1p(c) if self.log_counts else c).softmax(-1)  # (..., K)
            return e + bins @ self.bin_embeddings
        if self.kind == "log1p":
            return e * torch.log1p(c)
        if self.kind == "log1pzero":
            return e * torch.where(c == 0, -1.0, torch.log1p(c))
        if self.kind == "sqrt":
            return e * torch.sqrt(c + 1)
        if self.kind == "anscombe":
            return e * torch.asinh(torch.sqrt(c + 1))
        if self.kind == "proj":
            return e + self.count_embedding(c)
        return self.mix(torch.cat([e, torch.log1p(c).expand_as(e)], dim=-1))


class InputLayer(nn.Module):
    """Tokens of (gene, count) pairs."""

    def __init__(self, config: VAEConfig, n_genes: int) -> None:
        super().__init__()
        self.gene_embedding = nn.Embedding(n_genes + 1, config.width)
        self.projection = CountProjection(config)

    def forward(self, counts: Tensor, genes: Tensor) -> Tensor:
        """Map counts (...) and genes (...) to tokens (..., E)."""
        return self.projection(self.gene_embedding(genes), counts)


class Encoder(nn.Module):
    """Gene tokens to latent tokens."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c, shape = config, (config.multiple_of, config.bias, config.dropout, config.norm_eps)
        self.ca_layer = CrossBlock(c.width, c.width, c.n_cross_heads, *shape, n_queries=c.n_tokens)
        if c.positional:
            self.pos_embed = nn.Parameter(torch.zeros(1, c.n_tokens, c.width))
        self.positional = c.positional
        self.encoder_layers = nn.ModuleList(Block(c.width, c.n_heads, *shape) for _ in range(c.n_layers))
        self.cross_projection = c.projection == "cross_attention"
        if self.cross_projection:
            self.encoder_latent_ca = CrossBlock(
                c.width, c.n_channels, c.n_cross_heads, *shape, n_queries=CROSS_PROJECTION_TOKENS
            )
        else:
            norm = nn.LayerNorm(c.n_channels, eps=c.norm_eps, elementwise_affine=False)
            self.encoder_latent_input = nn.Sequential(nn.Linear(c.width, c.n_channels, bias=c.bias), norm)
        if c.kl_weight > 0:
            self.latent_log_variance = nn.Linear(c.width, c.n_channels)
            nn.init.zeros_(self.latent_log_variance.weight)
            nn.init.constant_(self.latent_log_variance.bias, -4.0)

    def tokens(self, keys_values: Tensor, mask: Tensor | None) -> Tensor:
        """Projected gene tokens (B, W, 2E) -> tokens before the latent projection (B, S, E)."""
        return self._trunk(self.ca_layer(keys_values, mask=mask))

    def tokens_from_heads(self, heads: Tensor) -> Tensor:
        """Map what the heads of the first attention gathered (B, S, E) to tokens before the latent projection."""
        first = self.ca_layer
        y = first.inducing_points + first.attn.dropout(first.attn.c_proj(heads))
        return self._trunk(y + first.mlp(first.ln_2(y)))

    def _trunk(self, x: Tensor) -> Tensor:
        if self.positional:
            x = x + self.pos_embed
        for block in self.encoder_layers:
            x = block(x)
        return x

    def project(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, S, E) -> latent (B, S, L); `shift` (B, S, L) is added before the norm."""
        if self.cross_projection:
            latent = self.encoder_latent_ca(self.encoder_latent_ca.keys_values(x))
            return latent if shift is None else latent + shift
        linear, norm = self.encoder_latent_input
        latent = linear(x)
        return norm(latent if shift is None else latent + shift)


class Decoder(nn.Module):
    """Latent tokens and gene vectors to one vector per gene."""

    def __init__(self, config: VAEConfig, n_genes: int) -> None:
        super().__init__()
        c, shape = config, (config.multiple_of, config.bias, config.dropout, config.norm_eps)
        self.cross_projection = c.projection == "cross_attention"
        if self.cross_projection:
            self.decoder_latent_ca = CrossBlock(c.n_channels, c.width, c.n_cross_heads, *shape, n_queries=c.n_tokens)
        else:
            norm = nn.LayerNorm(c.n_channels, eps=c.norm_eps, elementwise_affine=False)
            self.decoder_latent_input = nn.Sequential(norm, nn.Linear(c.n_channels, c.width, bias=c.bias))
        self.decoder_layers = nn.ModuleList(Block(c.width, c.n_heads, *shape) for _ in range(c.n_layers))
        self.decoder_cross_attention = CrossBlock(c.width, c.width, c.n_cross_heads, *shape)
        if not c.shared_embedding:
            self.gene_embedding = nn.Embedding(n_genes + 1, c.width)

    def tokens(self, z: Tensor) -> Tensor:
        """Latent (B, S, L) -> the tokens that the genes attend to (B, S, E)."""
        if self.cross_projection:
            x = self.decoder_latent_ca(self.decoder_latent_ca.keys_values(z))
        else:
            x = self.decoder_latent_input(z)
        for block in self.decoder_layers:
            x = block(x)
        return x

    def forward(self, z: Tensor, gene_vectors: Tensor) -> Tensor:
        """Latent (B, S, L) and gene vectors (1 or B, W, E) -> (B, W, E)."""
        cross = self.decoder_cross_attention
        return cross(cross.keys_values(self.tokens(z)), gene_vectors)


class LinearPath(nn.Module):
    """A linear path from counts to latent and from latent to gene logits, beside the transformer.

    With w_g = ln(1 + 1e4 count_g / library), it adds A (sum_g w_g u_g - m) to the latent before its norm, and
    v_g . (B z + b) to the logit of gene g. Started from the principal components of the training cells (see
    `train.initialise`), it gives the decoder a reason to read the latent from the first step on.
    """

    def __init__(self, config: VAEConfig, n_genes: int) -> None:
        super().__init__()
        rank, n_latent = config.linear_rank, config.latent_tokens * config.n_channels
        self.shape = (config.latent_tokens, config.n_channels)
        self.scores = nn.EmbeddingBag(n_genes + 1, rank, mode="sum")
        self.scores.requires_grad_(False)  # a fixed projection: learning it would fit the noise of few cells
        self.centre = nn.Parameter(torch.zeros(rank), requires_grad=False)
        self.to_latent = nn.Linear(rank, n_latent, bias=False)
        self.from_latent = nn.Linear(n_latent, rank)
        self.loadings = nn.Embedding(n_genes + 1, rank)
        for table in (self.scores, self.loadings):
            nn.init.normal_(table.weight, std=0.02)

    def encode(self, counts: Tensor, genes: Tensor) -> Tensor:
        """Map counts and genes (B, W) to what is added to the latent (B, S, L)."""
        weights = torch.log1p(1e4 * counts / counts.sum(1, keepdim=True).clamp(min=1.0))
        scores = self.scores(genes, per_sample_weights=weights) - self.centre  # (B, R)
        return self.to_latent(scores).view(-1, *self.shape)

    def logits(self, z: Tensor, genes: Tensor) -> Tensor:
        """Latent (B, S, L) and genes (1 or B, W) -> logits (B, W)."""
        factors = self.from_latent(z.flatten(1))  # (B, R)
        if len(genes) == 1:
            return factors @ self.loadings(genes[0]).T
        return (self.loadings(genes) @ factors[..., None])[..., 0]


class LabelEffects(nn.Module):
    """What donor, time point and perturbation add to the gene logits: v_g . (sum of one vector per label).

    The latent of a single cell tells little of a weak effect, which a decoder therefore shrinks. Here stands, fixed
    after training, what the latents leave untold of the mean of each label (see `train.effects`). The last row of each
    table is for a dropped label and adds nothing.
    """

    def __init__(self, rank: int, n_genes: int, vocabulary: tuple[int, int, int]) -> None:
        super().__init__()
        self.vectors = nn.ModuleDict(
            {role: nn.Embedding(n + 1, rank) for role, n in zip(ROLES, vocabulary, strict=True)}
        )
        self.loadings = nn.Embedding(n_genes + 1, rank)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)

    def forward(self, labels: Tensor, genes: Tensor) -> Tensor:
        """Labels (B, 3) and genes (1 or B, W) -> logits (B, W)."""
        vectors = [self.vectors[role](labels[:, i]) for i, role in enumerate(ROLES)]
        effect = vectors[0] + vectors[1] + vectors[2]  # (B, R)
        if len(genes) == 1:
            return effect @ self.loadings(genes[0]).T
        return (self.loadings(genes) @ effect[..., None])[..., 0]


class CountHead(nn.Module):
    """Gene vectors to the mean and dispersion of the counts."""

    def __init__(self, config: VAEConfig, n_genes: int) -> None:
        super().__init__()
        self.kind, self.per_gene = config.head, config.theta == "gene"
        two = config.head != "poisson" and not self.per_gene
        self.params = nn.Linear(config.width, 2 if two else 1)
        if config.head == "nb" and self.per_gene:
            self.theta = nn.Embedding(n_genes + 1, 1)
            nn.init.ones_(self.theta.weight)
        if config.head == "decoupled":
            if self.per_gene:
                self.theta_embed = nn.Embedding(n_genes + 1, 1)
            if config.gene_bias:
                self.gene_bias = nn.Embedding(n_genes + 1, 1)
                nn.init.zeros_(self.gene_bias.weight)

    def dispersion(self) -> Tensor:
        """Inverse dispersions (G,) of the table; only with a table per gene."""
        if self.kind == "decoupled":
            return F.softplus(self.theta_embed.weight[1:, 0]) + 1e-5
        return torch.exp(self.theta.weight[1:, 0])

    def forward(self, h: Tensor, genes: Tensor, library: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors (B, W, E), genes (1 or B, W), library (B, 1) and further logits (B, W) -> mu (B, W), theta.

        theta is (1 or B, W) with a table per gene, (B, W) else, and infinite (1, 1) for Poisson.
        """
        return self.distribution(self.params(h).float(), genes, library, logits)

    def distribution(
        self, out: Tensor, genes: Tensor, library: Tensor, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, from the projected vectors (B, W, 1 or 2)."""
        logit = out[..., 0] if logits is None else out[..., 0] + logits
        if self.kind == "decoupled":
            if hasattr(self, "gene_bias"):
                logit = logit + self.gene_bias(genes)[..., 0]
            raw = self.theta_embed(genes)[..., 0] if self.per_gene else out[..., 1]
            return torch.exp(torch.log(library) + logit), F.softplus(raw) + 1e-5
        mu = logit.softmax(-1) * library
        if self.kind == "poisson":
            return mu, mu.new_full((1, 1), float("inf"))
        return mu, torch.exp(self.theta(genes)[..., 0] if self.per_gene else out[..., 1])


class VAE(nn.Module):
    """Counts to latent tokens and back.

    Parameters
    ----------
    config
        Sizes and variants.
    n_genes
        Genes of the panel.
    vocabulary
        Number of donors, time points and perturbations; needed with ``label_rank`` only.

    Raises
    ------
    ValueError
        ``label_rank`` without `vocabulary`.
    """

    def __init__(self, config: VAEConfig, n_genes: int, vocabulary: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.config, self.n_genes = config, n_genes
        self.input_layer = InputLayer(config, n_genes)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, n_genes)
        self.decoder_head = CountHead(config, n_genes)
        if config.linear_rank:
            self.linear_path = LinearPath(config, n_genes)
        if config.label_rank:
            if vocabulary is None:
                raise ValueError(
                    "label_rank needs the vocabulary: the numbers of donors, time points and perturbations"
                )
            self.label_effects = LabelEffects(config.label_rank, n_genes, vocabulary)

    def encoder_tokens(self, counts: Tensor, genes: Tensor) -> Tensor:
        """Map counts (B, W) of genes (B, W) to tokens before the latent projection (B, S, E)."""
        mask = None
        if self.config.mask_padding:  # a cell of padding alone attends to it: attention over nothing is not a number
            mask = ((genes != 0) | (genes == 0).all(1, keepdim=True))[:, None, None, :]
        cross = self.encoder.ca_layer
        if counts.device.type == "cpu":
            # a token, its key and its value depend on (gene, count) alone: each different pair is computed once
            key = genes * (int(counts.max()) + 1) + counts.long()
            pairs, inverse = torch.unique(key, return_inverse=True)
            base = int(counts.max()) + 1
            unique = self.input_layer((pairs % base).to(counts.dtype), pairs // base)
            keys_values = F.embedding(inverse, cross.keys_values(unique))
        else:
            keys_values = cross.keys_values(self.input_layer(counts, genes))
        return self.encoder.tokens(keys_values, mask)

    def encode(self, counts: Tensor, genes: Tensor) -> Tensor:
        """Whole-number counts (B, W) of genes (B, W) -> latent (B, S, L), the posterior mean where there is one."""
        return self.latent(self.encoder_tokens(counts, genes), counts, genes)

    def posterior(self, counts: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, (B, S, L) each; only with ``kl_weight > 0``."""
        x = self.encoder_tokens(counts, genes)
        return self.latent(x, counts, genes), self.encoder.latent_log_variance(x).clamp(-12.0, 4.0)

    def latent(self, x: Tensor, counts: Tensor, genes: Tensor) -> Tensor:
        """Tokens before the latent projection (B, S, E), counts and genes (B, W) -> latent (B, S, L)."""
        shift = self.linear_path.encode(counts, genes) if self.config.linear_rank else None
        return self.encoder.project(x, shift)

    def decode(self, z: Tensor, genes: Tensor, library: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and dispersion of the counts.

        Parameters
        ----------
        z
            Latent (B, S, L).
        genes
            (W,), the same genes for all cells, or (B, W).
        library
            Total counts over the given genes (B, 1).
        labels
            (B, 3), used with ``label_rank`` only; None adds no effects of labels.

        Returns
        -------
        mu (B, W), and theta broadcastable to it.
        """
        genes = genes[None] if genes.ndim == 1 else genes
        table = self.input_layer.gene_embedding if self.config.shared_embedding else self.decoder.gene_embedding
        with torch.autocast(z.device.type, enabled=False):  # logits in bf16 would move means by percents
            direct = self._direct_logits(z.to(torch.promote_types(z.dtype, torch.float32)), genes, labels)
        cross, head = self.decoder.decoder_cross_attention, self.decoder_head
        if torch.is_grad_enabled() or len(genes) > 1 or not folds(cross, self.config.n_tokens):
            return head(self.decoder(z, table(genes)), genes, library, direct)
        out = gene_outputs(cross, head.params, self.decoder.tokens(z), table(genes[0]))
        return head.distribution(out, genes, library, direct)

    def _direct_logits(self, z: Tensor, genes: Tensor, labels: Tensor | None) -> Tensor | None:
        parts = []
        if self.config.linear_rank:
            if self.config.projection == "mlp":
                z = F.layer_norm(z, z.shape[-1:], eps=self.config.norm_eps)  # as the decoder does
            parts.append(self.linear_path.logits(z, genes))
        if self.config.label_rank and labels is not None:
            parts.append(self.label_effects(labels, genes))
        return sum(parts[1:], parts[0]) if parts else None

    def log_prob(self, counts: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        """Log-likelihood of counts (B, W), element by element, in nats."""
        return poisson_log_prob(counts, mu) if self.config.head == "poisson" else nb_log_prob(counts, mu, theta)

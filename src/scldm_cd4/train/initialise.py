"""Starting values from the statistics of the training cells.

Left to chance, the decoder starts on a plateau where it ignores the latent and gives every cell the mean profile; with
many genes or few cells it may stay there. Started from the principal components of the training cells, gene vectors
tell co-regulated genes apart and the linear path reads and writes the latent from the first step on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.train.theta import moment_theta, sample_rows, set_theta

FloatArray = NDArray[np.float32]
WRITE_SCALE = 0.3
"""Initial scale of what the latent writes through the linear path, relative to torch's default."""
HEAD_SCALE = 0.1
"""The same for the decoder's own logits."""
MAX_GENE_VALUE = 4.0
"""Gene vectors start as standardised loadings, cut off here."""


@dataclass(frozen=True)
class Components:
    """Principal components of log-normalised training cells that stand out from noise."""

    vectors: FloatArray  # (G, K), orthonormal
    scale: FloatArray  # (G,), values were divided by it
    deviation: FloatArray  # (K,), standard deviation of the scores
    signal: FloatArray  # (K,), share of the deviation that is not noise
    mean: FloatArray  # (G,)

    @property
    def loadings(self) -> FloatArray:
        """Change of a gene's logarithm per standard deviation of each score (G, K)."""
        return self.vectors * self.scale[:, None] * (self.deviation * self.signal)


def principal_components(counts: FloatArray, rank: int, generator: np.random.Generator) -> Components:
    """Components of ln(1 + 1e4 count / library), each gene divided by the square root of its standard deviation.

    A component counts as signal by what it has above the first component of the same values shuffled within each gene
    (parallel analysis; Horn 1965, 10.1007/BF02289447); those with nothing above it are left out.

    Parameters
    ----------
    counts
        (n, G), every cell with counts.
    rank
        Components at the most.
    generator
        Of the shuffling and of the randomised decomposition.
    """
    from sklearn.utils.extmath import randomized_svd

    values = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    mean = values.mean(0)
    values -= mean
    scale = np.sqrt(values.std(0) + 1e-3)
    values /= scale
    rank, state = min(rank, *(s - 1 for s in values.shape)), int(generator.integers(2**31))
    _, singular, vectors = randomized_svd(values, rank, random_state=state)
    noise = randomized_svd(generator.permuted(values, axis=0), 1, random_state=state)[1][0]
    n = int((singular > noise).sum())
    signal = np.sqrt(1 - (noise / singular[:n]) ** 2)
    deviation = singular[:n] / np.sqrt(len(values))
    return Components(*(np.asarray(a, np.float32) for a in (vectors[:n].T, scale, deviation, signal, mean)))


def initialise_from_data(vae: VAE, cells: CellData, rows: NDArray[np.int64], generator: np.random.Generator) -> None:
    """Start dispersions, gene vectors and the linear path from a sample of the training cells.

    Parameters
    ----------
    vae
        The fresh network, changed in place.
    cells, rows
        Training cells are these rows of `cells`.
    generator
        Draws the sample.
    """
    counts = cells.counts(sample_rows(rows, vae.n_genes, generator)).toarray()
    profile = np.maximum(counts.sum(0), 0.5) / counts.sum()
    x = torch.from_numpy(counts)
    set_theta(vae, moment_theta(x, torch.from_numpy(profile).float() * x.sum(1, keepdim=True)))
    if not vae.config.linear_rank:
        return
    components = principal_components(counts, vae.config.linear_rank - 1, generator)
    with torch.no_grad():
        _start_gene_vectors(vae, components)
        _start_linear_path(vae, components, np.log(profile), generator)


def _start_gene_vectors(vae: VAE, components: Components) -> None:
    n = min(components.vectors.shape[1], vae.config.width // 2)
    vectors = components.vectors[:, :n]
    standardised = vectors / np.maximum(vectors.std(0), 1e-8)
    vae.input_layer.gene_embedding.weight[1:, :n] = _tensor(standardised.clip(-MAX_GENE_VALUE, MAX_GENE_VALUE))


def _start_linear_path(
    vae: VAE, components: Components, log_profile: NDArray[np.float64], generator: np.random.Generator
) -> None:
    """Scores in, loadings out; the last factor is constant and holds the mean profile."""
    path, n = vae.linear_path, components.vectors.shape[1]
    weight = components.signal * np.sqrt(components.deviation / components.deviation[:1])
    scores = components.vectors / components.scale[:, None] / components.deviation * weight
    path.scores.weight.zero_()
    path.scores.weight[1:, :n] = _tensor(scores)
    path.centre.zero_()
    path.centre[:n] = _tensor(components.mean @ scores)
    if n:  # what is added to the latent has unit variance
        directions = generator.standard_normal(path.to_latent.weight.shape) / np.sqrt((weight**2).sum())
        path.to_latent.weight.copy_(_tensor(directions))
    path.loadings.weight.zero_()
    path.loadings.weight[1:, :n] = _tensor(components.loadings)
    path.loadings.weight[1:, -1] = _tensor(log_profile - log_profile.mean())
    path.from_latent.weight *= WRITE_SCALE
    path.from_latent.bias.zero_()
    path.from_latent.bias[-1] = 1.0
    vae.decoder_head.params.weight *= HEAD_SCALE


def _tensor(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

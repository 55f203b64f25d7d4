"""Starting values from the statistics of the training cells.

Left to chance, the decoder starts on a plateau where it ignores the latent and gives every cell the mean profile; with
many genes or few cells it may stay there. Started from the principal components of the training cells, gene vectors
tell co-regulated genes apart and the linear path reads and writes the latent from the first step on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from scldm_cd4.data.cells import CellData
from scldm_cd4.data.matrix import expressed_batch
from scldm_cd4.nn import VAE
from scldm_cd4.train.theta import moment_theta, sample_rows, set_theta

FloatArray = NDArray[np.float32]
HEAD_SCALE = 0.1
"""Initial scale of the decoder's own logits, relative to torch's default."""
RIDGE = 1e-3
MIN_DEVIATION = 1e-6
"""Below this standard deviation of the first component cells do not differ."""
MIN_SHARE = 1e-4
"""Components below this share of the first one's deviation are rounding, in which a gene without counts can stand."""
MAX_GENE_VALUE = 4.0
"""Gene vectors start as standardised loadings, cut off here."""


@dataclass(frozen=True)
class Components:
    """Principal components of log-normalised training cells."""

    vectors: FloatArray  # (G, K), orthonormal
    scale: FloatArray  # (G,), values were divided by it
    deviation: FloatArray  # (K,), standard deviation of the scores
    signal: FloatArray  # (K,), share of the variance of the scores that is not noise
    mean: FloatArray  # (G,)

    @property
    def loadings(self) -> FloatArray:
        """Change of a gene's logarithm per standard deviation of each score (G, K)."""
        return self.vectors * self.scale[:, None] * self.deviation


def principal_components(counts: FloatArray, rank: int, seed: int) -> Components:
    """Components of ln(1 + 1e4 count / library), each gene divided by the square root of its standard deviation.

    Of a component's variance, what the first component reaches after each gene's values are shuffled over the cells is
    taken for noise (parallel analysis; Horn 1965, 10.1007/BF02289447).

    Parameters
    ----------
    counts
        (n, G), every cell with counts.
    rank
        Components at the most; there are fewer where cells or genes are.
    seed
        Of the randomised decomposition and the shuffling.
    """
    from sklearn.utils.extmath import randomized_svd

    values = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    mean = values.mean(0)
    values -= mean
    scale = np.sqrt(values.std(0) + 1e-3)
    values /= scale
    _, singular, vectors = randomized_svd(values, min(rank, *(s - 1 for s in values.shape)), random_state=seed)
    shuffled = np.random.default_rng(seed).permuted(values, axis=0)
    noise = randomized_svd(shuffled, 1, random_state=seed)[1][0]
    told = singular >= MIN_SHARE * singular[0]
    vectors, singular = vectors[told], np.maximum(singular[told], 1e-6 * MIN_DEVIATION)
    signal, deviation = np.maximum(0.0, 1 - (noise / singular) ** 2), singular / np.sqrt(len(values))
    return Components(*(np.asarray(a, np.float32) for a in (vectors.T, scale, deviation, signal, mean)))


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
    if not vae.config.linear_rank or min(counts.shape) < 2:
        return
    components = principal_components(counts, vae.config.linear_rank - 1, int(generator.integers(2**31)))
    if components.deviation[0] < MIN_DEVIATION:
        return  # cells do not differ
    with torch.no_grad():
        _start_gene_vectors(vae, components)
        _start_linear_path(vae, components, counts, np.log(profile), generator)


def _start_gene_vectors(vae: VAE, components: Components) -> None:
    n = min(components.vectors.shape[1], vae.config.width // 2)
    vectors = components.vectors[:, :n]
    standardised = vectors / np.maximum(vectors.std(0), 1e-8)
    vae.input_layer.gene_embedding.weight[1:, :n] = _tensor(standardised.clip(-MAX_GENE_VALUE, MAX_GENE_VALUE))


def _start_linear_path(
    vae: VAE,
    components: Components,
    counts: FloatArray,
    log_profile: NDArray[np.float64],
    generator: np.random.Generator,
) -> None:
    """Scores in, loadings out; the last factor is constant and holds the mean profile.

    The latent is read by the ridge regression that finds the scores in it, each weighted by its share of signal, so
    that the fresh network is a linear denoiser.
    """
    path, n = vae.linear_path, components.vectors.shape[1]
    weight = np.sqrt(components.deviation / components.deviation[0])
    standardised = components.vectors / components.scale[:, None] / components.deviation  # unit variance of the scores
    path.scores.weight.zero_()
    path.scores.weight[1:, :n] = _tensor(standardised * weight)
    path.centre.zero_()
    path.centre[:n] = _tensor(components.mean @ (standardised * weight))
    directions = generator.standard_normal(path.to_latent.weight.shape) / np.sqrt((weight**2).sum())
    path.to_latent.weight.copy_(_tensor(directions))  # what is added to the latent has unit variance
    path.loadings.weight.zero_()
    path.loadings.weight[1:, :n] = _tensor(components.loadings)
    path.loadings.weight[1:, -1] = _tensor(log_profile - log_profile.mean())
    values = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)) - components.mean
    latent = torch.cat([_encode(vae, part) for part in np.array_split(counts, -(-len(counts) // 256))]).flatten(1)
    z = torch.cat([latent, torch.ones(len(latent), 1)], 1).double()
    ridge = z.T @ z + RIDGE * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
    scores = torch.from_numpy((values @ standardised) * components.signal).double()
    solution = torch.linalg.solve(ridge, z.T @ scores).float()  # (latent + 1, K)
    path.from_latent.weight.zero_()
    path.from_latent.bias.zero_()
    path.from_latent.weight[:n], path.from_latent.bias[:n] = solution[:-1].T, solution[-1]
    path.from_latent.bias[-1] = 1.0
    vae.decoder_head.params.weight *= HEAD_SCALE


def _encode(vae: VAE, counts: FloatArray) -> Tensor:
    genes, values = expressed_batch(sparse.csr_matrix(counts))
    return vae.encode(torch.as_tensor(values), torch.as_tensor(genes))


def _tensor(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

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
from scldm_cd4.nn import VAE
from scldm_cd4.train.theta import moment_theta, sample_rows, set_theta

FloatArray = NDArray[np.float32]
WRITE_SCALE = 0.3
"""Initial scale of what the latent writes through the linear path, relative to torch's default."""
HEAD_SCALE = 0.1
"""The same for the decoder's own logits."""
MAX_GENE_VALUE = 4.0
"""Gene vectors start as standardised loadings, cut off here."""
PRIOR_CELLS = 20
"""The effect of a label starts as if so many cells without effect had been seen besides."""
CHUNK = 4096
N_FITTING = 10


@dataclass(frozen=True)
class Components:
    """Principal components of log-normalised training cells."""

    vectors: FloatArray  # (G, K), orthonormal
    scale: FloatArray  # (G,), values were divided by it
    deviation: FloatArray  # (K,), standard deviation of the scores
    mean: FloatArray  # (G,)

    @property
    def loadings(self) -> FloatArray:
        """Change of a gene's logarithm per standard deviation of each score (G, K)."""
        return self.vectors * self.scale[:, None] * self.deviation


def principal_components(counts: FloatArray, rank: int, seed: int) -> Components:
    """Components of ln(1 + 1e4 count / library), each gene divided by the square root of its standard deviation.

    Parameters
    ----------
    counts
        (n, G), every cell with counts.
    rank
        Components at the most; there are fewer where cells or genes are.
    seed
        Of the randomised decomposition.
    """
    from sklearn.utils.extmath import randomized_svd

    values = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    mean = values.mean(0)
    values -= mean
    scale = np.sqrt(values.std(0) + 1e-3)
    values /= scale
    _, singular, vectors = randomized_svd(values, min(rank, *(s - 1 for s in values.shape)), random_state=seed)
    deviation = np.maximum(singular, 1e-6 * singular[:1]) / np.sqrt(len(values))
    return Components(*(np.asarray(a, np.float32) for a in (vectors.T, scale, deviation, mean)))


def initialise_from_data(vae: VAE, cells: CellData, rows: NDArray[np.int64], generator: np.random.Generator) -> None:
    """Start dispersions, gene vectors and the direct paths from the training cells.

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
    if vae.config.label_rank and cells.labels is not None:
        with torch.no_grad():
            _start_label_path(vae, label_effects(cells, rows), int(generator.integers(2**31)))
    if not vae.config.linear_rank:
        return
    components = principal_components(counts, vae.config.linear_rank - 1, int(generator.integers(2**31)))
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
    weight = np.sqrt(components.deviation / components.deviation[0])
    scores = components.vectors / components.scale[:, None] / components.deviation * weight
    path.scores.weight.zero_()
    path.scores.weight[1:, :n] = _tensor(scores)
    path.centre.zero_()
    path.centre[:n] = _tensor(components.mean @ scores)
    directions = generator.standard_normal(path.to_latent.weight.shape) / np.sqrt((weight**2).sum())
    path.to_latent.weight.copy_(_tensor(directions))  # what is added to the latent has unit variance
    path.loadings.weight.zero_()
    path.loadings.weight[1:, :n] = _tensor(components.loadings)
    path.loadings.weight[1:, -1] = _tensor(log_profile - log_profile.mean())
    path.from_latent.weight *= WRITE_SCALE
    path.from_latent.bias.zero_()
    path.from_latent.bias[-1] = 1.0
    vae.decoder_head.params.weight *= HEAD_SCALE


def label_effects(cells: CellData, rows: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Estimate what each donor, time point and perturbation does to the log share of each gene.

    Maximum likelihood of the Poisson model mean = library * b[context] * a[perturbation], fitted to the margins by
    turns (iterative proportional fitting), so that an unequal share of contexts is no effect of a perturbation. Each
    level has besides its own the counts of `PRIOR_CELLS` cells without effect. ln b is then split into donor and time
    point by their means.

    Parameters
    ----------
    cells, rows
        Training cells are these rows of `cells`.

    Returns
    -------
    (number of levels, G) for donor, time point and perturbation.
    """
    assert cells.labels is not None
    donor, timepoint, perturbation = cells.labels[rows].T
    n_donor, n_time, n_perturbation = cells.registry.vocabulary
    context = donor * n_time + timepoint
    by_context = np.zeros((n_donor * n_time, cells.n_genes))
    by_perturbation = np.zeros((n_perturbation, cells.n_genes))
    library = np.zeros((n_perturbation, n_donor * n_time))
    for index in np.array_split(np.arange(len(rows)), -(-len(rows) // CHUNK)):
        counts = cells.counts(rows[index])
        by_context += (indicator(context[index], len(by_context)) @ counts).toarray()
        by_perturbation += (indicator(perturbation[index], len(by_perturbation)) @ counts).toarray()
        np.add.at(library, (perturbation[index], context[index]), np.asarray(counts.sum(1)).ravel())
    profile = by_context.sum(0) + 0.5
    profile /= profile.sum()
    prior = PRIOR_CELLS * library.sum() / len(rows)
    a, b = np.ones_like(by_perturbation), np.tile(profile, (len(by_context), 1))
    for _ in range(N_FITTING):
        b = (by_context + prior * profile) / (library.T @ a + prior)
        a = (by_perturbation + prior * profile) / (library @ b + prior * profile)
    log_b = np.log(b / profile).reshape(n_donor, n_time, -1)
    weight = library.sum(0).reshape(n_donor, n_time, 1) + 1e-9
    by_donor = (weight * log_b).sum(1) / weight.sum(1)
    by_time = (weight * (log_b - by_donor[:, None])).sum(0) / weight.sum(0)
    return [by_donor, by_time, np.log(a)]


def indicator(codes: NDArray[np.int64], n: int) -> sparse.csr_matrix:
    """Return the matrix (n, len(codes)) that sums rows by code."""
    return sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n, len(codes)))


def _start_label_path(vae: VAE, effects: list[NDArray[np.float64]], seed: int) -> None:
    """Write the best approximation of the effects that the rank of the path allows."""
    from sklearn.utils.extmath import randomized_svd

    path, stacked = vae.label_path, np.concatenate(effects)
    rank = min(vae.config.label_rank, *stacked.shape)
    left, singular, right = randomized_svd(stacked, rank, random_state=seed)
    levels = left * np.sqrt(singular)
    start = 0
    for table in path.offsets.values():
        n = table.num_embeddings - 1
        table.weight[:n, :rank] = _tensor(levels[start : start + n])
        start += n
    path.loadings.weight[1:, :rank] = _tensor(right.T * np.sqrt(singular))


def _tensor(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

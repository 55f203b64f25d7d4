"""Mean effects of labels that the latents leave untold.

A weak effect changes a single cell less than counting noise does, so that its latent tells little of it and the decoded
cells of a perturbation lie too near to the control. Their mean over all training cells is known well, however: what
separates it from the decoded mean is estimated once, after training, and added to the gene logits.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.train.latents import CellEncoder, chunks, decode_means, encode_rows, inference_batch_size

FloatArray = NDArray[np.float64]
PRIOR_CELLS, PRIOR_COUNTS = 5, 2
"""An effect is shrunk as if so many cells without it, and so many counts of each gene besides, had been seen."""
MAX_CELLS = 200_000
"""Training cells that are looked at."""


def set_label_effects(vae: VAE, cells: CellData, rows: NDArray[np.int64], generator: np.random.Generator) -> None:
    """Write the effects that the latents leave untold into a trained autoencoder with ``label_rank``.

    Parameters
    ----------
    vae
        Changed in place.
    cells, rows
        Training cells are these rows of `cells`, with labels.
    generator
        Draws `MAX_CELLS` of more cells.
    """
    from sklearn.utils.extmath import randomized_svd

    if len(rows) > MAX_CELLS:
        rows = np.sort(generator.choice(rows, MAX_CELLS, replace=False))
    effects = untold_effects(vae, cells, rows)
    stacked = np.concatenate(effects)
    rank = min(vae.config.label_rank, *stacked.shape)
    left, singular, right = randomized_svd(stacked, rank, random_state=int(generator.integers(2**31)))
    levels, start = left * np.sqrt(singular), 0
    for table, effect in zip(vae.label_effects.vectors.values(), effects, strict=True):
        _write(table, slice(0, len(effect)), levels[start : start + len(effect)])
        start += len(effect)
    _write(vae.label_effects.loadings, slice(1, None), right.T * np.sqrt(singular))


def untold_effects(vae: VAE, cells: CellData, rows: NDArray[np.int64]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Logarithms of observed over decoded counts for each donor, time point and perturbation, shrunk toward nothing.

    For a level with n cells, ln((o + k) / (e + k)) with o the sum of their counts, e that of their decoded means and
    k = e * PRIOR_CELLS / n + PRIOR_COUNTS.

    Contexts come first and are split into donor and time point by their means; e of a perturbation has the effects of
    its contexts in it, so that an unequal share of contexts is no effect of its own.

    Returns
    -------
    (number of levels, G) for donor, time point and perturbation, zero for a level without cells.
    """
    assert cells.labels is not None
    n_donor, n_time, n_perturbation = cells.registry.vocabulary
    donor, timepoint, perturbation = cells.labels[rows].T
    context = donor * n_time + timepoint
    ones = np.ones((n_donor * n_time, cells.n_genes))
    log_context = log_ratios(vae, cells, rows, context, ones, context).reshape(n_donor, n_time, -1)
    weight = np.bincount(context, minlength=n_donor * n_time).reshape(n_donor, n_time, 1) + 1e-9
    by_donor = (weight * log_context).sum(1) / weight.sum(1)
    by_time = (weight * (log_context - by_donor[:, None])).sum(0) / weight.sum(0)
    factors = np.exp(by_donor[:, None] + by_time[None]).reshape(n_donor * n_time, -1)
    return by_donor, by_time, log_ratios(vae, cells, rows, context, factors, perturbation, n_perturbation)


def log_ratios(
    vae: VAE,
    cells: CellData,
    rows: NDArray[np.int64],
    context: NDArray[np.int64],
    factors: FloatArray,
    codes: NDArray[np.int64],
    n: int | None = None,
) -> FloatArray:
    """Return the shrunk log ratios of `untold_effects` for each of n codes (n, G).

    Decoded means are multiplied by the `factors` (contexts, G) of their context; n defaults to the contexts.
    """
    n = len(factors) if n is None else n
    observed, expected = np.zeros((n, cells.n_genes)), np.zeros((n, cells.n_genes))
    encoder = CellEncoder(vae)
    for index in chunks(len(rows), inference_batch_size(cells.n_genes)):
        counts = cells.counts(rows[index])
        library = torch.from_numpy(np.asarray(counts.sum(1), dtype=np.float32).reshape(-1, 1))
        latents = encode_rows(vae, cells, rows[index], encoder=encoder)
        mean = decode_means(vae, latents, library).numpy() * factors[context[index]]
        sums = sparse.csr_matrix((np.ones(len(index)), (codes[index], np.arange(len(index)))), shape=(n, len(index)))
        observed += (sums @ counts).toarray()
        expected += sums @ mean
    n_cells = np.bincount(codes, minlength=n)[:, None]
    prior = expected * PRIOR_CELLS / np.maximum(n_cells, 1) + PRIOR_COUNTS
    return np.log((observed + prior) / (expected + prior))


@torch.no_grad()
def _write(table: Any, rows: slice, values: FloatArray) -> None:
    table.weight[rows, : values.shape[1]] = torch.from_numpy(values).to(table.weight)

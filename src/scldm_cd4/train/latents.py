"""Latents of many cells: each is encoded once, and kept in memory or, above a size, in a memory-mapped file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.train.loaders import Batch, CountBatches

BATCH_VALUES = 200_000
"""Cells times genes of a batch without gradients."""


def inference_batch_size(n_genes: int) -> int:
    """Return the cells of a batch without gradients, fewer for wide panels."""
    return max(1, min(1024, BATCH_VALUES // n_genes))


def encoder_input(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return counts and genes (B, W) of a batch, as the encoder takes them."""
    counts = batch.get("counts", batch["target"])
    if "genes" in batch:
        return counts, batch["genes"]
    return counts, torch.arange(1, vae.n_genes + 1, device=counts.device).expand(len(counts), -1)


def chunks(n: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Positions 0 to n - 1, `size` at a time."""
    for start in range(0, n, size):
        yield np.arange(start, min(n, start + size))


def encode_rows(
    vae: VAE,
    cells: CellData,
    rows: NDArray[np.int64],
    *,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    path: str | Path | None = None,
) -> Tensor:
    """Encode cells by all their counts; see `encode`.

    Parameters
    ----------
    rows
        Rows of `cells`, in the order of the result.
    """
    data = CountBatches(cells, rows, expressed=vae.config.encode == "expressed")
    return encode(vae, data, batch_size=batch_size, max_bytes=max_bytes, path=path)


@torch.no_grad()
def encode(
    vae: VAE,
    data: CountBatches,
    *,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    path: str | Path | None = None,
) -> Tensor:
    """Encode cells in batches on the device of the network.

    Parameters
    ----------
    data
        The cells, in the order of the result.
    batch_size
        Cells at a time; None goes by the number of genes.
    max_bytes, path
        A result larger than this is kept in a memory-mapped file at `path`.

    Returns
    -------
    float32 (n, S, L) on the CPU.

    Raises
    ------
    ValueError
        The result is larger than `max_bytes` and there is no `path`.
    """
    shape = (len(data), vae.config.latent_tokens, vae.config.n_channels)
    if max_bytes is not None and 4 * int(np.prod(shape)) > max_bytes:
        if path is None:
            raise ValueError(f"latents of shape {shape} take more than max_bytes={max_bytes}: give a path for a file")
        out = torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=torch.float32).view(shape)
    else:
        out = torch.empty(shape)
    device = next(vae.parameters()).device
    training = vae.training
    vae.eval()
    for index in chunks(len(data), batch_size or inference_batch_size(vae.n_genes)):
        batch = {name: value.to(device) for name, value in data[index].items()}
        out[index[0] : index[-1] + 1] = vae.encode(*encoder_input(vae, batch)).float().cpu()
    vae.train(training)
    return out


@torch.no_grad()
def decode_means(vae: VAE, latents: Tensor, library: Tensor, labels: Tensor | None = None) -> Tensor:
    """Means (n, G) on the CPU of latents (n, S, L) at library sizes (n, 1), in batches.

    Labels (n, 3) add their effects where the network has any; None adds none.
    """
    device = next(vae.parameters()).device
    genes = torch.arange(1, vae.n_genes + 1, device=device)
    out = [
        vae.decode(
            latents[index].to(device),
            genes,
            library[index].to(device),
            None if labels is None else labels[index].to(device),
        )[0]
        .float()
        .cpu()
        for index in map(torch.from_numpy, chunks(len(latents), inference_batch_size(vae.n_genes)))
    ]
    return torch.cat(out)

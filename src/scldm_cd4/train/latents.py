"""Latents of many cells and back, in batches without gradients."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4._errors import DataError
from scldm_cd4._passes import chunks
from scldm_cd4._precision import choose
from scldm_cd4.config import VAEConfig
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.nn.sparse import SparseEncoder, encode_densely, supports
from scldm_cd4.train.loaders import Batch, CountBatches

BATCH_VALUES = 200_000
"""Cells times genes of a batch without gradients."""
GIB = 2**30


def inference_batch_size(n_genes: int) -> int:
    """Return the cells of a batch without gradients, fewer for wide panels."""
    return max(1, min(1024, BATCH_VALUES // n_genes))


def encoder_input(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return counts and genes (B, W) of a batch, as the encoder takes them."""
    counts = batch["counts"] if "counts" in batch else batch["target"]
    if "genes" in batch:
        return counts, batch["genes"]
    return counts, torch.arange(1, vae.n_genes + 1, device=counts.device).expand(len(counts), -1)


class CellEncoder:
    """The encoder of an autoencoder for cells given by their expressed genes; without gradients, without dropout.

    Build it anew when the weights have changed, see `scldm_cd4.nn.sparse.SparseEncoder`.
    """

    def __init__(self, vae: VAE) -> None:
        self.vae, self.device = vae, next(vae.parameters()).device
        self.precision = choose("fp32", self.device)
        self._encode: Callable[[Tensor, Tensor], Tensor]
        with self.precision.matmuls():
            self._encode = SparseEncoder(vae) if supports(vae) else partial(encode_densely, vae)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Expressed ``genes`` (B, W) and their ``counts`` (B, W) -> latents (B, S, L), float32 on the device."""
        training = self.vae.training
        self.vae.eval()
        try:
            with self.precision.matmuls():
                counts, genes = (batch[name].to(self.device, non_blocking=True) for name in ("counts", "genes"))
                return self._encode(counts, genes).float()
        finally:
            self.vae.train(training)


def latent_bytes(config: VAEConfig, n_cells: int) -> int:
    """Return how much the latents of some cells take: 4 bytes for each token and channel."""
    return 4 * n_cells * config.latent_tokens * config.n_channels


def encode_rows(
    vae: VAE,
    cells: CellData,
    rows: NDArray[np.int64],
    *,
    batch_size: int | None = None,
    encoder: CellEncoder | None = None,
) -> Tensor:
    """Encode cells by all their counts; see `encode`.

    Parameters
    ----------
    rows
        Rows of `cells`, in the order of the result.
    """
    return encode(vae, CountBatches(cells, rows, expressed=True), batch_size=batch_size, encoder=encoder)


def encode(
    vae: VAE, data: CountBatches, *, batch_size: int | None = None, encoder: CellEncoder | None = None
) -> Tensor:
    """Encode cells in batches on the device of the network.

    Parameters
    ----------
    data
        The cells, in the order of the result.
    batch_size
        Cells at a time; None goes by the number of genes.
    encoder
        Of the present weights, where more calls follow; None builds it.

    Returns
    -------
    float32 (n, S, L) on the CPU.

    Raises
    ------
    DataError
        The result does not fit the free memory.
    """
    n, config = len(data), vae.config
    size, free = latent_bytes(config, n), free_memory()
    if free is not None and size > free:  # said before the work
        raise DataError(
            f"the latents of {n:,} cells take {size / GIB:.1f} GiB and {free / GIB:.1f} GiB of memory are free; "
            "give checkpoint_dir= to train(), which keeps them in a file there, or use fewer cells"
        )
    out = torch.empty(n, config.latent_tokens, config.n_channels)
    encoder = encoder or CellEncoder(vae)
    for index in chunks(n, batch_size or inference_batch_size(vae.n_genes)):
        out[index[0] : index[-1] + 1] = encoder(data.seen(index)).cpu()
    return out


def free_memory() -> int | None:
    """Return the bytes that the system could give without swapping, where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return values[0] if values else None


@torch.no_grad()
def decode_means(vae: VAE, latents: Tensor, library: Tensor, labels: Tensor | None = None) -> Tensor:
    """Means (n, G) on the CPU of latents (n, S, L) at library sizes (n, 1), in batches.

    Labels (n, 3) add their effects where the network has any; None adds none.
    """
    device = next(vae.parameters()).device
    genes = torch.arange(1, vae.n_genes + 1, device=device)
    out = torch.empty(len(latents), vae.n_genes)
    with choose("fp32", device).matmuls():
        for index in map(torch.from_numpy, chunks(len(latents), inference_batch_size(vae.n_genes))):
            own = None if labels is None else labels[index].to(device)
            mean, _ = vae.decode(latents[index].to(device), genes, library[index].to(device), own)
            out[index[0] : index[-1] + 1] = mean
    return out

"""What the trained autoencoder says about given cells."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scldm_cd4._errors import DataError
from scldm_cd4._passes import chunks
from scldm_cd4.data.cells import CellData
from scldm_cd4.engines import Engine, on_device
from scldm_cd4.nn import VAE
from scldm_cd4.train.latents import CellEncoder, encode_rows, inference_batch_size
from scldm_cd4.train.loaders import Batch, CountBatches

PART = 16_384
"""Cells that are encoded before their latents go to a file."""
UNIT_BATCHES = 16
"""Batches that a worker of an engine encodes at a time."""


def as_rows(indices: Any, cells: CellData) -> NDArray[np.int64]:
    """Return row numbers of cells from numbers, a mask, cell names or None (all).

    Raises
    ------
    DataError
        There are none, or one is not a cell.
    """
    if indices is None:
        return np.arange(cells.n_cells)
    values = np.asarray(indices)
    if values.dtype == bool and values.shape == (cells.n_cells,):
        rows = np.flatnonzero(values)
    elif values.dtype.kind in "OUT":
        rows = cells.obs_names.get_indexer(values) if cells.obs_names.is_unique else np.full(1, -1)
    else:
        rows = values
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise DataError(f"indices must be row numbers, cell names or a mask of all {cells.n_cells} cells")
    if not len(rows):
        raise DataError("indices selects no cell")
    if rows.min() < 0 or rows.max() >= cells.n_cells:
        raise DataError(f"indices names a cell that is not there; rows are 0..{cells.n_cells - 1}")
    return rows.astype(np.int64)


def latents(
    vae: VAE,
    cells: CellData,
    rows: NDArray[np.int64],
    *,
    flatten: bool = True,
    batch_size: int | None = None,
    out: str | Path | None = None,
    engine: Engine | None = None,
) -> NDArray[np.float32]:
    """Return latents, float32: (n, S L) if flat, else tokens (n, S, L); in a ``.npy`` file `out` that is mapped.

    The workers of an `engine` encode cells that are read here.
    """
    if out is None and engine is None:
        z = encode_rows(vae, cells, rows, batch_size=batch_size).numpy()
        return z.reshape(len(z), -1) if flatten else z
    tokens = (vae.config.latent_tokens, vae.config.n_channels)
    shape = (len(rows), tokens[0] * tokens[1]) if flatten else (len(rows), *tokens)
    parts: Iterator[NDArray[np.float32]]
    if engine is None:
        encoder = CellEncoder(vae)
        pieces = (rows[index] for index in chunks(len(rows), PART))
        parts = (encode_rows(vae, cells, piece, batch_size=batch_size, encoder=encoder).numpy() for piece in pieces)
    else:
        units = _seen(cells, rows, batch_size or inference_batch_size(vae.n_genes))
        parts = engine.map(_encode_all, Encoding(vae), units, gpu=next(vae.parameters()).device.type != "cpu")
    if out is None:
        return np.concatenate([z.reshape(len(z), *shape[1:]) for z in parts])
    mapped, start = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape), 0
    for z in parts:
        mapped[start : start + len(z)] = z.reshape(len(z), *shape[1:])
        start += len(z)
    mapped.flush()
    return mapped


@dataclass
class Encoding:
    """What a worker needs to encode any cells."""

    vae: VAE

    def on(self, device: str) -> "Encoding":
        """Return it with the network on a kind of device."""
        return Encoding(on_device(self.vae, device))

    @cached_property
    def encoder(self) -> CellEncoder:
        """The encoder of the network."""
        return CellEncoder(self.vae)


def _encode_all(job: Encoding, batches: list[Batch]) -> NDArray[np.float32]:
    """Encode batches one after the other (n, S, L)."""
    return np.concatenate([job.encoder(batch).cpu().numpy() for batch in batches])


def _seen(cells: CellData, rows: NDArray[np.int64], size: int) -> Iterator[list[Batch]]:
    """Yield what the encoder sees of cells, `UNIT_BATCHES` batches at a time."""
    data = CountBatches(cells, rows, expressed=True)
    for unit in chunks(len(rows), UNIT_BATCHES * size):
        yield [data.seen(unit[batch]) for batch in chunks(len(unit), size)]


@torch.inference_mode()
def normalized_expression(
    vae: VAE,
    cells: CellData,
    rows: NDArray[np.int64],
    *,
    library_size: float | str = 1.0,
    genes: NDArray[np.int64] | None = None,
    batch_size: int | None = None,
) -> NDArray[np.float32]:
    """Return decoded means (n, genes), scaled to a library size or, with ``"latent"``, to that of the cell.

    Raises
    ------
    DataError
        The library size is no positive number.
    """
    own = library_size == "latent"
    if not own and not (isinstance(library_size, int | float) and 0 < library_size < float("inf")):
        raise DataError(f"library_size takes 'latent' or a positive number, got {library_size!r}")
    parts = []
    for x, mu, _ in _decoded(vae, cells, rows, batch_size):
        total = x.sum(1, keepdim=True)
        scaled = (mu if own else mu / total * float(library_size)).float().cpu().numpy()
        parts.append(scaled if genes is None else scaled[:, genes])
    return np.concatenate(parts)


@torch.inference_mode()
def reconstruction_error(
    vae: VAE, cells: CellData, rows: NDArray[np.int64], *, batch_size: int | None = None
) -> NDArray[np.float64]:
    """Return the negative log-likelihood of each cell (n,), nats summed over genes, decoded from its own latent."""
    parts = [
        -vae.log_prob(x, mu, theta.float()).double().sum(1).cpu().numpy()
        for x, mu, theta in _decoded(vae, cells, rows, batch_size)
    ]
    return np.concatenate(parts)


def _decoded(vae: VAE, cells: CellData, rows: NDArray[np.int64], batch_size: int | None) -> Any:
    """Yield counts, means and dispersions of cells in batches; labels are used where `cells` has them."""
    size = batch_size or inference_batch_size(vae.n_genes)
    device = next(vae.parameters()).device
    genes = torch.arange(1, vae.n_genes + 1, device=device)
    encoder = CellEncoder(vae)
    for start in range(0, len(rows), size):
        index = rows[start : start + size]
        z = encode_rows(vae, cells, index, batch_size=size, encoder=encoder).to(device)
        x = torch.from_numpy(cells.counts(index).toarray()).to(device)
        labels = None if cells.labels is None else torch.from_numpy(cells.labels[index]).to(device)
        mu, theta = vae.decode(z, genes, x.sum(1, keepdim=True), labels)
        yield x, mu, theta

"""Latents of all training cells in a file: encoded once, by all processes together, and kept over a stop."""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4._errors import DataError
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.train.checkpoint_io import write_json
from scldm_cd4.train.latents import GIB, CellEncoder, encode_rows, latent_bytes
from scldm_cd4.train.launch import processes, wait_for_all

BLOCK = 16_384
"""Cells that are encoded, recorded with a checksum, and taken up or encoded again, at a time."""


def cached_latents(vae: VAE, cells: CellData, rows: NDArray[np.int64], path: Path) -> Tensor:
    """Encode cells into a file, each process its share, and map the file.

    What an earlier run left there is taken up where it came from the same weights and cells and its checksums hold.

    Parameters
    ----------
    vae
        Its encoder gives the latents.
    cells, rows
        Rows of `cells`, in the order of the result.
    path
        The file; records of what is in it lie beside it. All processes must see the same one.

    Returns
    -------
    float32 (n, S, L), backed by the file.

    Raises
    ------
    DataError
        The disk has no room for it.
    """
    rank, world = processes()
    shape = (len(rows), vae.config.latent_tokens, vae.config.n_channels)
    size, key = latent_bytes(vae.config, len(rows)), _fingerprint(vae, cells, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not (path.is_file() and path.stat().st_size == size and _records(path, key)):
        discard(path)
        _reserve(path, size, len(rows))
        write_json(_record(path, 0), {"key": key, "crc": {}})
    wait_for_all()
    known = _records(path, key)
    wait_for_all()  # all have read before one writes
    out = torch.from_file(str(path), shared=True, size=size // 4, dtype=torch.float32).view(shape)
    encoder, own = CellEncoder(vae), dict[str, int]()
    for number in range(rank, -(-len(rows) // BLOCK), world):
        part = slice(number * BLOCK, min(len(rows), (number + 1) * BLOCK))
        if known.get(str(number)) != _checksum(out[part]):
            out[part] = encode_rows(vae, cells, rows[part], encoder=encoder)
        own[str(number)] = _checksum(out[part])
        write_json(_record(path, rank), {"key": key, "crc": own})
    wait_for_all()
    return out


def discard(path: Path) -> None:
    """Remove the file and its records."""
    for file in (path, *path.parent.glob(f"{path.stem}.*.json")):
        file.unlink(missing_ok=True)


def _reserve(path: Path, size: int, n: int) -> None:
    """Take the disk space at once: a mapped file that outgrows its disk kills the process."""
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    try:
        if size > free:
            raise OSError("the disk is too full")
        with path.open("wb") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, size)
            handle.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise DataError(
            f"the latents of {n:,} cells take {size / GIB:.1f} GiB and {free / GIB:.1f} GiB are free at {path.parent}: "
            f"{error}. Choose another checkpoint_dir or use fewer cells"
        ) from error


def _record(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.{rank}.json")


def _records(path: Path, key: str) -> dict[str, int]:
    """Return checksums by number of block that processes of this or an earlier run recorded."""
    found: dict[str, int] = {}
    for file in sorted(path.parent.glob(f"{path.stem}.*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["key"] == key:
            found |= record["crc"]
    return found


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.numpy().data)


def _fingerprint(vae: VAE, cells: CellData, rows: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(repr((cells.registry.genes, cells.n_cells)).encode())
    digest.update(np.ascontiguousarray(rows).data)
    digest.update(np.ascontiguousarray(cells.library).data)
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

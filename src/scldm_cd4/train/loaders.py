"""Shuffled batches of training cells, drawn from the counts or from cached latents on the fly."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scldm_cd4.data.batches import expressed_batch
from scldm_cd4.data.cells import CellData
from scldm_cd4.train.rng import key_seed, keyed_generator

Batch = dict[str, Tensor]


class EpochSampler(Sampler[NDArray[np.int64]]):
    """All positions in a new order each epoch, in batches of nearly equal size.

    The order depends on the seed and the epoch alone. An epoch has ``ceil(n / batch_size)`` batches for each process.

    Parameters
    ----------
    n
        Number of items.
    batch_size
        Largest batch.
    seed
        Seed of the order; None keeps the items in place.
    rank, world
        This process and the number of processes; each takes every `world`-th item, filled up to equal length.
    """

    def __init__(self, n: int, batch_size: int, seed: int | None, *, rank: int = 0, world: int = 1) -> None:
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._per_process // self.batch_size)

    @property
    def _per_process(self) -> int:
        return -(-self.n // self.world)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        start, self.start = self.start, 0
        order = np.arange(self.n)
        if self.seed is not None:
            order = np.random.default_rng(key_seed(self.seed, self.epoch)).permutation(self.n)
        own = np.resize(order, self._per_process * self.world)[self.rank :: self.world]
        yield from np.array_split(own, len(self))[start:]


class CountBatches(Dataset[Batch]):
    """Counts of cells as tensors; an item is the batch at an array of positions among `rows`.

    Parameters
    ----------
    cells
        Aligned cells.
    rows
        Rows of `cells` that take part.
    expressed
        Also give the genes with a count and their counts, padded with gene 0, for the encoder.
    """

    def __init__(self, cells: CellData, rows: NDArray[np.int64], *, expressed: bool) -> None:
        self.cells, self.rows, self.expressed = cells, np.asarray(rows), expressed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        csr = self.cells.counts(self.rows[positions])
        batch = {"target": torch.from_numpy(csr.toarray())}  # (B, G)
        if self.expressed:
            genes, counts = expressed_batch(csr)
            batch |= {"genes": torch.as_tensor(genes), "counts": torch.as_tensor(counts)}  # (B, W)
        return batch


class LatentBatches(Dataset[Batch]):
    """Cached latents (n, S, L) with their labels (n, 3)."""

    def __init__(self, latents: Tensor, labels: Tensor) -> None:
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        index = torch.from_numpy(positions)
        return {"latent": self.latents[index], "labels": self.labels[index]}


def _as_is(batch: Any) -> Any:
    return batch


class ResumableLoader(DataLoader[Batch]):
    """A loader that can start in the middle of an epoch; `done` counts the batches trained on in this epoch."""

    done = 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the batches done in it."""
        sampler: Any = self.sampler
        return {"epoch": sampler.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches done."""
        sampler: Any = self.sampler
        finished = state["done"] >= len(sampler)
        sampler.set_epoch(state["epoch"] + finished)
        sampler.start = self.done = 0 if finished else state["done"]


def make_loader(
    data: Dataset[Batch], batch_size: int, seed: int | None, *, num_workers: int = 0, pin_memory: bool = False
) -> ResumableLoader:
    """Make a loader of shuffled batches; without seed in order (validation) and the same in every process."""
    distributed = seed is not None
    rank, world = (int(os.environ.get(name, d)) if distributed else d for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    n = len(data)  # type: ignore[arg-type]
    return ResumableLoader(
        data,
        sampler=EpochSampler(n, batch_size, seed, rank=rank, world=world),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=keyed_generator(seed or 0),
    )

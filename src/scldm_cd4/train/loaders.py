"""Shuffled batches of training cells, drawn from the counts or from cached latents on the fly."""

import os
from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scldm_cd4.data.batches import expressed_batch
from scldm_cd4.data.cells import CellData
from scldm_cd4.train.rng import key_seed, keyed_generator

Batch = dict[str, Tensor]


class EpochSampler(Sampler[NDArray[np.int64]]):
    """All positions in a new order each epoch, in batches of nearly equal size; without seed in order, in full batches.

    The order depends on the seed and the epoch alone. An epoch has ``ceil(n / batch_size)`` batches for each process.
    With weights, an epoch still has n items: each occurs as often as its share of the weights asks for, rounded up or
    down by chance (systematic resampling).

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
    weights
        Positive weight of each item (n,); None for equal ones. Without seed they are not used.
    even
        Make all shuffled batches of one size: an epoch repeats a few items, fewer than it has batches.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int | None,
        *,
        rank: int = 0,
        world: int = 1,
        weights: NDArray[np.float64] | None = None,
        even: bool = False,
    ) -> None:
        self.even = even
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.ends = None if weights is None else np.cumsum(weights) * (n / np.sum(weights))
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
            generator = np.random.default_rng(key_seed(self.seed, self.epoch))
            if self.ends is not None:
                places = np.searchsorted(self.ends, np.arange(self.n) + generator.random(), side="right")
                order = np.minimum(places, self.n - 1)  # the last end may lie below n by rounding
            order = generator.permutation(order)
        n = self._per_process
        if self.even and self.seed is not None:
            n = len(self) * -(-n // len(self))
        own = np.resize(order, n * self.world)[self.rank :: self.world]
        batches = np.array_split(own, len(self))
        if self.seed is None:
            batches = [own[i : i + self.batch_size] for i in range(0, len(own), self.batch_size)]
        yield from batches[start:]


def split_counts(
    csr: sparse.csr_matrix, shares: tuple[float, float], generator: np.random.Generator, whole: float = 0.0
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split counts in two by chance: each molecule goes to the first part with a probability drawn for its cell.

    Parts of a Poisson count are independent given its rate, so that what one part tells of the other is the rate and
    nothing of the counting noise (binomial count splitting; Batson et al. 2019, 10.1101/786269).

    Parameters
    ----------
    csr
        Whole numbers (n, G).
    shares
        Range of the probabilities, uniform over cells.
    whole
        Share of cells that are not split but given twice.

    Returns
    -------
    The two parts, which add up to `csr` where cells are split.
    """
    n_values = np.diff(csr.indptr)
    share = generator.uniform(*shares, size=csr.shape[0])
    first = generator.binomial(csr.data.astype(np.int64), np.repeat(share, n_values))
    twice = np.repeat(generator.random(csr.shape[0]) < whole, n_values)
    parts = []
    for data in (np.where(twice, csr.data, first), np.where(twice, csr.data, csr.data - first)):
        part = sparse.csr_matrix((data.astype(np.float32), csr.indices, csr.indptr), shape=csr.shape, copy=True)
        part.eliminate_zeros()
        parts.append(part)
    return parts[0], parts[1]


class CountBatches(Dataset[Batch]):
    """Counts of cells as tensors; an item is the batch at an array of positions among `rows`.

    Parameters
    ----------
    cells
        Aligned cells.
    rows
        Rows of `cells` that take part.
    expressed
        Give the encoder the genes with a count and their counts, padded with gene 0, instead of all genes.
    shown
        Range of the share of counts that the encoder sees, the target being the rest; None: both are all counts.
    shown_whole
        Share of cells for which both are all counts nevertheless.
    seed
        Of the shares; equal positions are split alike.
    """

    def __init__(
        self,
        cells: CellData,
        rows: NDArray[np.int64],
        *,
        expressed: bool,
        shown: tuple[float, float] | None = None,
        shown_whole: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.cells, self.rows, self.expressed = cells, np.asarray(rows), expressed
        self.shown, self.shown_whole, self.seed = shown, shown_whole, seed

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: NDArray[np.int64]) -> "CountBatches":
        """Return the cells at these positions alone."""
        chosen = copy(self)
        chosen.rows = self.rows[positions]
        return chosen

    def _read(self, positions: NDArray[np.int64]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Return what the encoder sees and what the decoder must give."""
        whole = self.cells.counts(self.rows[positions])
        if self.shown is None:
            return whole, whole
        generator = np.random.default_rng([self.seed, *map(int, positions)])
        return split_counts(whole, self.shown, generator, self.shown_whole)

    def seen(self, positions: NDArray[np.int64]) -> Batch:
        """Return the expressed genes that the encoder sees and their counts, (B, W) each, without the target."""
        genes, counts = expressed_batch(self._read(positions)[0])
        return {"genes": torch.as_tensor(genes), "counts": torch.as_tensor(counts)}

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        seen, target = self._read(positions)
        batch = {"target": torch.from_numpy(target.toarray())}  # (B, G)
        if self.expressed:
            genes, counts = expressed_batch(seen)
            batch |= {"genes": torch.as_tensor(genes), "counts": torch.as_tensor(counts)}  # (B, W)
        elif self.shown is not None:
            batch["counts"] = torch.from_numpy(seen.toarray())  # (B, G)
        return batch


class LatentBatches(Dataset[Batch]):
    """Cached latents (n, S, L) with their labels (n, 3).

    Parameters
    ----------
    balance
        A cell of a perturbation with m cells weighs ``m ** -balance`` when batches are drawn: 0 draws cells alike, 1
        perturbations alike.
    """

    def __init__(self, latents: Tensor, labels: Tensor, *, balance: float = 0.0) -> None:
        self.latents, self.labels = latents, labels
        self.weights: NDArray[np.float64] | None = None
        if balance:
            perturbation = labels[:, -1].numpy()
            self.weights = np.bincount(perturbation)[perturbation] ** -float(balance)

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
    data: Dataset[Batch],
    batch_size: int,
    seed: int | None,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    even: bool = False,
) -> ResumableLoader:
    """Make a loader of shuffled batches; without seed in order (validation) and the same in every process."""
    distributed = seed is not None
    rank, world = (int(os.environ.get(name, d)) if distributed else d for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    n = len(data)  # type: ignore[arg-type]
    return ResumableLoader(
        data,
        sampler=EpochSampler(
            n, batch_size, seed, rank=rank, world=world, weights=getattr(data, "weights", None), even=even
        ),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=keyed_generator(seed or 0),
    )

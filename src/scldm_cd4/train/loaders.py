"""Shuffled batches of training cells, drawn from the counts or from cached latents on the fly."""

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scldm_cd4.data.cells import CellData
from scldm_cd4.data.matrix import expressed_batch
from scldm_cd4.train.launch import processes
from scldm_cd4.train.order import Draw, EpochSampler, cell_generators
from scldm_cd4.train.rng import keyed_generator

Batch = dict[str, Any]
"""Tensors by name; ``n_total``, a number, is there where other processes have cells of the same batch."""


FETCH_CELLS, FETCH_BLOCKS = 8192, 32
"""Cells, or blocks of cells where these are more, that are read from a file at a time and shuffled with each other."""


def split_counts(
    csr: sparse.csr_matrix,
    shares: tuple[float, float],
    generators: Iterable[np.random.Generator],
    whole: float = 0.0,
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
    generators
        One for each cell, used in turn.
    whole
        Share of cells that are not split but given twice.

    Returns
    -------
    The two parts, which add up to `csr` where cells are split.
    """
    first, second = csr.data.copy(), csr.data.copy()
    molecules = csr.data.astype(np.int64)
    for start, stop, generator in zip(csr.indptr[:-1], csr.indptr[1:], generators, strict=True):
        share, twice = generator.uniform(*shares), generator.random() < whole
        if not twice:
            first[start:stop] = generator.binomial(molecules[start:stop], share)
            second[start:stop] -= first[start:stop]
    parts = []
    for data in (first, second):
        part = sparse.csr_matrix((data, csr.indices, csr.indptr), shape=csr.shape, copy=True)
        part.eliminate_zeros()
        parts.append(part)
    return parts[0], parts[1]


@dataclass(frozen=True)
class Fetched:
    """Cells of several batches, read together."""

    counts: sparse.csr_matrix
    positions: NDArray[np.int64]
    draws: list[Draw]


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

    def seen(self, positions: NDArray[np.int64]) -> Batch:
        """Return the expressed genes that the encoder sees and their counts, (B, W) each, without the target."""
        draw = Draw(positions)
        genes, counts = expressed_batch(self._split(self._counts(draw), draw)[0])
        return {"genes": torch.as_tensor(genes), "counts": torch.as_tensor(counts)}

    def fetch(self, draws: list[Draw]) -> Fetched:
        """Read the cells of several batches."""
        positions = np.unique(np.concatenate([draw.positions for draw in draws]))
        return Fetched(self.cells.counts(self.rows[positions]), positions, draws)

    def cut(self, fetched: Fetched, draw: Draw) -> Batch:
        """Return one of the batches that were read together."""
        return self._batch(fetched.counts[np.searchsorted(fetched.positions, draw.positions)], draw)

    def __getitem__(self, item: NDArray[np.int64] | Draw | list[Draw]) -> Any:
        if isinstance(item, list):
            return self.fetch(item)
        draw = item if isinstance(item, Draw) else Draw(item)
        return self._batch(self._counts(draw), draw)

    def _counts(self, draw: Draw) -> sparse.csr_matrix:
        return self.cells.counts(self.rows[draw.positions])

    def _split(self, whole: sparse.csr_matrix, draw: Draw) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Return what the encoder sees and what the decoder must give."""
        if self.shown is None:
            return whole, whole
        generators = cell_generators(self.seed, draw.epoch, draw.positions)
        return split_counts(whole, self.shown, generators, self.shown_whole)

    def _batch(self, whole: sparse.csr_matrix, draw: Draw) -> Batch:
        seen, target = self._split(whole, draw)
        batch: Batch = {"target": torch.from_numpy(target.toarray())}  # (B, G)
        if self.expressed:
            genes, counts = expressed_batch(seen)
            batch |= {"genes": torch.as_tensor(genes), "counts": torch.as_tensor(counts)}  # (B, W)
        elif self.shown is not None:
            batch["counts"] = torch.from_numpy(seen.toarray())  # (B, G)
        return batch | _of_all(draw)


class LatentBatches(Dataset[Batch]):
    """Cached latents (n, S, L) with their labels (n, 3), of any integer dtype; items have int64.

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

    def __getitem__(self, item: NDArray[np.int64] | Draw) -> Batch:
        draw = item if isinstance(item, Draw) else Draw(item)
        index = torch.from_numpy(draw.positions)
        return {"latent": self.latents[index], "labels": self.labels[index].long()} | _of_all(draw)


def _of_all(draw: Draw) -> Batch:
    """Return the number of cells in all processes, where this one has a part of them."""
    return {} if draw.n_total in (None, len(draw)) else {"n_total": draw.n_total}


def _as_is(batch: Any) -> Any:
    return batch


class ResumableLoader(DataLoader[Batch]):
    """A loader that can start in the middle of an epoch; `done` counts the batches trained on in this epoch."""

    done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler, data = cast("EpochSampler", self.sampler), cast("CountBatches", self.dataset)
        if sampler.block == 1:
            yield from super().__iter__()
            return
        parts = super().__iter__() if self.num_workers else _ahead(map(data.fetch, sampler))
        for part in parts:
            for draw in part.draws:
                batch = data.cut(part, draw)
                yield {k: v.pin_memory() for k, v in batch.items()} if self.pin_memory else batch

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


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield items, each prepared by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


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
    rank, world = processes() if seed is not None else (0, 1)
    block = 1
    if seed is not None and isinstance(data, CountBatches):
        block = data.cells.block
        if data.cells.slow:
            warnings.warn(data.cells.slow, UserWarning, stacklevel=2)
    sampler = EpochSampler(
        len(data),  # type: ignore[arg-type]
        batch_size,
        seed,
        rank=rank,
        world=world,
        weights=getattr(data, "weights", None),
        even=even,
        block=block,
        group=-(-max(FETCH_CELLS, FETCH_BLOCKS * block) // (batch_size * world)),
    )
    return ResumableLoader(
        data,
        sampler=sampler,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=keyed_generator(seed or 0),
    )

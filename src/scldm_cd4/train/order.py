"""Which cells make up which batch, in one process or several."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from scldm_cd4._errors import DataError
from scldm_cd4.train.rng import key_seed

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """What one process takes of a batch.

    Attributes
    ----------
    positions
        Its cells, ascending.
    epoch
        The epoch; random draws for a cell are keyed by it and the position.
    n_total
        Cells of the batch in all processes; None where every process takes all.
    """

    positions: Positions
    epoch: int = 0
    n_total: int | None = None

    def __len__(self) -> int:
        return len(self.positions)


class EpochSampler(Sampler[Any]):
    """All positions in a new order each epoch, in batches of nearly equal size; without seed in order, in full batches.

    The order depends on the seed and the epoch alone. A batch has up to ``batch_size`` cells for each process, and the
    processes share the batches that one process with the batch ``world * batch_size`` would have: each takes a stretch
    of the ascending positions of every batch. No cell is left out or repeated (but see `even` and `weights`).

    With a `block`, neighbouring positions stay near to each other in the order, so that they can be read together:
    blocks are shuffled, then the cells of all blocks that make up `group` batches (block shuffling with a fetch factor,
    as in scDataset; D'Ascenzo and Cultrera di Montesano 2025, 2506.01883). Items are then lists of up to `group` draws.

    With weights, an epoch still has n items: each occurs as often as its share of the weights asks for, rounded up or
    down by chance (systematic resampling).

    Parameters
    ----------
    n
        Number of items.
    batch_size
        Largest batch of a process.
    seed
        Seed of the order; None keeps the items in place, the same in every process.
    rank, world
        This process and the number of processes.
    weights
        Positive weight of each item (n,); None for equal ones. Without seed they are not used.
    even
        Make all shuffled batches of one size: an epoch repeats a few items, fewer than it has batches and processes.
    block
        Neighbours that stay together; 1 for none.
    group
        Batches that are shuffled with each other, with a `block`.

    Raises
    ------
    DataError
        There are fewer items than processes.
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
        block: int = 1,
        group: int = 1,
    ) -> None:
        if n < world:
            raise DataError(f"{n} cells are too few for {world} processes")
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.even, self.block, self.group = even, block, group
        self.ends = None if weights is None else np.cumsum(weights) * (n / np.sum(weights))
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        per_process = -(-self.n // self.world)
        return min(-(-per_process // self.batch_size), max(1, self.n // self.world))

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        if self.seed is None:
            for first in range(start * self.batch_size, self.n, self.batch_size):
                positions = np.arange(first, min(self.n, first + self.batch_size))
                yield Draw(positions)
            return
        ends = self._ends()
        order = self._order(ends)
        draws = (self._share(order[a:b]) for a, b in zip(ends[start:-1], ends[start + 1 :], strict=True))
        if self.block == 1:
            yield from draws
            return
        for first in range(start, len(self), self.group):
            yield [next(draws) for _ in range(min(self.group, len(self) - first))]

    def _ends(self) -> Positions:
        """Return where the batches begin, and the end of the last."""
        n_batches = len(self)
        if self.even:
            size = -(-self.n // (n_batches * self.world)) * self.world
            return np.arange(n_batches + 1) * size
        sizes = np.full(n_batches, self.n // n_batches)
        sizes[: self.n % n_batches] += 1
        return np.concatenate([[0], np.cumsum(sizes)])

    def _order(self, ends: Positions) -> NDArray[np.integer]:
        assert self.seed is not None
        generator = np.random.default_rng(key_seed(self.seed, self.epoch))
        if self.block > 1:
            blocks = generator.permutation(-(-self.n // self.block)).astype(np.int32 if self.n < 2**31 else np.int64)
            order: Any = (blocks[:, None] * self.block + np.arange(self.block, dtype=blocks.dtype)).ravel()
            order = np.resize(order if self.n % self.block == 0 else order[order < self.n], ends[-1])
            for first in range(0, len(self), self.group):
                generator.shuffle(order[ends[first] : ends[min(first + self.group, len(self))]])
            return order
        order = np.arange(self.n, dtype=np.int32 if self.n < 2**31 else np.int64)
        if self.ends is not None:
            places = np.searchsorted(self.ends, order + generator.random(), side="right")
            order[:] = np.minimum(places, self.n - 1, out=places)  # the last end may lie below n by rounding
            del places
        generator.shuffle(order)
        return order if ends[-1] == self.n else np.resize(order, ends[-1])

    def _share(self, batch: NDArray[np.integer]) -> Draw:
        """Return this process's stretch: what it reads then lies together, over all batches of a group too."""
        n = len(batch)
        own = np.sort(batch)[n * self.rank // self.world : n * (self.rank + 1) // self.world]
        return Draw(own.astype(np.int64), self.epoch, n)


def cell_generators(seed: int, epoch: int, positions: Positions) -> Iterator[np.random.Generator]:
    """Yield a generator for each cell that depends on seed, epoch and position alone.

    A process then draws for its share of a batch what one process would have drawn for the whole. The generators are
    one, set to places of its sequence that lie 2^48 numbers apart: use each before the next.
    """
    bits = np.random.PCG64DXSM(seed)
    start, generator = bits.state, np.random.Generator(bits)
    for position in positions:
        bits.state = start
        bits.advance((epoch << 96) + (int(position) << 48))
        yield generator

"""Squared distances between the cells of many conditions, in blocks that fit the cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.genes import aligned
from scldm_cd4.metrics.cells.pseudobulk import as_matrix, dense

BLOCK = 1 << 15
"""Entries of a block of distances: 256 kB of float64, which stays in the cache."""
MIN_ROWS = 16
"""Rows of a block at least, however many columns: a product of fewer is slow."""
EQUAL = 1e-13
"""Squared distances below this share of the largest squared norms are rounding: the cells are equal."""


@dataclass(frozen=True)
class Block:
    """Squared distances of some rows of some conditions.

    Attributes
    ----------
    index
        Which conditions, (b,).
    rows, columns
        Which cells of each side.
    squares
        Squared Euclidean distances, (b, rows, columns); meaningless where a mask is False. May be overwritten.
    row_mask, column_mask
        Which entries are cells and not padding, (b, rows) and (b, columns).
    """

    index: np.ndarray
    rows: slice
    columns: slice
    squares: np.ndarray
    row_mask: np.ndarray
    column_mask: np.ndarray


def pair(real: Any, pred: Any) -> tuple[np.ndarray, np.ndarray]:
    """Take two populations as float64 arrays over the same features (see :func:`aligned`)."""
    a, b = (dense(matrix) for matrix in aligned(real, pred))
    return check_finite(a, "the first population"), check_finite(b, "the second population")


def check_finite(values: np.ndarray, what: str) -> np.ndarray:
    """Refuse values that are NaN or infinite."""
    if not np.isfinite(values).all():
        raise DataError(f"{what} has values that are not finite; remove or repair these cells first")
    return values


def check_blocks(blocks: Sequence[Any], what: str = "condition") -> list[np.ndarray]:
    """Take populations, one per condition, as float64 arrays over the same features.

    Raises
    ------
    DataError
        If a value is not finite, or two populations differ in their number of features.
    """
    arrays = [dense(as_matrix(block)) for block in blocks]
    for i, array in enumerate(arrays):
        check_finite(array, f"{what} {i}")
    widths = {array.shape[1] for array in arrays}
    if len(widths) > 1:
        raise DataError(f"the populations have {sorted(widths)} features; project all in the same way")
    return arrays


def subset(values: Any, max_cells: int | None, seed: int, side: int) -> Any:
    """Draw at most ``max_cells`` rows without replacement, in their order; all of them with None."""
    if max_cells is None or values.shape[0] <= max_cells:
        return values
    chosen = np.random.default_rng([seed, side]).choice(values.shape[0], max_cells, replace=False)
    return values[np.sort(chosen)]


def equal_sizes(a: Any, b: Any, seed: int) -> tuple[Any, Any]:
    """Draw cells of the larger side so that both have the same number."""
    n = min(a.shape[0], b.shape[0])
    return subset(a, n, seed, 0), subset(b, n, seed, 1)


def cross_blocks(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Iterator[Block]:
    """Give the squared distances of every cell of ``a[i]`` to every cell of ``b[i]``, for all i.

    Conditions of similar size share one product. Nothing larger than a block (or one row) is allocated.

    Parameters
    ----------
    a, b
        One array per condition, cells x features.

    Yields
    ------
    Blocks that together hold every pair once. Conditions without cells on a side do not occur.
    """
    sizes = np.array([[len(x), len(y)] for x, y in zip(a, b, strict=True)]).reshape(-1, 2)
    for index in _batches(sizes):
        left, left_mask = _stack([a[i] for i in index])
        right, right_mask = _stack([b[i] for i in index])
        centre = _centre(left, left_mask)
        left, right = _moved(left, left_mask, centre), _moved(right, right_mask, centre)
        yield from _products(index, left, left_mask, right, right_mask, triangle=False)


def within_blocks(a: Sequence[np.ndarray], *, triangle: bool) -> Iterator[Block]:
    """Give the squared distances between the cells of ``a[i]``, for all i.

    Parameters
    ----------
    a
        One array per condition, cells x features.
    triangle
        Give only the columns from the first row of the block on, as the rest is their mirror image.

    Yields
    ------
    Blocks; the distance of a cell to itself is exactly 0.
    """
    sizes = np.array([[len(x), len(x)] for x in a]).reshape(-1, 2)
    for index in _batches(sizes):
        cells, mask = _stack([a[i] for i in index])
        cells = _moved(cells, mask, _centre(cells, mask))
        for block in _products(index, cells, mask, cells, mask, triangle=triangle):
            n = block.squares.shape[1]
            offset = block.rows.start - block.columns.start
            block.squares[:, np.arange(n), offset + np.arange(n)] = 0.0
            yield block


def _batches(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Group conditions of similar size so that a batch of them fills one block, or a few."""
    order = np.lexsort((sizes[:, 1], sizes[:, 0]))
    pairs = sizes.prod(axis=1)
    order = order[pairs[order] > 0]
    start = 0
    while start < len(order):
        rows, columns = sizes[order[start]]
        filled, stop = pairs[order[start]], start + 1
        while stop < len(order):
            rows, columns = max(rows, sizes[order[stop], 0]), max(columns, sizes[order[stop], 1])
            filled += pairs[order[stop]]
            padded = rows * columns * (stop - start + 1)
            if padded > 8 * BLOCK or padded > 1.5 * filled:
                break
            stop += 1
        yield order[start:stop]
        start = stop


def _stack(cells: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad conditions with zeros to one array (b, n, d), and say which rows are cells."""
    sizes = np.array([len(x) for x in cells])
    out = np.zeros((len(cells), int(sizes.max()), cells[0].shape[1]))
    for target, x in zip(out, cells, strict=True):
        target[: len(x)] = x
    return out, np.arange(out.shape[1]) < sizes[:, None]


def _centre(cells: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean cell of every condition, (b, 1, d): near the origin the expansion of the square rounds least."""
    return np.asarray(cells.sum(axis=1) / mask.sum(axis=1)[:, None])[:, None]


def _moved(cells: np.ndarray, mask: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Subtract the centre from the cells, the padding staying zero."""
    return np.asarray((cells - centre) * mask[..., None])


def _products(
    index: np.ndarray,
    left: np.ndarray,
    left_mask: np.ndarray,
    right: np.ndarray,
    right_mask: np.ndarray,
    *,
    triangle: bool,
) -> Iterator[Block]:
    """Multiply (-2a, |a|^2, 1) by (b, 1, |b|^2), which is the squared distance in one product."""
    a_norm, b_norm = (np.einsum("bnd,bnd->bn", x, x)[..., None] for x in (left, right))
    a = np.concatenate([-2.0 * left, a_norm, np.ones_like(a_norm)], axis=2)
    b = np.concatenate([right, np.ones_like(b_norm), b_norm], axis=2).swapaxes(1, 2)
    tolerance = EQUAL * (a_norm.max() + b_norm.max())
    n, m = a.shape[1], b.shape[2]
    step = min(n, max(MIN_ROWS, BLOCK // (len(index) * m)))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        columns = slice(start if triangle else 0, m)
        squares = np.matmul(a[:, rows], b[:, :, columns])
        squares *= squares > tolerance
        yield Block(index, rows, columns, squares, left_mask[:, rows], right_mask[:, columns])

"""Count cells with a wanted mean profile, made of real cells."""

import numpy as np
import scipy.sparse as sp


def draw_rows(pool: np.ndarray, n: int, rng: np.random.Generator, *, repeat: bool) -> np.ndarray:
    """Draw n cells without replacement; where the pool is too small all of them, and with ``repeat`` some again."""
    if n <= len(pool) or not repeat:
        return np.asarray(rng.choice(pool, min(n, len(pool)), replace=False), dtype=np.int64)
    whole, rest = divmod(n, len(pool))
    return np.concatenate([*[pool] * whole, rng.choice(pool, rest, replace=False)]).astype(np.int64)


def emit_counts(counts: sp.csr_matrix, base: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    r"""Change real cells so that their mean profile becomes another one.

    Per gene with shares :math:`s` (of the cells) and :math:`t` (wanted): where :math:`t < s` every count is thinned,
    Binomial(x, t/s); where :math:`t > s`, Poisson(L (t - s)) is added, L the cell's total. Counts stay whole, zeros and
    dispersion stay those of real cells as far as the mean allows, and the expected total of a cell stays L.

    Parameters
    ----------
    counts
        Cells x genes.
    base, target
        Shares that add up to 1, (genes,).
    rng
        Source of randomness.

    Returns
    -------
    CSR float32 of the same shape.
    """
    cells = sp.csr_matrix(counts, copy=True)
    library = np.asarray(cells.sum(axis=1), dtype=np.float64).ravel()
    keep = np.divide(target, base, out=np.ones_like(base), where=base > 0).clip(0.0, 1.0)
    cells.data = rng.binomial(np.rint(cells.data).astype(np.int64), keep[cells.indices]).astype(np.float32)
    extra = np.maximum(target - base, 0.0)
    numbers = rng.poisson(library * extra.sum())
    total = int(numbers.sum())
    if total:
        cumulative = np.cumsum(extra)
        genes = np.searchsorted(cumulative, rng.random(total) * cumulative[-1], side="right").clip(max=len(extra) - 1)
        rows = np.repeat(np.arange(len(numbers)), numbers)
        cells = cells + sp.csr_matrix((np.ones(total, dtype=np.float32), (rows, genes)), shape=cells.shape)
    cells = sp.csr_matrix(cells, dtype=np.float32)
    cells.eliminate_zeros()
    cells.sort_indices()
    return cells

"""Wilcoxon rank-sum tests of many groups of cells against one control, without making sparse values dense."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import as_matrix

BLOCK = 2_000_000
"""Stored values that are ranked at a time; bounds the memory."""


@dataclass(frozen=True)
class RankTest:
    """Rank-sum statistics per gene: shift of U from its mean, its variance, and the number of cells.

    Attributes
    ----------
    shift
        U of the group minus n m / 2, (genes,) or (groups, genes).
    variance
        Variance of U with tie correction, of the same shape.
    n_cells
        Cells of group and control together: a number, or (groups, 1).

    Examples
    --------
    >>> metrics.ControlRanks(np.zeros((20, 1))).test(np.ones((10, 1))).shift.tolist()
    [100.0]
    """

    shift: np.ndarray
    variance: np.ndarray
    n_cells: Any


@dataclass(frozen=True)
class _Sorted:
    """The non-zero values of some genes in order of gene, value and group."""

    values: np.ndarray
    codes: np.ndarray
    genes: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


class ControlRanks:
    """Control cells sorted once per gene, so that many groups can be tested against them.

    Only non-zero values are sorted. The zeros of a gene are one block of ties.

    Parameters
    ----------
    control
        Normalised values of the control cells, cells x genes, dense or sparse.

    Attributes
    ----------
    values
        The control cells.
    n_cells
        Their number.
    n_genes
        The number of genes.

    Examples
    --------
    >>> sorted_controls = metrics.ControlRanks(np.random.default_rng(0).poisson(2.0, (30, 4)))
    """

    def __init__(self, control: Any) -> None:
        self.values = as_matrix(control)
        values = _columns(self.values)
        self.n_cells, self.n_genes = values.shape
        self._values, self._starts = values.data, values.indptr
        for start, stop in _segments(self._starts):
            self._values[start:stop].sort()
        gene = np.repeat(np.arange(self.n_genes), np.diff(self._starts))
        self._below = np.bincount(gene[self._values < 0], minlength=self.n_genes)
        self._zeros = self.n_cells - np.diff(self._starts)
        change = _changes(gene, self._values)
        sizes = np.diff(np.flatnonzero(change), append=change.size)
        self._ties = np.bincount(gene[change], weights=_cubic(sizes), minlength=self.n_genes) + _cubic(self._zeros)

    def test(self, group: Any) -> RankTest:
        """Compare one group with the control.

        Parameters
        ----------
        group
            Normalised values, cells x genes.

        Returns
        -------
        The statistics of every gene, (genes,).

        Raises
        ------
        DataError
            If the genes differ in number.
        """
        values = as_matrix(group)
        result = self.test_groups(values, np.zeros(values.shape[0], dtype=np.int64), 1)
        return RankTest(result.shift[0], result.variance[0], int(result.n_cells[0, 0]))

    def test_groups(self, values: Any, codes: np.ndarray, n_groups: int) -> RankTest:
        """Compare many groups with the control, all groups of a gene at once.

        Parameters
        ----------
        values
            Normalised values, cells x genes.
        codes
            Group of each cell, 0 to ``n_groups`` - 1; negative means in no group.
        n_groups
            Number of groups.

        Returns
        -------
        The statistics, (groups, genes). A group without cells has shift and variance 0.

        Raises
        ------
        DataError
            If the genes differ in number, or there is not one code per cell.
        """
        matrix, codes = as_matrix(values), np.asarray(codes)
        if matrix.shape[1] != self.n_genes:
            raise DataError(f"the group has {matrix.shape[1]} genes, the control {self.n_genes}")
        if codes.shape != (matrix.shape[0],):
            raise DataError(f"{codes.shape} group codes for {matrix.shape[0]} cells; give one code per cell")
        rows = np.argsort(codes, kind="stable")
        rows = rows[codes[rows] >= 0]
        columns, codes = _columns(matrix[rows]), codes[rows]
        sizes = np.bincount(codes, minlength=n_groups)[:, None]
        u, ties = np.empty((n_groups, self.n_genes)), np.empty((n_groups, self.n_genes))
        for first, last in _blocks(columns.indptr):
            u[:, first:last], ties[:, first:last] = self._statistics(columns, codes, sizes, first, last)
        m, total = self.n_cells, self.n_cells + sizes
        variance = sizes * m / 12 * ((total + 1) - ties / np.maximum(total * (total - 1.0), 1.0))
        return RankTest(u - sizes * m / 2, np.maximum(variance, 0.0), total)

    def _statistics(
        self, columns: sp.csc_matrix, codes: np.ndarray, sizes: np.ndarray, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """U of every group and the tie term of group and control together, (groups, genes ``first`` to ``last``)."""
        part, shape = self._merge(columns, codes, first, last), (len(sizes), last - first)
        key, size = part.codes * shape[1] + part.genes, shape[0] * shape[1]
        u = np.bincount(key, weights=(part.lower + part.upper) / 2, minlength=size).reshape(shape)
        zeros = sizes - np.bincount(key, minlength=size).reshape(shape)
        control_zeros = self._zeros[first:last]
        u += zeros * (self._below[first:last] + control_zeros / 2)
        change = _changes(part.genes, part.values, part.codes)
        runs = np.diff(np.flatnonzero(change), append=change.size)
        shared = (part.upper - part.lower)[change]
        extra = _cubic(shared + runs) - _cubic(shared)
        ties = np.bincount(key[change], weights=extra, minlength=size).reshape(shape)
        return u, ties + self._ties[first:last] + _cubic(control_zeros + zeros) - _cubic(control_zeros)

    def _merge(self, columns: sp.csc_matrix, codes: np.ndarray, first: int, last: int) -> _Sorted:
        """Sort the values of some genes and count the control cells below and up to each of them."""
        offset, stop = columns.indptr[first], columns.indptr[last]
        values, codes = columns.data[offset:stop].copy(), codes[columns.indices[offset:stop]]
        lower, upper = np.empty(len(values), dtype=np.int64), np.empty(len(values), dtype=np.int64)
        starts = columns.indptr[first : last + 1] - offset
        for gene, (start, end) in enumerate(_segments(starts), first):
            # cells come ordered by group, and the sort is stable: equal values stay ordered by group
            order = values[start:end].argsort(kind="stable")
            values[start:end], codes[start:end] = values[start:end][order], codes[start:end][order]
            control = self._values[self._starts[gene] : self._starts[gene + 1]]
            lower[start:end] = control.searchsorted(values[start:end], "left")
            upper[start:end] = control.searchsorted(values[start:end], "right")
        genes = np.repeat(np.arange(last - first), np.diff(starts))
        above = np.where(values > 0, self._zeros[first:last][genes], 0)
        return _Sorted(values, codes, genes, lower + above, upper + above)


def _columns(matrix: Any) -> sp.csc_matrix:
    """Give float64 columns of their own, without stored zeros, rows in order."""
    columns = sp.csc_matrix(matrix, dtype=np.float64, copy=True)
    columns.eliminate_zeros()
    columns.sort_indices()
    return columns


def _segments(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    return zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)


def _blocks(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut genes into ranges of about `BLOCK` stored values."""
    first, n_genes = 0, len(starts) - 1
    while first < n_genes:
        last = int(np.searchsorted(starts, starts[first] + BLOCK, "right")) - 1
        last = min(max(last, first + 1), n_genes)
        yield first, last
        first = last


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Mark where a run of rows that are equal in all columns begins."""
    change = np.zeros(len(columns[0]), dtype=bool)
    change[:1] = True
    for column in columns:
        change[1:] |= column[1:] != column[:-1]
    return change


def _cubic(sizes: np.ndarray) -> np.ndarray:
    values = sizes.astype(np.float64)
    return values**3 - values


def combine_tests(tests: list[RankTest]) -> tuple[np.ndarray, np.ndarray]:
    r"""Combine the rank tests of several contexts into one z and p per gene.

    van Elteren's stratified test: :math:`z = \sum_s w_s (U_s - \mu_s) / \sqrt{\sum_s w_s^2 V_s}` with :math:`w_s =
    1/(N_s + 1)`, so cells are ranked only against cells of their own context. One context gives the Wilcoxon rank-sum
    test with tie correction and continuity correction, equal to ``scipy.stats.mannwhitneyu(method="asymptotic")``;
    several contexts have no continuity correction. Source: van Elteren, Bull. Int. Stat. Inst. 1960.

    Parameters
    ----------
    tests
        One result per context, of one group or of many.

    Returns
    -------
    z and two-sided p, (genes,) or (groups, genes). A gene without any variation has z = 0 and p = 1.

    Examples
    --------
    >>> one = metrics.ControlRanks(np.zeros((20, 1)))
    >>> first, second = one.test(np.ones((10, 1))), one.test(np.ones((12, 1)))
    >>> z, p = metrics.combine_tests([first, second])
    >>> bool(p[0] < 0.001)
    True
    """
    from scipy.special import ndtr

    weights = [1.0 / (test.n_cells + 1) for test in tests]
    shift = np.asarray(sum(w * test.shift for w, test in zip(weights, tests, strict=True)))
    spread = np.sqrt(np.asarray(sum(w**2 * test.variance for w, test in zip(weights, tests, strict=True))))
    distance = np.abs(shift)
    if len(tests) == 1:
        distance = distance - 0.5 * weights[0]
    z = np.divide(distance, spread, out=np.zeros_like(spread), where=spread > 0)
    p = np.where(spread > 0, np.minimum(2.0 * ndtr(-z), 1.0), 1.0)
    return np.sign(shift) * np.maximum(z, 0.0), p


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjust p values by Benjamini & Hochberg (J. R. Stat. Soc. B 1995).

    Parameters
    ----------
    p
        P values, (genes,) or (conditions, genes); every row is adjusted by itself. NaN is a gene that was not tested.

    Returns
    -------
    Adjusted p values of the same shape, 0 to 1; NaN stays.

    Examples
    --------
    >>> metrics.benjamini_hochberg(np.array([0.01, 0.02, 0.5])).tolist()
    [0.03, 0.03, 0.5]
    """
    values = np.atleast_2d(np.asarray(p, dtype=np.float64))
    order = np.argsort(values, axis=1)  # NaN last
    n_tested = (~np.isnan(values)).sum(axis=1, keepdims=True)
    ordered = np.take_along_axis(values, order, axis=1) * n_tested / np.arange(1, values.shape[1] + 1)
    ordered = np.fmin.accumulate(ordered[:, ::-1], axis=1)[:, ::-1]
    adjusted = np.full_like(values, np.nan)
    np.put_along_axis(adjusted, order, np.minimum(ordered, 1.0), axis=1)
    adjusted[np.isnan(values)] = np.nan
    return adjusted.reshape(np.shape(p))

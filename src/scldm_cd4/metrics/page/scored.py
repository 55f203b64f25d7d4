"""What a report shows of the scored cells: shifts, recovery of genes, a plane, and quality; nothing is drawn here."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from scldm_cd4.metrics.cells.pseudobulk import Key
from scldm_cd4.metrics.cells.samples import Keys, Sample
from scldm_cd4.metrics.de.rank_tests import DETests
from scldm_cd4.metrics.de.recovery import de_table
from scldm_cd4.metrics.effects.rows import pearson_rows, shift
from scldm_cd4.metrics.scoring.setting import NotScored, read_scored
from scldm_cd4.metrics.scoring.truth import Truth, draw, halve

MAX_SHAPING = 1500
"""Reference cells that shape the plane at most."""
MAX_PLACED = 600
"""Cells of each kind that are placed in it at most."""


@dataclass(frozen=True)
class Shifts:
    """Mean shifts from the control of the context.

    Attributes
    ----------
    real, pred
        Means of log-normalised values less those of the real control, (K, genes).
    keep
        Genes that count: not the target of the condition, (K, genes).
    correlation
        Pearson correlation over the genes that count, (K,).
    size
        Euclidean length of the real shift over these genes, (K,).
    """

    real: np.ndarray
    pred: np.ndarray
    keep: np.ndarray
    correlation: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Recovery:
    """Rank tests of both sides at equal numbers of cells, and how far they agree.

    Attributes
    ----------
    real, pred
        Tests against the same real controls.
    table
        From :func:`scldm_cd4.metrics.de_table`.
    fdr
        Adjusted p below which a gene is significant.
    """

    real: DETests
    pred: DETests
    table: dict[str, np.ndarray]
    fdr: float


@dataclass(frozen=True)
class Places:
    """Cells in a plane that reference cells have shaped; the same number of each kind from every condition.

    Attributes
    ----------
    real, repeat, pred
        Coordinates of one part of the real cells, of another, and of predicted cells, (n, 2).
    codes
        Condition of the cells, the same for the three, (n,).
    n_shaping
        Reference cells.
    """

    real: np.ndarray
    repeat: np.ndarray
    pred: np.ndarray
    codes: np.ndarray
    n_shaping: int


@dataclass(frozen=True)
class Quality:
    """Figures of single cells and genes of one side.

    Attributes
    ----------
    library, genes
        Counts (NaN without counts) and genes with counts of each cell.
    zeros, mean, variance
        Share of zeros, mean and variance over cells of each gene, of counts (or of log-normalised values without).
    """

    library: np.ndarray
    genes: np.ndarray
    zeros: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, sample: Sample) -> "Quality":
        """Measure cells."""
        matrix = (sample.values if sample.counts is None else sample.counts).astype(np.float64)
        n = matrix.shape[0]
        mean = np.asarray(matrix.mean(axis=0)).ravel()
        square = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel()
        library = np.full(n, np.nan) if sample.counts is None else np.asarray(matrix.sum(axis=1)).ravel()
        expressed = np.asarray((matrix != 0).sum(axis=1)).ravel()
        zeros = 1.0 - np.asarray((matrix != 0).sum(axis=0)).ravel() / n
        return cls(library, expressed, zeros, mean, (square - mean**2) * n / max(n - 1, 1))


@dataclass(frozen=True)
class Scored:
    """The cells that :func:`scldm_cd4.metrics.evaluate` scores, with their parts settled as there.

    Attributes
    ----------
    keys
        Columns and control.
    truth
        Real cells, their controls and what is fitted on others.
    pred
        Predicted cells of the scored conditions.
    fitted
        Reference cells that components are fitted on.
    fitted_on
        The same in words.
    not_scored
        Numbers of real and predicted cells of the other conditions, with the reason.
    """

    keys: Keys
    truth: Truth
    pred: Sample
    fitted: Sample
    fitted_on: str
    not_scored: NotScored

    @classmethod
    def read(cls, sides: Mapping[str, Any], keys: Keys, **settings: Any) -> "Scored":
        """Read the cells; see :func:`scldm_cd4.metrics.scoring.setting.read_scored`."""
        truth, pred, setting, not_scored = read_scored(sides, keys, **settings)
        return cls(keys, truth, pred, setting.fitted, setting.fitted_on, not_scored)

    @property
    def conditions(self) -> tuple[Key, ...]:
        """Labels of the scored conditions."""
        return self.truth.keys

    @cached_property
    def shifts(self) -> Shifts:
        """Mean shifts of both sides."""
        truth, pred = self.truth, self.pred.pseudobulks(counts=False)
        control = truth.controls.bulks.means[truth.controls.rows(truth.keys)]
        real = shift(truth.bulks.means[: len(truth.keys)], control)
        guess, keep = shift(pred.means[pred.rows(truth.keys)], control), ~truth.exclude
        return Shifts(real, guess, keep, pearson_rows(real, guess, keep), np.sqrt((real**2 * keep).sum(axis=1)))

    @cached_property
    def recovery(self) -> Recovery:
        """Rank tests, with the draws that the table is made with."""
        truth, options = self.truth, self.truth.options
        n = np.minimum(truth.real.sizes(), self.pred.sizes())
        real = truth.test(draw(truth.real, n, options.seed, 0), truth.controls)
        pred = truth.test(draw(self.pred, n, options.seed, 1), truth.controls)
        return Recovery(real, pred, de_table(real, pred, fdr=options.fdr), options.fdr)

    @cached_property
    def quality(self) -> tuple[Quality, Quality]:
        """Figures of real and of predicted cells, as many of one as of the other from every condition."""
        n = np.minimum(self.truth.real.sizes(), self.pred.sizes())
        seed = self.truth.options.seed
        return Quality.of(draw(self.truth.real, n, seed, 4)), Quality.of(draw(self.pred, n, seed, 5))

    def place(self) -> Places:
        """Place two parts of the real cells and predicted ones in a UMAP of reference cells.

        Raises
        ------
        DataError
            If there are too few reference cells for a UMAP.
        """
        from scldm_cd4 import pl

        seed, project = self.truth.options.seed, self.truth.reference.projection.apply
        first, second = halve(self.truth.real, [seed, 6])
        n = np.minimum(second.sizes(), self.pred.sizes())
        if n.sum() > MAX_PLACED:
            n = np.maximum(n * MAX_PLACED // n.sum(), np.minimum(n, 1))
        sides = [draw(side, n, seed, 7 + i) for i, side in enumerate((first, second, self.pred))]
        rows = [np.argsort(side.codes, kind="stable") for side in sides]
        share = min(1.0, MAX_SHAPING / self.fitted.n_cells)
        basis = draw(self.fitted, np.ceil(self.fitted.sizes() * share).astype(np.int64), seed, 10)
        cells = [project(side.values)[order] for side, order in zip(sides, rows, strict=True)]
        (placed,) = pl.embed_like(project(basis.values), np.concatenate(cells), seed=seed)
        own, repeat, pred = np.split(placed, 3)
        return Places(own, repeat, pred, np.repeat(np.arange(len(n)), n), basis.n_cells)

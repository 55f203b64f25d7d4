"""Cells read for scoring: genes matched by name, conditions as keys, counts checked, values log-normalised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.data.labels import as_label, get_column, read_labels
from scldm_cd4.data.matrix import counts_hint, is_bad
from scldm_cd4.metrics.cells.genes import common_genes, gene_names
from scldm_cd4.metrics.cells.places import layers_of
from scldm_cd4.metrics.cells.pseudobulk import (
    TARGET_SUM,
    Key,
    Pseudobulks,
    as_matrix,
    condition_codes,
    log_normalize,
    present_conditions,
    pseudobulks,
)

InputType = Literal["counts", "lognorm"]


@dataclass(frozen=True)
class Keys:
    """The columns that say what a cell is.

    Attributes
    ----------
    perturbation
        Column of the perturbation.
    context
        Columns whose combination is the context; may be empty.
    control
        Label of the control.
    """

    perturbation: str
    context: tuple[str, ...]
    control: str

    @classmethod
    def resolve(
        cls,
        pred: Any,
        perturbation_key: str | None = None,
        context_keys: str | Sequence[str] | None = None,
        control: str | None = None,
    ) -> "Keys":
        """Take the keys given, else those that generated cells carry in ``uns["scldm_cd4"]``.

        Raises
        ------
        DataError
            If a key is neither given nor carried.
        """
        carried = dict(getattr(pred, "uns", {}).get("scldm_cd4", {}))
        perturbation = perturbation_key or carried.get("perturbation_key")
        label = carried.get("control") if control is None else control
        for name, value in (("perturbation_key", perturbation), ("control", label)):
            if value is None:
                raise DataError(f"{name} is not known: the cells carry no uns['scldm_cd4']; pass {name}=")
        if context_keys is None:
            if not carried:
                raise DataError("context_keys is not known: pass the columns of the context, or [] where there is none")
            context_keys = [str(carried[k]) for k in ("donor_key", "timepoint_key") if carried.get(k) is not None]
        context = (context_keys,) if isinstance(context_keys, str) else tuple(str(key) for key in context_keys)
        if perturbation in context or len(set(context)) < len(context):
            raise DataError(f"context_keys {list(context)} must be different columns other than {perturbation!r}")
        return cls(str(perturbation), context, as_label(label))


@dataclass(frozen=True)
class Sample:
    """Cells of many conditions.

    Attributes
    ----------
    counts
        CSR counts, cells x genes; None where log-normalised values were given.
    values
        CSR float64 log-normalised values, cells x genes.
    codes
        Condition of every cell, a position in ``keys``.
    keys
        Labels of every condition, context first and perturbation last.
    genes
        Names, (genes,).
    """

    counts: sp.csr_matrix | None
    values: sp.csr_matrix
    codes: np.ndarray
    keys: tuple[Key, ...]
    genes: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.codes)

    @cached_property
    def groups(self) -> dict[Key, np.ndarray]:
        """Positions of the cells of every condition that has any."""
        order = np.argsort(self.codes, kind="stable")
        sizes = np.bincount(self.codes, minlength=len(self.keys))
        parts = np.split(order, np.cumsum(sizes)[:-1])
        return {key: rows for key, rows in zip(self.keys, parts, strict=True) if len(rows)}

    def rows(self, key: Key) -> np.ndarray:
        """Positions of the cells of a condition; empty where it has none."""
        return self.groups.get(key, np.empty(0, dtype=np.int64))

    def take(self, rows: np.ndarray) -> "Sample":
        """Give some of the cells, in the order asked."""
        counts = None if self.counts is None else self.counts[rows]
        return Sample(counts, self.values[rows], self.codes[rows], self.keys, self.genes)

    def select(self, keys: Sequence[Key]) -> "Sample":
        """Give the cells of some conditions; codes are positions in these ``keys``, also of those without cells."""
        if tuple(keys) == self.keys:
            return self
        parts = [self.rows(key) for key in keys]
        rows = np.concatenate([*parts, np.empty(0, dtype=np.int64)])
        counts = None if self.counts is None else self.counts[rows]
        codes = np.repeat(np.arange(len(keys)), [len(part) for part in parts])
        return Sample(counts, self.values[rows], codes, tuple(keys), self.genes)

    def sizes(self) -> np.ndarray:
        """Cells of every condition, (conditions,)."""
        return np.bincount(self.codes, minlength=len(self.keys))

    def pseudobulks(self, *, counts: bool = True) -> Pseudobulks:
        """Moments of every condition that has cells; without those of summed counts where they are not wanted."""
        codes, keys = present_conditions(self.codes, self.keys)
        return pseudobulks(self.values, codes, keys, counts=self.counts if counts else None)


def join(samples: Sequence[Sample]) -> Sample:
    """Put cells of the same genes together."""
    keys = tuple(dict.fromkeys(key for sample in samples for key in sample.keys))
    position = {key: code for code, key in enumerate(keys)}
    lookups = [np.array([position[key] for key in sample.keys], dtype=np.int64) for sample in samples]
    codes = np.concatenate([lookup[sample.codes] for lookup, sample in zip(lookups, samples, strict=True)])
    counts = None
    if all(sample.counts is not None for sample in samples):
        counts = sp.vstack([sample.counts for sample in samples], format="csr")
    values = sp.vstack([sample.values for sample in samples], format="csr")
    return Sample(counts, values, codes, keys, samples[0].genes)


def read_samples(
    cells: Mapping[str, Any],
    keys: Keys,
    genes: Any = None,
    *,
    layer: str | None = None,
    input_type: InputType | None = None,
    size_factor_key: str | None = None,
) -> dict[str, Sample]:
    """Read cells that are compared with one another: the same genes, each from where it keeps its counts.

    Parameters
    ----------
    cells
        AnnData by what they are called in messages; the first sets the order of the genes.
    keys
        Columns of ``obs``.
    genes
        As in :func:`scldm_cd4.metrics.cells.genes.common_genes`.
    layer
        As in :func:`scldm_cd4.metrics.cells.places.layers_of`.
    input_type
        ``counts`` or ``lognorm``; None is ``counts`` of a caller that gives no choice, so that messages name none.
    size_factor_key
        As in :func:`read_sample`.

    Returns
    -------
    The cells by name.

    Raises
    ------
    DataError
        As of these three.
    GeneMismatchError
        If the genes differ.
    """
    chosen = common_genes(cells, genes)
    reading: dict[str, Any] = {"input_type": input_type, "size_factor_key": size_factor_key}
    places = layers_of(cells, layer, counts=input_type != "lognorm")
    return {
        what: read_sample(adata, keys, chosen, what, layer=places[what], **reading) for what, adata in cells.items()
    }


def read_sample(
    adata: Any,
    keys: Keys,
    genes: np.ndarray,
    what: str,
    *,
    layer: str | None = None,
    input_type: InputType | None = None,
    size_factor_key: str | None = None,
) -> Sample:
    """Read cells; see :func:`read_samples` for several.

    Parameters
    ----------
    adata
        Cells x genes.
    keys
        Columns of ``obs``.
    genes
        Names of the genes to read, in this order.
    what
        Name of the cells in messages.
    layer
        Layer to use instead of ``X``.
    input_type
        ``counts`` (checked exactly) or ``lognorm``; None is ``counts`` of a caller that gives no choice.
    size_factor_key
        Column with the totals to divide by instead of the cells' own totals on the panel.

    Returns
    -------
    The cells.

    Raises
    ------
    DataError
        If there are no cells, the values are not of the declared type, or a column is missing.
    """
    if adata.n_obs == 0:
        raise DataError(f"{what}: there are no cells")
    if getattr(adata, "isbacked", False):
        adata = adata.to_memory()
    labels, levels = read_labels(adata.obs, keys.perturbation, "perturbation_key")
    context = [read_labels(adata.obs, key, "context_keys") for key in keys.context]
    columns = [np.array(names, dtype=object)[codes] for codes, names in [*context, (labels, levels)]]
    codes, conditions = condition_codes(columns)
    position = {name: i for i, name in enumerate(gene_names(adata, what))}
    order = np.array([position[name] for name in genes], dtype=np.int64)
    matrix = as_matrix(adata, layer)
    is_same = len(order) == matrix.shape[1] and (order == np.arange(len(order))).all()
    matrix = sp.csr_matrix(matrix if is_same else matrix[:, order])
    if input_type == "lognorm":
        _check_lognorm(matrix, what)
        return Sample(None, sp.csr_matrix(matrix, dtype=np.float64), codes, conditions, genes)
    if input_type not in (None, "counts"):
        raise DataError(f"input_type={input_type!r} is not known; use 'counts' or 'lognorm'")
    if matrix.nnz and (wrong := is_bad(matrix.data)).any():
        hint = counts_hint(adata, layer)
        if input_type is not None:
            hint += " metrics.evaluate takes log-normalised values on all sides with input_type='lognorm'"
        raise DataError(
            f"{what}: {int(wrong.sum())} values are no counts (whole, finite, not negative), e.g. "
            f"{matrix.data[wrong][0]:g}.{hint}"
        )
    totals = _totals(adata, size_factor_key, what)
    values = log_normalize(matrix) if totals is None else _by_totals(matrix, totals)
    return Sample(matrix, values, codes, conditions, genes)


def _totals(adata: Any, key: str | None, what: str) -> np.ndarray | None:
    if key is None:
        return None
    totals = np.asarray(get_column(adata.obs, key, "size_factor_key"), dtype=np.float64)
    if not (np.isfinite(totals).all() and (totals > 0).all()):
        raise DataError(f"{what}: obs[{key!r}] must hold totals above 0 for every cell")
    return totals


def _by_totals(matrix: sp.csr_matrix, totals: np.ndarray) -> sp.csr_matrix:
    values = sp.csr_matrix(matrix, dtype=np.float64, copy=True)
    values.data = np.log1p(values.data * np.repeat(TARGET_SUM / totals, np.diff(values.indptr)))
    return values


def _check_lognorm(matrix: sp.csr_matrix, what: str) -> None:
    data = matrix.data
    if not np.isfinite(data).all() or (data.size and data.min() < 0):
        raise DataError(f"{what}: log-normalised values must be finite and not negative")
    if data.size and (data == np.round(data)).all():
        raise DataError(
            f"{what}: input_type='lognorm', but all values are whole numbers, so they look like counts; all sides must "
            "hold the same kind of values"
        )

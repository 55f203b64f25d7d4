"""What is wanted of a perturbation, read into the genes of the model."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scldm_cd4._errors import DataError
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.labels import get_column
from scldm_cd4.noise import stream
from scldm_cd4.ranking.population import Embed, Population
from scldm_cd4.ranking.scores import SCORES
from scldm_cd4.registry import Registry, suggestion
from scldm_cd4.sampling import lognormal

MIN_GENES, MIN_SET, MIN_SHARE, GOOD_SHARE = 10, 3, 0.1, 0.5
MAX_TARGET = 1000
"""Cells of a target population that are compared with: of more, a random part."""
MIN_CELLS = 20
METHODS: dict[str, tuple[str, ...]] = {
    "gene_set": ("ulm", "mean_diff", "auc", "wtcs"),
    "signature": ("cosine", "projection", "spearman", "wtcs"),
    "direction": ("projection", "cosine"),
    "population": ("edistance", "mmd"),
}
"""Scores of each kind of target, the default first."""
KINDS = (
    "a list of genes or {'up': [...], 'down': [...]}; a Series of weights by gene; cells, as AnnData, a mask or a "
    "query of obs; (obs column, from, to); or {name: (target, weight)} of these"
)
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Profile:
    """A wanted change of expression."""

    kind: str
    """``gene_set``, ``signature`` or ``direction``."""
    method: str
    """One of `scldm_cd4.ranking.scores.SCORES`."""
    weights: Array
    """Per gene of the model; 0 where the target wants nothing."""
    known: Mask
    """Genes that take part in the score."""
    share_found: float = 1.0
    """Share of the target's genes that the model has."""

    def score(self, delta: Array, spread: Array, keep: Mask, weights: Array | None = None) -> Array:
        """Score effects.

        Parameters
        ----------
        delta
            Effects (k, genes).
        spread
            Standard deviation over control cells (genes,); genes without any take no part.
        keep
            Genes that may take part (genes,).
        weights
            In place of the target's own (m, genes).

        Returns
        -------
        (k, m).
        """
        genes = self.known & keep & (spread > 0)
        wanted = self.weights[None] if weights is None else weights
        return SCORES[self.method](delta[:, genes], wanted[:, genes], spread[genes])

    def genes_used(self, spread: Array, keep: Mask) -> Mask:
        """Return the genes that have a weight and take part."""
        return self.known & keep & (spread > 0) & (self.weights != 0)


@dataclass(frozen=True)
class Part:
    """A target, alone or in a weighted sum."""

    name: str
    weight: float
    target: Profile | Population


@dataclass(frozen=True)
class Reader:
    """Reads targets; `adata` are the cells of the model, `embed` gives their coordinates."""

    registry: Registry
    adata: Any = None
    embed: Embed | None = None
    seed: int = 0

    def read(self, target: Any, method: Any = None) -> tuple[Part, ...]:
        """Return the parts of a target; a target that is no sum has one.

        Parameters
        ----------
        target
            Of any kind.
        method
            Score; None takes the default of the kind. For a sum, a dict by name.

        Raises
        ------
        DataError
            The target is of another kind, or cannot be used with this model.
        """
        if not isinstance(target, Mapping) or set(target) <= {"up", "down"}:
            return (Part("target", 1.0, self.read_one(target, method)),)
        methods = {} if method is None else method
        if not isinstance(methods, Mapping) or set(methods) - set(target):
            raise DataError(f"method= of a weighted sum is a dict by the names {list(target)}, got {method!r}")
        parts = []
        for name, value in target.items():
            if not (isinstance(value, tuple | list) and len(value) == 2 and _is_number(value[1])):
                raise DataError(f"the target {name!r} of a weighted sum needs (target, weight), got {value!r:.80}")
            parts.append(Part(str(name), float(value[1]), self.read_one(value[0], methods.get(name))))
        if len(parts) < 1 or any(not np.isfinite(part.weight) or part.weight == 0 for part in parts):
            raise DataError("the weights of a sum of targets must be finite and not 0")
        return tuple(parts)

    def read_one(self, target: Any, method: str | None = None) -> Profile | Population:
        """Return a target that is no sum."""
        if isinstance(target, pd.Series) and not pd.api.types.is_bool_dtype(target):
            return self._signature(target, _method("signature", method))
        if isinstance(target, Mapping):
            return self._gene_set(target.get("up", ()), target.get("down", ()), _method("gene_set", method))
        if isinstance(target, tuple) and len(target) == 3 and all(isinstance(x, str) for x in target):
            return self._direction(*target, method=_method("direction", method))
        if _is_population(target):
            return self._population(target, _method("population", method))
        if isinstance(target, list | set | frozenset | tuple | np.ndarray | pd.Index):
            return self._gene_set(target, (), _method("gene_set", method))
        raise DataError(f"target must be {KINDS}; got {type(target).__name__}")

    def _gene_set(self, up: Any, down: Any, method: str) -> Profile:
        sides = [_gene_list(genes, side) for genes, side in ((up, "up"), (down, "down"))]
        if both := set(sides[0]) & set(sides[1]):
            raise DataError(f"{len(both)} genes are wanted both up and down, such as {min(both)!r}")
        lookup = dict.fromkeys(sides[0], 1.0) | dict.fromkeys(sides[1], -1.0)
        known, weights, share = self._match(lookup, "gene set", MIN_SET)
        if known.all():
            raise DataError("the gene set has all genes of the model, so that none are left to compare with")
        return Profile("gene_set", method, weights, np.ones(len(weights), dtype=bool), share)

    def _signature(self, target: pd.Series, method: str) -> Profile:
        names = target.index.astype(str)
        if names.has_duplicates:
            raise DataError(f"the signature has genes twice, such as {names[names.duplicated()][0]!r}")
        values = pd.to_numeric(target, errors="coerce").to_numpy(dtype=np.float64)
        if not np.isfinite(values).all():
            n = int((~np.isfinite(values)).sum())
            raise DataError(f"the signature has {n} missing or infinite weights; drop them")
        known, weights, share = self._match(dict(zip(names, values, strict=True)), "signature", MIN_GENES)
        if np.ptp(weights[known]) == 0:
            raise DataError("the signature is constant on the model's genes, so it has no direction")
        return Profile("signature", method, weights, known, share)

    def _match(self, lookup: dict[str, float], what: str, least: int) -> tuple[Mask, Array, float]:
        """Return which genes of the model are named, their weights, and the share of the names that was found."""
        columns = {"identifiers": self.registry.genes, **self.registry.var}
        found = {name: len(lookup.keys() & set(column)) for name, column in columns.items()}
        column = columns[max(found, key=lambda name: found[name])]
        known = np.array([name in lookup for name in column])
        weights = np.array([lookup.get(name, 0.0) for name in column])
        n = len(lookup.keys() & set(column))
        share = n / max(len(lookup), 1)
        if n < least or share < MIN_SHARE:
            unknown = next((name for name in lookup if name not in set(column)), None)
            held = "; ".join(f"{name} like {next((x for x in c if x), '')!r}" for name, c in columns.items())
            names = f" It does not know {unknown!r}; it has {held}{_hint(lookup, columns)}" if unknown else ""
            raise DataError(
                f"the model has {n} of the {len(lookup)} genes of the {what}; at least {least} and {MIN_SHARE:.0%} are "
                f"needed.{names}"
            )
        if share < GOOD_SHARE:
            warnings.warn(f"the model has only {share:.0%} of the {what}'s genes", UserWarning, stacklevel=7)
        return known, weights, share

    def _direction(self, key: str, start: str, end: str, method: str) -> Profile:
        if self.adata is None:
            raise DataError("a direction between two groups needs cells: load the model with adata=")
        labels = get_column(self.adata.obs, key, "target").astype(str).to_numpy()
        for name in (start, end):
            if (n := int((labels == name).sum())) < MIN_CELLS:
                hint = suggestion(name, sorted(set(labels)), f"labels of obs[{key!r}] are")
                raise DataError(f"{n} cells have {name!r} in obs[{key!r}], at least {MIN_CELLS} are needed.{hint}")
        cells = CellData.from_adata(self.adata, self.registry, labels=False)
        strata = self._strata(key, labels, start, end)
        ends = [[_mean(cells, np.flatnonzero(s & (labels == name))) for name in (start, end)] for s in strata]
        weights = np.mean([b - a for a, b in ends], axis=0)
        if not weights.any():
            raise DataError(f"{start!r} and {end!r} of obs[{key!r}] have equal means, so there is no direction")
        return Profile("direction", method, weights, np.ones(self.registry.n_genes, dtype=bool))

    def _strata(self, key: str, labels: NDArray[np.object_], start: str, end: str) -> list[Mask]:
        """Return the cells of each donor that has both groups; all together where none has."""
        column = self.registry.donor.column
        if column is None or column == key:
            return [np.ones(len(labels), dtype=bool)]
        donors = get_column(self.adata.obs, column, "donor_key").astype(str).to_numpy()
        strata = [donors == donor for donor in sorted(set(donors))]
        both = [s for s in strata if all(int((labels[s] == name).sum()) >= MIN_CELLS for name in (start, end))]
        if both:
            return both
        warnings.warn(
            f"no donor has {MIN_CELLS} cells of both {start!r} and {end!r}: the direction mixes groups and donors",
            UserWarning,
            stacklevel=7,
        )
        return [np.ones(len(labels), dtype=bool)]

    def _population(self, target: Any, method: str) -> Population:
        assert self.embed is not None
        if hasattr(target, "obs"):
            cells = CellData.from_adata(target, self.registry, labels=False)
            rows = np.arange(cells.n_cells)
        else:
            if self.adata is None:
                raise DataError("a mask or a query chooses among the model's cells: load the model with adata=")
            rows = _chosen(self.adata.obs, target)
            cells = CellData.from_adata(self.adata, self.registry, labels=False)
        if len(rows) < MIN_CELLS:
            raise DataError(f"the target population has {len(rows)} cells; at least {MIN_CELLS} are needed")
        if len(rows) > MAX_TARGET:
            rng = stream(self.seed, ("target",), 0, "target population")
            rows = rows[np.sort(rng.choice(len(rows), MAX_TARGET, replace=False))]
        return Population.of(cells.counts(rows), self.embed, method)


def _method(kind: str, method: Any) -> str:
    if method is None:
        return METHODS[kind][0]
    if method not in METHODS[kind]:
        raise DataError(f"a target of kind {kind!r} is scored by one of {METHODS[kind]}, not by {method!r}")
    return str(method)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _is_population(target: Any) -> bool:
    if isinstance(target, str) or hasattr(target, "obs"):
        return True
    dtype = getattr(target, "dtype", None)
    return dtype is not None and pd.api.types.is_bool_dtype(dtype)


def _chosen(obs: pd.DataFrame, target: Any) -> NDArray[np.int64]:
    """Return the rows of a mask or query."""
    if isinstance(target, str):
        try:
            mask = obs.eval(target, engine="python")
        except Exception as error:
            raise DataError(f"the query {target!r} of obs fails ({error}). A target is {KINDS}") from error
        if np.shape(mask) != (len(obs),) or not pd.api.types.is_bool_dtype(mask):
            raise DataError(
                f"the query {target!r} of obs does not choose cells; give a condition such as 'column == 1'"
            )
        return np.flatnonzero(np.asarray(mask, dtype=bool))
    if isinstance(target, pd.Series) and not target.index.equals(obs.index):
        raise DataError("the mask has another index than the cells of the model (obs_names)")
    mask = np.asarray(target, dtype=bool)
    if mask.shape != (len(obs),):
        raise DataError(f"the mask has shape {mask.shape}, but the model has {len(obs)} cells")
    return np.flatnonzero(mask)


def _gene_list(genes: Any, side: str) -> list[str]:
    if isinstance(genes, str):
        raise DataError(f"the genes wanted {side} must be a list, got the single name {genes!r}")
    names = [str(gene) for gene in genes]
    if len(set(names)) < len(names):
        twice = pd.Index(names)
        raise DataError(f"the gene set has genes twice, such as {twice[twice.duplicated()][0]!r}")
    return names


def _hint(lookup: Mapping[str, float], columns: Mapping[str, Any]) -> str:
    """Return what would help where names differ in version suffix or letter case only."""
    known = {name for column in columns.values() for name in column}
    n = len(known & set(lookup))
    if len(known & {name.split(".")[0] for name in lookup}) > n:
        return ". Without the version suffix (.1, .2) more names would fit: remove it"
    if len({name.upper() for name in known} & {name.upper() for name in lookup}) > n:
        return ". Names differ in letter case: spell them as the model does"
    return ""


def _mean(cells: CellData, rows: NDArray[np.int64]) -> Array:
    """Return the mean log-normalised expression (genes,) of some cells."""
    total = np.zeros(cells.n_genes)
    for part in np.array_split(rows, max(1, len(rows) // 1000)):
        total += np.asarray(lognormal(cells.counts(part)).sum(axis=0), dtype=np.float64).ravel()
    return total / len(rows)

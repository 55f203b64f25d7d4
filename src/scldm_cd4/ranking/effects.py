"""Effects of perturbations against the control of the same context, from generated or observed cells.

The effect is the difference of the pseudobulk log1p(counts per 10,000). Cells are summed up in folds, one condition
(perturbation x context) at a time: an effect comes as its estimate and the estimates without each fold (the
delete-a-group jackknife).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scldm_cd4._errors import DataError
from scldm_cd4._passes import chunks
from scldm_cd4.conditions import Request
from scldm_cd4.data.cells import CellData
from scldm_cd4.noise import stream
from scldm_cd4.ranking.population import PairSums, Population, fold_members
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import Sampler, draw, lognormal, resolve_library

FOLDS = 20
"""Parts into which the cells of a condition are cut."""
MIN_OBSERVED = 10
"""Observed cells that a condition needs."""
PART = 1000
"""Cells that are normalised at a time."""
TARGET_SUM = 1e4
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Context = tuple[str, str]


@dataclass(frozen=True)
class Arm:
    """The cells of one condition, summed up in folds.

    Examples
    --------
    >>> ranking.Arm(sums=np.ones((4, 60)), n_cells=20).sums.shape
    (4, 60)
    """

    sums: Array
    """Counts (folds, genes)."""
    n_cells: int
    """In all folds."""
    pairs: tuple[PairSums, ...] = ()
    """Sums for the distance to each target population; none where the target is no population."""


@dataclass(frozen=True)
class Control:
    """The control cells of one context: twice as many folds, the first half paired with the perturbations.

    Examples
    --------
    >>> arm = ranking.Arm(sums=np.ones((4, 60)), n_cells=20)
    >>> ranking.Control(arm, mean=np.zeros(60), variance=np.ones(60)).arm.n_cells
    20
    """

    arm: Arm
    """The cells, in folds."""
    mean: Array
    """Of log1p(counts per 10,000) over the cells (genes,)."""
    variance: Array
    """Likewise."""
    counts: Any = None
    """Of generated cells (n, genes), kept where there are target populations."""


@dataclass(frozen=True)
class Change:
    """An effect in one context, or its mean over contexts; the first row is the estimate, the rest leave folds out.

    Examples
    --------
    >>> rows = np.zeros((5, 60))  # the estimate, and 4 that leave out a fold each
    >>> ranking.Change(rows, distances=np.zeros((5, 0, 2)), noise=0.1, n_cells=20).delta.shape
    (5, 60)
    """

    delta: Array
    """Difference of log1p(counts per 10,000) (rows, genes)."""
    distances: Array
    """Distances of perturbed and control cells to the target populations (rows, populations, 2)."""
    noise: float
    """What the sampling variance grows with, 1 / perturbed cells + 1 / control cells."""
    n_cells: int
    """Perturbed cells."""


class EffectSource(Protocol):
    """Where effects come from. `scldm_cd4.CD4Model.rank_perturbations` takes one as ``effects=``.

    Examples
    --------
    >>> class Mine:
    ...     name = "mine"
    ...     def controls(self, contexts, n_cells): ...
    ...     def changes(self, names, controls, n_cells): ...
    >>> hasattr(Mine(), "controls") and hasattr(Mine(), "changes")
    True
    """

    @property
    def name(self) -> str:
        """What the effects are, for the table."""
        ...

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        """Return the control of each context; one without control cells is left out."""
        ...

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        """Yield the effects of each perturbation, in order, by context; one without cells is left out."""
        ...


def target_genes(registry: Registry, name: str) -> Mask:
    """Return which genes carry the name of a perturbation, as identifier or in a string column of ``var``."""
    columns = [registry.genes, *registry.var.values()]
    return np.any([np.array(column, dtype=object) == name for column in columns], axis=0)


def n_folds(n_cells: int) -> int:
    """Return the folds of so many cells."""
    return min(FOLDS, n_cells)


def leave_one_out(folds: int) -> Array:
    """Return rows (folds + 1, folds): all, then all but one."""
    return np.vstack([np.ones(folds), 1.0 - np.eye(folds)])


def fold_sums(counts: Any, folds: int) -> Array:
    """Return the summed counts (folds, genes) of consecutive, equally large parts of the cells."""
    return np.asarray((fold_members(counts.shape[0], folds) @ counts).toarray(), dtype=np.float64)


def profile(sums: Array) -> Array:
    """Return log1p(counts per 10,000) of summed counts (k, genes)."""
    return np.log1p(TARGET_SUM * sums / np.maximum(sums.sum(axis=1, keepdims=True), 1.0))


@dataclass(frozen=True)
class Side:
    """Chosen folds of an arm."""

    profiles: Array
    """log1p(counts per 10,000) of their summed counts (rows, genes)."""
    distances: Array
    """To the target populations (rows, populations)."""
    n_cells: int
    """Of the first row."""

    @classmethod
    def of(cls, rows: Array, arm: Arm) -> "Side":
        """Take folds of an arm, rows (k, folds) of 0 and 1."""
        distances = np.zeros((len(rows), len(arm.pairs)))
        for i, pairs in enumerate(arm.pairs):
            distances[:, i] = pairs.distance(rows)
        return cls(profile(rows @ arm.sums), distances, max(1, round(arm.n_cells * float(rows[0].mean()))))


def contrast(perturbed: Side, control: Side) -> Change:
    """Return the change between two arms."""
    distances = np.stack([perturbed.distances, control.distances], axis=2)
    noise = 1 / perturbed.n_cells + 1 / control.n_cells
    return Change(perturbed.profiles - control.profiles, distances, noise, perturbed.n_cells)


def mean_change(changes: Sequence[Change]) -> Change:
    """Average over contexts, with equal weight."""
    n = len(changes)
    return Change(
        np.mean([c.delta for c in changes], axis=0),
        np.mean([c.distances for c in changes], axis=0),
        sum(c.noise for c in changes) / n**2,
        sum(c.n_cells for c in changes),
    )


@dataclass(frozen=True)
class Summariser:
    """Sums up counts (n, genes) of a condition."""

    populations: tuple[Population, ...] = ()

    def exchanges(self, target: Mask) -> bool:
        """Return whether a perturbed gene gets the counts of control cells, so that it has no part in distances."""
        return bool(self.populations) and bool(target.any())

    def arm(self, counts: Any, folds: int, control: Any = None, target: Mask | None = None) -> Arm:
        """Sum up in folds; `control` are counts of control cells, for the perturbed gene in distances."""
        cells = exchange(counts, control, target) if target is not None and self.exchanges(target) else counts
        return Arm(fold_sums(counts, folds), counts.shape[0], tuple(p.pairs(cells, folds) for p in self.populations))

    def control(self, counts: Any, folds: int) -> Control:
        """Sum up control cells in folds, with moments of their expression."""
        n, n_genes = counts.shape
        mean, square = np.zeros(n_genes), np.zeros(n_genes)
        for some in chunks(n, PART):
            values = lognormal(counts[some]).astype(np.float64)
            mean += np.asarray(values.sum(axis=0)).ravel() / n
            square += np.asarray(values.multiply(values).sum(axis=0)).ravel() / n
        kept = counts if self.populations else None
        return Control(self.arm(counts, folds), mean, np.maximum(square - mean**2, 0.0), kept)


@dataclass(frozen=True)
class Generated:
    """Effects from generated cells.

    Perturbation and control share the noise of the flow, the library sizes and the random numbers of the counts, so
    that what differs between them is the effect (common random numbers). The control's second half of cells has noise
    of its own, for the chance level.
    """

    sampler: Sampler
    """With noise keyed by the context alone."""
    summariser: Summariser = field(default_factory=Summariser)
    workers: int | None = None
    name: str = "generated"

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        """Generate 2 `n_cells` control cells of each context."""
        registry = self.sampler.registry
        resolve_library(registry, [], None)
        requests = [Request((*context, registry.control), 2 * n_cells) for context in contexts]
        with closing(draw(self.sampler, requests, None, self.workers)) as drawn:
            found = [self.summariser.control(c, 2 * n_folds(n_cells)) for c in by_request(drawn, requests)]
        return dict(zip(contexts, found, strict=True))

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        """Generate `n_cells` of each condition."""
        requests = [Request((*context, name), n_cells) for name in names for context in controls]
        folds = n_folds(n_cells)
        rows = leave_one_out(folds)
        paired = np.hstack([rows, np.zeros_like(rows)])
        base = {context: Side.of(paired, control.arm) for context, control in controls.items()}
        with closing(draw(self.sampler, requests, None, self.workers)) as drawn:
            cells = by_request(drawn, requests)
            for name in names:
                target = target_genes(self.sampler.registry, name)
                yield {
                    context: contrast(
                        Side.of(rows, self.summariser.arm(next(cells), folds, controls[context].counts, target)), side
                    )
                    for context, side in base.items()
                }


@dataclass(frozen=True)
class Observed:
    """Effects from given cells, trained on or not; all cells of a condition are used."""

    cells: CellData
    registry: Registry
    summariser: Summariser = field(default_factory=Summariser)
    seed: int = 0
    name: str = "observed"
    _rows: dict[tuple[str, ...], NDArray[np.int64]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        labels = self.cells.labels
        if labels is None:
            raise DataError("observed effects need the labels of the cells")
        keys = np.ravel_multi_index(tuple(labels.T), self.registry.vocabulary)
        order = np.argsort(keys, kind="stable")
        present, starts = np.unique(keys[order], return_index=True)
        for key, rows in zip(present, np.split(order, starts[1:]), strict=True):
            codes = np.unravel_index(key, self.registry.vocabulary)
            names = tuple(a.levels[int(c)] for a, c in zip(self.registry.attributes, codes, strict=True))
            self._rows[names] = rows

    def n_cells(self, labels: tuple[str, ...]) -> int:
        """Return the observed cells of a condition."""
        return len(self._rows.get(labels, ()))

    def _counts(self, context: Context, name: str, at_most: int | None = None) -> Any:
        """Return the counts of a condition in a random order, all or the first so many."""
        labels = (*context, name)
        order = stream(self.seed, labels, 0, "observed folds").permutation(self._rows[labels])
        return self.cells.counts(order[:at_most])

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        """Sum up all control cells of each context."""
        assert self.registry.control is not None
        name, folds = self.registry.control, 2 * n_folds(n_cells)
        return {
            context: replace(self.summariser.control(self._counts(context, name), folds), counts=None)
            for context in contexts
            if self.n_cells((*context, name)) >= MIN_OBSERVED
        }

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        """Sum up all cells of each condition."""
        folds = n_folds(n_cells)
        rows = leave_one_out(folds)
        base = {context: Side.of(np.hstack([rows, rows]), control.arm) for context, control in controls.items()}
        for name in names:
            target = target_genes(self.registry, name)
            yield {
                context: contrast(Side.of(rows, self._arm(context, name, folds, target)), side)
                for context, side in base.items()
                if self.n_cells((*context, name)) >= MIN_OBSERVED
            }

    def _arm(self, context: Context, name: str, folds: int, target: Mask) -> Arm:
        counts, control = self._counts(context, name), None
        if self.summariser.exchanges(target):
            assert self.registry.control is not None
            control = self._counts(context, self.registry.control, counts.shape[0])
        return self.summariser.arm(counts, folds, control, target)


@dataclass(frozen=True)
class Both:
    """Observed effects shrunken toward the generated ones, where there are observed cells.

    In each context the observed effect has the weight max(0, 1 - S / D) of the positive-part James-Stein estimator
    (Efron & Morris 1973), with S the summed sampling variance of the observed effect and D its squared distance from
    the generated one: many cells follow the observation, few cells follow the model.
    """

    generated: EffectSource
    observed: Observed
    name: str = "both"

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        """Generate the controls; observed ones are summed up beside."""
        return self.generated.controls(contexts, n_cells)

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        """Generate and sum up each condition."""
        real = self.observed.controls(list(controls), n_cells)
        pairs = zip(
            self.generated.changes(names, controls, n_cells), self.observed.changes(names, real, n_cells), strict=True
        )
        for made, seen in pairs:
            yield {context: shrink(seen[context], m) if context in seen else m for context, m in made.items()}


def shrink(observed: Change, generated: Change) -> Change:
    """Return the observed effect shrunken toward the generated one; see `Both`."""
    difference = float(np.square(observed.delta[0] - generated.delta[0]).sum())
    variance = float(jackknife_variance(observed.delta[1:]).sum())
    weight = max(0.0, 1.0 - variance / difference) if difference > 0 else 0.0
    delta = weight * observed.delta + (1 - weight) * generated.delta
    noise = weight**2 * observed.noise + (1 - weight) ** 2 * generated.noise
    return replace(generated, delta=delta, noise=noise, n_cells=observed.n_cells + generated.n_cells)


def jackknife_variance(left_out: Array) -> Array:
    """Return the delete-a-group jackknife variance over the first axis: (k - 1) / k sum (x_i - mean)^2 (Tukey 1958)."""
    k = len(left_out)
    return (k - 1) * np.var(left_out, axis=0) if k > 1 else np.zeros(left_out.shape[1:])


def exchange(counts: Any, control: Any, genes: Mask) -> Any:
    """Return counts (n, genes) with some genes as in control cells, in order and from the start again if they end."""
    other = control[np.arange(counts.shape[0]) % control.shape[0]]
    return (counts.multiply(~genes) + other.multiply(genes)).tocsr()


def by_request(drawn: Any, requests: Sequence[Request]) -> Iterator[Any]:
    """Yield the counts (n, genes) of each request, from cells that come unit by unit."""
    from scipy import sparse

    held = None
    for request in requests:
        while held is None or held.shape[0] < request.n_cells:
            values = next(drawn).values
            held = values if held is None else sparse.vstack([held, values], format="csr")
        yield held[: request.n_cells]
        held = held[request.n_cells :]

"""Scores of effects in one group of contexts, with what is needed to judge them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scldm_cd4.noise import stream
from scldm_cd4.ranking.effects import Arm, Change, Context, Control, Side, contrast, jackknife_variance, mean_change
from scldm_cd4.ranking.population import Population
from scldm_cd4.ranking.scores import LINEAR, cosine
from scldm_cd4.ranking.targets import Part, Profile

N_SPLITS = 400
"""Random halves of the control cells that make the chance level."""
N_RANDOM = 100
"""Random gene sets, matched for expression."""
N_DRIVERS = 10
N_BINS = 10
"""Classes of expression in which genes are exchanged."""
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Contexts over which effects are averaged."""

    donor: str
    timepoint: str
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class Row:
    """One perturbation in one group of contexts."""

    score: float
    parts: dict[str, float]
    """Score of each part of a weighted sum."""
    folds: Array
    """Scores without each fold of cells."""
    without_donor: dict[str, float]
    by_donor: dict[str, float]
    chance: tuple[float, float, float, float]
    """Mean, standard deviation, 5 % and 95 % quantile of the scores between halves of the control."""
    z_genes: float
    """Distance from the scores of random gene sets; NaN where there are none."""
    cosine: float
    effect_size: float
    effect_chance: tuple[float, float]
    """Median and 95 % quantile of the effect size between halves of the control."""
    n_genes: int
    n_cells: int
    on_target: float
    """log2 fold change of the perturbed gene; NaN where it is not in the panel."""
    contexts: tuple[Context, ...]
    drivers: tuple[tuple[int, float, float], ...]
    """Genes with the largest part in the score: position, part (toward the target is positive), log2 fold change."""

    @property
    def se_cells(self) -> float:
        """Standard error over cells."""
        return float(np.sqrt(jackknife_variance(self.folds)))


@dataclass(frozen=True)
class Scorer:
    """Scores effects in one group of contexts.

    Parameters
    ----------
    group
        The contexts.
    parts
        The target.
    controls
        Control of each context that has one.
    seed
        Of splits and random gene sets.
    """

    group: Group
    parts: tuple[Part, ...]
    controls: Mapping[Context, Control]
    seed: int
    spread: Array = field(init=False)
    """Standard deviation of log1p(counts per 10,000) over control cells (genes,)."""
    _chance: Change = field(init=False)
    _chance_parts: Array = field(init=False)
    _chance_squares: Array = field(init=False)
    _units: Array = field(init=False)
    _random: tuple[Array, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = [self.controls[c] for c in self.group.contexts if c in self.controls]
        set_ = object.__setattr__
        set_(self, "spread", np.sqrt(np.mean([c.variance for c in found], axis=0)))
        set_(self, "_chance", mean_change([_split(c.arm, self._rng("control halves")) for c in found]))
        set_(self, "_chance_squares", np.square(self._chance.delta).sum(axis=1))
        everything = np.ones(len(self.spread), dtype=bool)
        chance = np.stack([self._part(part, self._chance, everything) for part in self.parts])
        set_(self, "_chance_parts", chance)
        units = np.maximum(chance.std(axis=1), 1e-300) if len(self.parts) > 1 else np.ones(1)
        set_(self, "_units", np.array([part.weight for part in self.parts]) / units)
        expression = np.mean([c.mean for c in found], axis=0)
        set_(self, "_random", tuple(self._exchanged(part.target, expression) for part in self.parts))

    def score(self, change: Change, keep: Mask) -> Array:
        """Return the score of every row of a change (rows,)."""
        return self._units @ np.stack([self._part(part, change, keep) for part in self.parts])

    def row(self, changes: Mapping[Context, Change], keep: Mask, target: Mask) -> Row | None:
        """Score the effects of one perturbation.

        Parameters
        ----------
        changes
            By context.
        keep
            Genes that may take part (genes,).
        target
            The perturbed gene (genes,).

        Returns
        -------
        The row, or None where no context of the group has an effect.
        """
        contexts = tuple(c for c in self.group.contexts if c in changes)
        if not contexts:
            return None
        mean = mean_change([changes[c] for c in contexts])
        whole = self.score(mean, keep)
        donors = list(dict.fromkeys(c[0] for c in contexts))
        inside = [[changes[c] for c in contexts if c[0] == d] for d in donors]
        outside = [[changes[c] for c in contexts if c[0] != d] for d in donors] if len(donors) > 1 else []
        estimates = self.score(_first_rows([mean_change(side) for side in (*inside, *outside)]), keep)
        sizes = self._chance_sizes(keep) * self._scale(mean)
        null = self._chance_scores(mean)
        used = np.any([p.target.genes_used(self.spread, keep) for p in self.parts if isinstance(p.target, Profile)], 0)
        return Row(
            score=float(whole[0]),
            parts={p.name: float(self._part(p, mean, keep)[0]) for p in self.parts} if len(self.parts) > 1 else {},
            folds=whole[1:],
            without_donor=dict(zip(donors, estimates[len(donors) :].tolist(), strict=False)),
            by_donor=dict(zip(donors, estimates.tolist(), strict=False)),
            chance=(float(null.mean()), float(null.std()), *np.quantile(null, [0.05, 0.95]).tolist()),
            z_genes=self._z_genes(mean, keep, float(whole[0])),
            cosine=self._cosine(mean, keep),
            effect_size=float(np.linalg.norm(mean.delta[0, keep])),
            effect_chance=(float(np.median(sizes)), float(np.quantile(sizes, 0.95))),
            n_genes=int(np.sum(used)),
            n_cells=mean.n_cells,
            on_target=float(mean.delta[0, target].mean() / np.log(2)) if target.any() else np.nan,
            contexts=contexts,
            drivers=self._drivers(mean, keep),
        )

    def _drivers(self, change: Change, keep: Mask) -> tuple[tuple[int, float, float], ...]:
        parts = np.zeros(len(self.spread))
        for unit, part in zip(self._units, self.parts, strict=True):
            if isinstance(part.target, Profile):
                scaled = part.target.kind == "signature" and part.target.method != "projection"
                scale = np.maximum(self.spread, 1e-300) if scaled else 1.0
                used = part.target.genes_used(self.spread, keep)
                parts += np.where(used, unit * part.target.weights * change.delta[0] / scale, 0.0)
        first = [int(g) for g in np.argsort(-np.abs(parts), kind="stable")[:N_DRIVERS] if parts[g]]
        return tuple((g, float(parts[g]), float(change.delta[0, g] / np.log(2))) for g in first)

    def _rng(self, purpose: str) -> np.random.Generator:
        return stream(self.seed, (self.group.donor, self.group.timepoint), 0, purpose)

    def _part(self, part: Part, change: Change, keep: Mask) -> Array:
        if isinstance(part.target, Profile):
            return part.target.score(change.delta, self.spread, keep)[:, 0]
        gone, start = change.distances[:, self._position(part)].T
        return 1.0 - np.divide(gone, start, out=np.full_like(gone, np.nan), where=start > 0)

    def _position(self, part: Part) -> int:
        return [p.name for p in self.parts if isinstance(p.target, Population)].index(part.name)

    def _scale(self, change: Change) -> float:
        """Return by how much the sampling noise of an effect exceeds that between halves of the control."""
        return float(np.sqrt(change.noise / self._chance.noise))

    def _chance_sizes(self, keep: Mask) -> Array:
        """Return the effect sizes between halves of the control on some genes (N_SPLITS,)."""
        left_out = np.square(self._chance.delta[:, ~keep]).sum(axis=1)
        return np.sqrt(np.maximum(self._chance_squares - left_out, 0.0))

    def _chance_scores(self, change: Change) -> Array:
        """Return the scores between halves of the control, with the noise that this effect has (N_SPLITS,)."""
        scales = [self._scale(change) if p.target.method in LINEAR else 1.0 for p in self.parts]
        return (self._units * scales) @ self._chance_parts

    def _exchanged(self, target: Profile | Population, expression: Array) -> Array:
        """Return the target's weights exchanged among genes of like expression (N_RANDOM, genes)."""
        if isinstance(target, Population):
            return np.zeros((N_RANDOM, 0))
        rng = self._rng("random gene sets")
        known = np.flatnonzero(target.known)
        ordered = known[np.argsort(expression[known], kind="stable")]
        out = np.tile(target.weights, (N_RANDOM, 1))
        for genes in np.array_split(ordered, min(N_BINS, max(1, len(ordered) // 2))):
            out[:, genes] = rng.permuted(out[:, genes], axis=1)
        return out

    def _z_genes(self, change: Change, keep: Mask, score: float) -> float:
        total = np.zeros(N_RANDOM)
        for unit, part, weights in zip(self._units, self.parts, self._random, strict=True):
            if isinstance(part.target, Population):
                return np.nan
            total += unit * part.target.score(change.delta[:1], self.spread, keep, weights)[0]
        return float((score - total.mean()) / max(float(total.std()), 1e-300))

    def _cosine(self, change: Change, keep: Mask) -> float:
        """Return the cosine of the effect with a single direction; NaN for other targets."""
        target = self.parts[0].target
        if len(self.parts) > 1 or not isinstance(target, Profile) or target.kind == "gene_set":
            return np.nan
        genes = target.known & keep & (self.spread > 0)
        scale = self.spread[genes] if target.kind == "signature" else np.ones(int(genes.sum()))
        return float(cosine(change.delta[:1, genes], target.weights[None, genes], scale)[0, 0])


def _split(arm: Arm, rng: np.random.Generator) -> Change:
    """Return the changes between random halves of an arm (N_SPLITS rows)."""
    n = len(arm.sums)
    halves = np.zeros((N_SPLITS, n))
    np.put_along_axis(halves, rng.random(halves.shape).argsort(axis=1)[:, : n // 2], 1.0, axis=1)
    return contrast(Side.of(halves, arm), Side.of(1.0 - halves, arm))


def _first_rows(changes: list[Change]) -> Change:
    """Stack the estimates of several changes as rows."""
    delta = np.stack([c.delta[0] for c in changes])
    return Change(delta, np.stack([c.distances[0] for c in changes]), changes[0].noise, changes[0].n_cells)

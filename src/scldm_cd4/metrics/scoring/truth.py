"""Real cells prepared once, and any prediction compared with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np

from scldm_cd4.metrics.cells.projection import Projection
from scldm_cd4.metrics.cells.pseudobulk import Key, Pseudobulks, target_mask
from scldm_cd4.metrics.cells.samples import Sample
from scldm_cd4.metrics.de.rank_tests import DETests, control_ranks, de_tests, refuse_tiled
from scldm_cd4.metrics.de.ranks import ControlRanks
from scldm_cd4.metrics.de.recovery import de_table
from scldm_cd4.metrics.distribution.memorisation import nearest_distance, ratio_of_medians
from scldm_cd4.metrics.distribution.moments import r2
from scldm_cd4.metrics.distribution.table import DISTRIBUTION_METRICS, DistributionReference
from scldm_cd4.metrics.effects.discrimination import Distance, discrimination
from scldm_cd4.metrics.effects.table import Space, control_halves, effect_table, profiles
from scldm_cd4.metrics.registry import METRICS

DISCRIMINATION: dict[str, Distance] = {
    "discrimination_cosine": "cosine",
    "discrimination_l1": "l1",
    "discrimination_l2": "l2",
}
MIN_GENES = 20
"""Genes that are no target of any condition, below which discrimination leaves out each condition's own target only."""


@dataclass(frozen=True)
class Controls:
    """Real control cells of every context, and what is computed of them once."""

    sample: Sample
    label: str

    @cached_property
    def bulks(self) -> Pseudobulks:
        """Their pseudobulks."""
        return self.sample.pseudobulks()

    @cached_property
    def ranks(self) -> dict[Key, ControlRanks]:
        """Their sorted values."""
        return control_ranks(self.sample.values, self.sample.codes, self.sample.keys, control=self.label)

    def rows(self, keys: Sequence[Key]) -> np.ndarray:
        """Row of the control of each condition."""
        return self.bulks.rows([(*key[:-1], self.label) for key in keys])

    def halve(self, seed: Sequence[int]) -> tuple["Controls", "Controls"]:
        """Give two disjoint halves of the cells of each context."""
        first, second = halve(self.sample, seed)
        return Controls(first, self.label), Controls(second, self.label)


@dataclass(frozen=True)
class Reference:
    """What is fitted on reference cells, which are not scored.

    Attributes
    ----------
    projection
        Principal components.
    bulks, pcs
        Pseudobulks and coordinates of the training cells; None without training cells.
    """

    projection: Projection
    bulks: Pseudobulks | None
    pcs: np.ndarray | None


@dataclass(frozen=True)
class Options:
    """What is computed, and how."""

    metrics: tuple[str, ...]
    target_genes: Mapping[str, str]
    fdr: float
    max_cells: int
    seed: int

    def of(self, family: str) -> list[str]:
        """Metrics asked for of a family."""
        return [name for name in self.metrics if METRICS[name].family == family]


class Truth:
    """Real cells of the scored conditions.

    Parameters
    ----------
    real
        The scored conditions, each with cells.
    controls
        Real controls of their contexts.
    reference
        What is fitted on other cells.
    options
        What is computed.
    bandwidth
        Of the kernels; the median distance of the real cells by default.
    """

    def __init__(
        self,
        real: Sample,
        controls: Controls,
        reference: Reference,
        options: Options,
        *,
        bandwidth: float | None = None,
    ) -> None:
        self.real, self.keys, self.controls = real, real.keys, controls
        self.reference, self.options, self._bandwidth = reference, options, bandwidth
        self.exclude = target_mask(self.keys, list(real.genes), options.target_genes)

    @cached_property
    def scope(self) -> Literal["panel", "own"]:
        """Whose targets discrimination leaves out: those of all conditions, or the own one where few genes remain."""
        is_target = self.exclude.any(axis=0)
        return "own" if is_target.any() and (~is_target).sum() < MIN_GENES else "panel"

    def finds_target(self, row: int) -> bool:
        """Say whether the target of a condition is left out, or known to be no gene."""
        return bool(self.exclude[row].any()) or self.options.target_genes.get(self.keys[row][-1]) == ""

    @cached_property
    def bulks(self) -> Pseudobulks:
        """Pseudobulks of the scored conditions, then of the controls."""
        return concat_bulks(self.real.pseudobulks(), self.controls.bulks)

    @cached_property
    def blocks(self) -> list[np.ndarray]:
        """Coordinates of the cells of every condition."""
        return self.project(self.real)

    @cached_property
    def distributions(self) -> DistributionReference:
        """The real side of distances."""
        return DistributionReference(
            self.blocks, bandwidth=self._bandwidth, max_cells=self.options.max_cells, seed=self.options.seed
        )

    @cached_property
    def tests(self) -> DETests:
        """Rank tests of the real cells."""
        return self.test(self.real, self.controls)

    @cached_property
    def halves(self) -> tuple[Pseudobulks, Pseudobulks]:
        """Pseudobulks of two halves of the controls."""
        sample = self.controls.sample
        return control_halves(
            sample.values,
            sample.codes,
            sample.keys,
            control=self.controls.label,
            seed=self.options.seed,
        )

    @cached_property
    def _real_to_training(self) -> list[np.ndarray]:
        return self._to_training(self.blocks)

    def _to_training(self, blocks: list[np.ndarray]) -> list[np.ndarray]:
        """Distances of the cells of every condition to the nearest training cell; none without training cells."""
        if self.reference.pcs is None:
            return [np.empty(0)] * len(blocks)
        found = nearest_distance(np.vstack(blocks), self.reference.pcs)
        return np.split(found, np.cumsum([len(block) for block in blocks])[:-1])

    def project(self, sample: Sample) -> list[np.ndarray]:
        """Coordinates of the cells of every condition, in the order of ``keys``."""
        coordinates = self.reference.projection.apply(sample.values)
        return [coordinates[sample.rows(key)] for key in self.keys]

    def test(self, sample: Sample, controls: Controls) -> DETests:
        """Test conditions against controls; those without cells are not among the results."""
        exclude = target_mask(
            [key for key in sample.keys if len(sample.rows(key))], list(sample.genes), self.options.target_genes
        )
        return de_tests(
            sample.values, sample.codes, sample.keys, controls.ranks, control=controls.label, exclude=exclude
        )

    def compare(self, pred: Sample, controls: Controls | None = None) -> dict[str, np.ndarray]:
        """Compute all metrics that are asked for.

        Parameters
        ----------
        pred
            Predicted cells; conditions without any are NaN.
        controls
            Controls of their own, for a repeat of the experiment. The real ones by default.

        Returns
        -------
        One array per metric, (conditions,), and ``n_pred``, ``pearson_delta_chance``, ``de_prevalence``, ``n_shared``
        where they are known.

        Raises
        ------
        DataError
            If the cells of a condition are copies of one profile.
        """
        pred = pred.select(self.keys)
        out: dict[str, np.ndarray] = {"n_pred": pred.sizes()}
        bulks = pred.pseudobulks() if pred.n_cells else None
        if bulks is None:
            return out | {name: np.full(len(self.keys), np.nan) for name in self.options.metrics}
        refuse_tiled(pred.values, pred.codes, pred.keys)
        out |= self._distributions(pred, bulks)
        out |= self._effects(bulks, controls)
        out |= self._recovery(pred, controls)
        out |= self._quality(pred, bulks)
        return out

    def _distributions(self, pred: Sample, bulks: Pseudobulks) -> dict[str, np.ndarray]:
        asked = self.options.of("distribution")
        out: dict[str, np.ndarray] = {}
        names = [name for name in asked if name in DISTRIBUTION_METRICS]
        if names or "memorisation" in self.options.metrics:
            blocks = self.project(pred)
        if names:
            table = self.distributions.compare(blocks, names)
            out |= {name: table[name] for name in (*names, "n_shared")}
        if "memorisation" in self.options.metrics:
            pairs = zip(self._to_training(blocks), self._real_to_training, strict=True)
            out["memorisation"] = np.array([ratio_of_medians(a, b) for a, b in pairs])
        there = bulks.rows(self.keys)
        for name, side in (("r2_mean", "means"), ("r2_variance", "variances")):
            if name in asked:
                here, predicted = getattr(self.bulks, side)[: len(self.keys)], getattr(bulks, side)[there]
                out[name] = np.where(there < 0, np.nan, r2(here, predicted))
        return out

    def _effects(self, bulks: Pseudobulks, controls: Controls | None) -> dict[str, np.ndarray]:
        own = self.controls if controls is None else controls
        bulks = rebase(bulks, own, self.controls) if controls is not None else bulks
        out: dict[str, np.ndarray] = {}
        asked = self.options.of("effect")
        spaces: tuple[Space, ...] = ("mean_log", "log_sum")
        for space in spaces:
            if names := [name for name in asked if METRICS[name].space == space]:
                table = self._effect_table(bulks, self._space(space))
                out |= {name: table[name] for name in names}
                if space == "mean_log":
                    out["pearson_delta_chance"] = table["pearson_delta_chance"]
        if controls is not None and "pearson_delta_disjoint" in out:
            # both sides have controls of their own already
            out["pearson_delta_disjoint"] = self._effect_table(bulks, "mean_log")["pearson_delta"]
        return out | self._discrimination(bulks)

    def _effect_table(self, bulks: Pseudobulks, space: Space) -> dict[str, np.ndarray]:
        # these two are asked of means of logarithms only
        is_plain = space == "mean_log"
        halves = self.halves if is_plain and "pearson_delta_disjoint" in self.options.metrics else None
        return effect_table(
            self.bulks,
            bulks,
            control=self.controls.label,
            exclude=self.exclude,
            train=self.reference.bulks if is_plain else None,
            halves=halves,
            space=space,
            allow_missing=True,
        )

    def _discrimination(self, bulks: Pseudobulks) -> dict[str, np.ndarray]:
        names = [name for name in DISCRIMINATION if name in self.options.metrics]
        if not names:
            return {}
        space = self._space("log_sum")
        real, there = profiles(self.bulks, space)[0], bulks.rows(self.keys)
        control = real[self.bulks.rows([(*key[:-1], self.controls.label) for key in self.keys])]
        guess = np.where((there < 0)[:, None], np.nan, profiles(bulks, space)[0][there] - control)
        truth, contexts = real[: len(self.keys)] - control, [key[:-1] for key in self.keys]
        score = partial(discrimination, truth, guess, contexts, exclude=self.exclude, scope=self.scope)
        return {name: score(metric=DISCRIMINATION[name]) for name in names}

    def _space(self, space: Space) -> Space:
        return "mean_log" if self.real.counts is None else space

    def _recovery(self, pred: Sample, controls: Controls | None) -> dict[str, np.ndarray]:
        names = self.options.of("de")
        if not names:
            return {}
        n = np.minimum(self.real.sizes(), pred.sizes())
        real = draw(self.real, np.where(pred.sizes() > 0, n, self.real.sizes()), self.options.seed, 0)
        truth = self.tests if real is self.real else self.test(real, self.controls)
        guess = self.test(draw(pred, n, self.options.seed, 1), self.controls if controls is None else controls)
        table = de_table(truth, guess, fdr=self.options.fdr, allow_missing=True)
        tested = (~np.isnan(truth.p_adjusted)).sum(axis=1)
        return {name: table[name] for name in names} | {"de_prevalence": table["de_n_real"] / np.maximum(tested, 1)}

    def _quality(self, pred: Sample, bulks: Pseudobulks) -> dict[str, np.ndarray]:
        out, there = {}, bulks.rows(self.keys)
        if "variance_log2_ratio" in self.options.metrics:
            real = self.bulks.variances[: len(self.keys)].sum(axis=1)
            out["variance_log2_ratio"] = _log2_ratio(np.where(there < 0, np.nan, bulks.variances[there].sum(1)), real)
        if {"library_log2_ratio", "zero_fraction_difference"} & set(self.options.metrics):
            (library, zeros), (pred_library, pred_zeros) = (_library_and_zeros(side) for side in (self.real, pred))
            out["library_log2_ratio"] = _log2_ratio(pred_library, library)
            out["zero_fraction_difference"] = pred_zeros - zeros
        return out


def concat_bulks(first: Pseudobulks, second: Pseudobulks) -> Pseudobulks:
    """Put pseudobulks of different conditions together."""
    has_counts = first.log_sum is not None and second.log_sum is not None
    names = ("means", "variances", "n", *(("log_sum", "log_sum_noise") if has_counts else ()))
    joined = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
    return Pseudobulks((*first.keys, *second.keys), **joined)


def rebase(bulks: Pseudobulks, own: Controls, other: Controls) -> Pseudobulks:
    """Shift profiles so that their difference to other controls is that to their own."""
    here, there = own.rows(bulks.keys), other.rows(bulks.keys)
    means = bulks.means - own.bulks.means[here] + other.bulks.means[there]
    log_sum = bulks.log_sum
    if log_sum is not None and own.bulks.log_sum is not None and other.bulks.log_sum is not None:
        log_sum = log_sum - own.bulks.log_sum[here] + other.bulks.log_sum[there]
    return replace(bulks, means=means, log_sum=log_sum)


def halve(sample: Sample, seed: Sequence[int]) -> tuple[Sample, Sample]:
    """Give two disjoint halves of the cells of each condition; the first has the odd one."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for key, rows in sample.groups.items():
        mixed = np.random.default_rng([*seed, *"/".join(key).encode()]).permutation(rows)
        for side, part in zip(sides, (mixed[0::2], mixed[1::2]), strict=True):
            side.append(np.sort(part))
    first, second = (np.concatenate([*side, np.empty(0, dtype=np.int64)]) for side in sides)
    return sample.take(first), sample.take(second)


def draw(sample: Sample, sizes: np.ndarray, seed: int, side: int) -> Sample:
    """Draw so many cells of each condition without replacement; the same object where all are asked for."""
    if (sizes >= sample.sizes()).all():
        return sample
    rows = []
    for key, n in zip(sample.keys, sizes, strict=True):
        own = sample.rows(key)
        rng = np.random.default_rng([seed, side, *"/".join(key).encode()])
        rows.append(own if n >= len(own) else np.sort(rng.choice(own, n, replace=False)))
    return sample.take(np.concatenate(rows))


def _library_and_zeros(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Median counts per cell and share of zeros of every condition; NaN without cells."""
    median, zeros = np.full((2, len(sample.keys)), np.nan)
    matrix = sample.values if sample.counts is None else sample.counts
    totals = np.full(sample.n_cells, np.nan) if sample.counts is None else np.asarray(matrix.sum(axis=1)).ravel()
    expressed = np.asarray((matrix != 0).sum(axis=1)).ravel()
    for code, key in enumerate(sample.keys):
        if len(rows := sample.rows(key)):
            median[code], zeros[code] = np.median(totals[rows]), 1.0 - expressed[rows].mean() / matrix.shape[1]
    return median, zeros


def _log2_ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    is_defined = (above > 0) & (below > 0)
    return np.where(is_defined, np.log2(np.where(is_defined, above, 1.0) / np.where(is_defined, below, 1.0)), np.nan)

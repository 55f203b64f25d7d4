"""What a repeat of the experiment reaches, and predictions measured in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm_cd4.metrics.baselines.counts import emit_counts
from scldm_cd4.metrics.baselines.shifts import averaged
from scldm_cd4.metrics.baselines.training import Training
from scldm_cd4.metrics.cells.pseudobulk import Key, log_normalize
from scldm_cd4.metrics.cells.samples import Sample
from scldm_cd4.metrics.scoring.truth import Controls, Truth, draw, halve


@dataclass(frozen=True)
class _Place:
    """One halving: the truth, the repeat, its controls, and which conditions have cells in both."""

    truth: Truth
    duplicate: Sample
    controls: Controls
    enough: np.ndarray
    repeat: int


class Repeats:
    """Disjoint halves of the real cells of every condition, each against a disjoint half of the controls.

    Halves with shared cells or shared controls would look too good. Predictions are put in the place of the repeat, at
    its number of cells and with its controls, so that they can be set against it.

    Parameters
    ----------
    truth
        The real cells.
    n_repeats
        Random halvings to average over.
    seed
        Of the halves.
    """

    def __init__(self, truth: Truth, *, n_repeats: int, seed: int) -> None:
        self.seed = seed
        self.places = [self._halve(truth, repeat) for repeat in range(n_repeats)]

    def _halve(self, truth: Truth, repeat: int) -> _Place:
        first, second = halve(truth.real, [self.seed, 11, repeat])
        controls, others = truth.controls.halve([self.seed, 12, repeat])
        contexts = {key[:-1] for key in controls.sample.groups} & {key[:-1] for key in others.sample.groups}
        enough = (first.sizes() * second.sizes() > 0) & np.array([key[:-1] in contexts for key in truth.keys])
        keys = [key for key, ok in zip(truth.keys, enough, strict=True) if ok]
        bandwidth = truth.distributions.bandwidth
        half = Truth(first.select(keys), controls, truth.reference, truth.options, bandwidth=bandwidth)
        return _Place(half, second.select(keys), others, enough, repeat)

    def score(self, pred: Sample) -> dict[str, np.ndarray]:
        """Score a prediction in the place of the repeat; means over the halvings, (conditions,)."""
        runs = []
        for place in self.places:
            sizes = place.duplicate.sizes()
            drawn = draw(pred.select(place.truth.keys), sizes, self.seed + 14 + place.repeat, 2)
            runs.append(_spread(place.truth.compare(drawn, place.controls), place.enough))
        return _mean(runs)

    def duplicate(self) -> dict[str, np.ndarray]:
        """Score the technical duplicate: the other half of the real cells as it is."""
        runs = [_spread(p.truth.compare(p.duplicate, p.controls), p.enough) for p in self.places]
        return _mean(runs)

    def interpolated(self, training: Training) -> dict[str, np.ndarray]:
        r"""Score the interpolated duplicate (Mejia et al. 2025).

        The cells of the duplicate with the mean :math:`\alpha_g` x duplicate + (1 - :math:`\alpha_g`) x mean training
        perturbation of the context, :math:`\alpha_g = 1 - p^{adj}_g` of the duplicate against its controls, so that
        genes without an effect are not noisier than a simple mean.
        """
        runs = []
        for place in self.places:
            if not place.truth.keys:
                continue
            adjusted = place.truth.test(place.duplicate, place.controls).p_adjusted
            mixed = _interpolate(place.truth, place.duplicate, adjusted, training, [self.seed, 13, place.repeat])
            runs.append(_spread(place.truth.compare(mixed, place.controls), place.enough))
        return _mean(runs)


def _interpolate(
    half: Truth, duplicate: Sample, adjusted: np.ndarray, training: Training, seed: Sequence[int]
) -> Sample:
    """Give the cells of the duplicate with the interpolated mean; conditions without a mean have no cells."""
    blocks, codes = [], []
    shifts = averaged(training, half.keys, "context")
    for code, key in enumerate(half.keys):
        if np.isnan(shifts[code]).any() or key[:-1] not in training.controls:
            continue
        counts = duplicate.counts[duplicate.rows(key)]  # type: ignore[index]
        total = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
        own, mean = total / max(total.sum(), 1.0), training.target_share(key[:-1], shifts[code])
        alpha = 1.0 - np.nan_to_num(adjusted[code], nan=0.0)
        target = alpha * own + (1.0 - alpha) * mean
        rng = np.random.default_rng([*seed, *"/".join(key).encode()])
        blocks.append(emit_counts(counts, own, target / target.sum(), rng))
        codes.append(np.full(counts.shape[0], code))
    return counts_sample(blocks, codes, half.keys, duplicate.genes)


def counts_sample(
    blocks: list[sp.csr_matrix], codes: list[np.ndarray], keys: Sequence[Key], genes: np.ndarray
) -> Sample:
    """Make cells for scoring out of counts."""
    counts = sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix((0, len(genes)), dtype=np.float32)
    flat = np.concatenate([*codes, np.empty(0, dtype=np.int64)]).astype(np.int64)
    return Sample(counts, log_normalize(counts), flat, tuple(keys), genes)


def _spread(found: dict[str, np.ndarray], enough: np.ndarray) -> dict[str, np.ndarray]:
    """Put the values of some conditions in their places among all."""
    out = {}
    for name, values in found.items():
        out[name] = np.full(len(enough), np.nan)
        out[name][enough] = values
    return out


def _mean(runs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Average over runs, leaving NaN out."""
    out: dict[str, np.ndarray] = {}
    for name in runs[0] if runs else ():
        stacked = np.stack([run[name] for run in runs])
        known = (~np.isnan(stacked)).sum(axis=0)
        out[name] = np.where(known > 0, np.nansum(stacked, axis=0) / np.maximum(known, 1), np.nan)
    return out

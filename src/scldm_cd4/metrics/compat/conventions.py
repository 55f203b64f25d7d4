"""Other packages' conventions, to set our numbers beside published ones. Not for judging a model: see the notes.

Each convention is computed with this package's own functions at that package's choices of normalisation, control,
estimator and averaging.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.baselines import emit, get
from scldm_cd4.metrics.baselines.training import Training
from scldm_cd4.metrics.cells.projection import fit_projection
from scldm_cd4.metrics.cells.pseudobulk import Key, dense, log_normalize
from scldm_cd4.metrics.cells.samples import InputType, Keys, Sample, read_samples
from scldm_cd4.metrics.compat import effects
from scldm_cd4.metrics.distribution.mmd import mmd2
from scldm_cd4.metrics.distribution.moments import moments, r2
from scldm_cd4.metrics.distribution.wasserstein import wasserstein
from scldm_cd4.metrics.scoring.ceilings import counts_sample
from scldm_cd4.metrics.scoring.truth import halve

Rows = list[tuple[Key, str, float]]
CFGEN_SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
CFGEN_COMPONENTS = 30
SCORED_2026: Mapping[str, tuple[float, float]] = {
    "pds_cosine": (-np.inf, np.inf),
    "expr_mse_unbiased_capped_norm": (0.0, 1.0),
    "de_wilcoxon_sig_jaccard": (-np.inf, np.inf),
    "de_wilcoxon_lfc_nmae": (-6.0, np.inf),
    "de_wilcoxon_direction_fidelity_yield_raw": (-np.inf, np.inf),
    "de_wilcoxon_direction_reach_raw": (-np.inf, np.inf),
}
"""Measures that the challenge scores, and the bounds of their scores."""


@dataclass(frozen=True)
class Convention:
    """How another package measures.

    Attributes
    ----------
    name
        What it is called here.
    source
        Package and version.
    note
        What to know before comparing with it.
    measure
        Computes all values of all conditions.
    takes_lognorm
        Whether it can take log-normalised values.

    Examples
    --------
    >>> metrics.compat.CONVENTIONS["scldm"].name
    'scldm'
    """

    name: str
    source: str
    note: str
    measure: Callable[[Sample, Sample, str, int], Rows]
    takes_lognorm: bool = False


def evaluate(
    real: Any,
    pred: Any,
    convention: str,
    *,
    perturbation_key: str | None = None,
    context_keys: str | Sequence[str] | None = None,
    control: str | None = None,
    layer: str | None = None,
    input_type: InputType = "counts",
    seed: int = 0,
) -> Any:
    """Measure generated cells in the way of another package.

    Parameters
    ----------
    real, pred
        AnnData of raw counts with the same genes and conditions; ``cell_eval_v1`` needs control cells in both.
    convention
        One of :data:`CONVENTIONS`.
    perturbation_key, context_keys, control
        As in :func:`scldm_cd4.metrics.evaluate`.
    layer
        As in :func:`scldm_cd4.metrics.evaluate`.
    input_type
        ``counts``, or ``lognorm``, which only ``cell_eval_v1`` and ``cfgen`` can use.
    seed
        Of draws.

    Returns
    -------
    DataFrame with ``context``, ``perturbation``, ``metric`` (their names), ``value``, ``n_real``, ``n_pred``; values of
    a whole panel of perturbations have ``perturbation`` ``(panel)``. ``attrs`` holds source and note.

    Raises
    ------
    DataError
        If the convention is unknown, or keys, genes or conditions do not fit.

    Examples
    --------
    >>> table = metrics.compat.evaluate(real, cells, "cell_eval_v1")
    >>> "value" in table.columns
    True
    """
    import pandas as pd

    if convention not in CONVENTIONS:
        raise DataError(f"convention={convention!r} is not known; conventions are {', '.join(CONVENTIONS)}")
    chosen = CONVENTIONS[convention]
    keys = Keys.resolve(pred, perturbation_key, context_keys, control)
    if input_type == "lognorm" and not chosen.takes_lognorm:
        raise DataError(f"convention={convention!r} needs raw counts")
    sides = list(read_samples({"real": real, "pred": pred}, keys, layer=layer, input_type=input_type).values())
    here, there = ({key for key in side.groups if key[-1] != keys.control} for side in sides)
    if here != there or not here:
        raise DataError(
            f"{len(here - there)} real conditions were not predicted and {len(there - here)} predicted ones have no "
            "real cells; give the same conditions on both sides"
        )
    rows = chosen.measure(sides[0], sides[1], keys.control, seed)
    table = pd.DataFrame(
        {
            "context": [" | ".join(key[:-1]) or "all" for key, _, _ in rows],
            "perturbation": [key[-1] for key, _, _ in rows],
            "metric": [name for _, name, _ in rows],
            "value": np.array([value for _, _, value in rows], dtype=np.float64),
            "n_real": [len(sides[0].rows(key)) for key, _, _ in rows],
            "n_pred": [len(sides[1].rows(key)) for key, _, _ in rows],
        }
    )
    table.attrs = {"convention": convention, "source": chosen.source, "note": chosen.note}
    return table


def vcc2026_score(
    real: Any,
    pred: Any,
    *,
    perturbation_key: str | None = None,
    context_keys: str | Sequence[str] | None = None,
    control: str | None = None,
    layer: str | None = None,
    n_splits: int = 5,
    seed: int = 0,
) -> Any:
    """Scale the measures of 2026 between a mean response (0) and a replicate (1).

    The baseline is the mean response of the context, emitted as cells. It is an oracle: it sees the scored
    perturbations. The replicate is the mean over halvings of the real cells, each half with its own control cells. The
    score of the errors is bounded as there: expression 0 to 1, fold changes from -6. The anchors are our own emission
    and halves, so scores are near those of the challenge, not equal.

    Parameters
    ----------
    real, pred, perturbation_key, context_keys, control, layer
        As in :func:`evaluate`.
    n_splits
        Halvings.
    seed
        Of the baseline's cells and the halves.

    Returns
    -------
    DataFrame by metric: ``value``, ``baseline``, ``replicate`` (means over conditions, then contexts), ``score``.

    Raises
    ------
    DataError
        As in :func:`evaluate`.

    Examples
    --------
    >>> table = metrics.compat.vcc2026_score(real, cells, n_splits=1)
    >>> "score" in table.columns
    True
    """
    import pandas as pd

    value = evaluate(
        real,
        pred,
        "vcc2026",
        perturbation_key=perturbation_key,
        context_keys=context_keys,
        control=control,
        layer=layer,
        seed=seed,
    )
    keys = Keys.resolve(pred, perturbation_key, context_keys, control)
    sample = read_samples({"real": real}, keys, layer=layer)["real"]
    perturbed = [key for key in sample.groups if key[-1] != keys.control]
    sizes = [len(sample.rows(key)) for key in perturbed]
    counts, codes, _ = emit(
        get("perturbed_mean"), Training(sample, keys.control), perturbed, sizes, seed=seed, repeat=True
    )
    base = _by_context(effects.vcc2026)(
        sample, counts_sample([counts], [codes], perturbed, sample.genes), keys.control, seed
    )
    halves = [halve(sample, [seed, split]) for split in range(n_splits)]
    repeat = _by_context(lambda a, b, label: effects.vcc2026(a, b, label, own_controls=True))
    replicates = [row for a, b in halves for row in repeat(a, b, keys.control, seed)]
    out = pd.DataFrame(
        {
            "value": value.groupby(["metric", "context"])["value"].mean().groupby("metric").mean(),
            "baseline": _mean_rows(base),
            "replicate": _mean_rows(replicates),
        }
    ).loc[list(SCORED_2026)]
    out["score"] = (out["value"] - out["baseline"]) / (out["replicate"] - out["baseline"])
    for name, (low, high) in SCORED_2026.items():
        out.loc[name, "score"] = np.clip(out.loc[name, "score"], low, high)
    return out


def _mean_rows(rows: Rows) -> Any:
    """Average over conditions, then contexts."""
    import pandas as pd

    frame = pd.DataFrame([(key[:-1], name, value) for key, name, value in rows], columns=["context", "metric", "value"])
    return frame.groupby(["metric", "context"])["value"].mean().groupby("metric").mean()


def _cfgen(real: Sample, pred: Sample, control: str, seed: int) -> Rows:
    """Distances on 30 components of the scored real cells, conditions with more than one cell."""
    projection = fit_projection(real.values, min(CFGEN_COMPONENTS, min(real.values.shape) - 1))
    sides = [projection.apply(side.values) for side in (real, pred)]
    rows: Rows = []
    for key in real.groups:
        a, b = (side[sample.rows(key)] for side, sample in zip(sides, (real, pred), strict=True))
        if min(len(a), len(b)) < 2:
            continue
        rng = np.random.default_rng([seed, *"/".join(key).encode()])
        n = min(len(a), len(b))
        x, y = (side[rng.permutation(len(side))[:n]] for side in (a, b))
        rows += [
            (key, "1-Wasserstein", wasserstein(a, b, p=1)),
            (key, "2-Wasserstein", wasserstein(a, b, p=2)),
            (key, "RBF_MMD", len(CFGEN_SCALES) * mmd2(x, y, bandwidth=1.0, scales=CFGEN_SCALES, biased=True)),
        ]
    return rows


def _scldm(real: Sample, pred: Sample, control: str, seed: int) -> Rows:
    """Moments and MMD in gene space; predicted cells divided by the library sizes of real ones."""
    rows: Rows = []
    for key in real.groups:
        a, b = (dense(side.counts[side.rows(key)]) for side in (real, pred))  # type: ignore[index]
        n = min(len(a), len(b))
        if n < 2:
            continue
        a, b = a[:n], b[:n]
        library = np.maximum(a.sum(axis=1, keepdims=True), 1.0)
        (mean, variance), (pred_mean, pred_variance) = (moments(np.log1p(1e4 * side / library)) for side in (a, b))
        rows += [
            (key, "r2_mean", float(r2(mean, pred_mean))),
            (key, "r2_var", float(r2(variance, pred_variance))),
            # exp(-|x - y|^2) on counts: sigma^2 = 1/2
            (key, "mmd_rbf", mmd2(a, b, bandwidth=float(np.sqrt(0.5)), biased=True)),
        ]
    return rows


def _by_context(measure: Callable[[Sample, Sample, str], Rows]) -> Callable[[Sample, Sample, str, int], Rows]:
    """Measure each context by itself: these packages know none."""

    def run(real: Sample, pred: Sample, control: str, seed: int) -> Rows:
        rows: Rows = []
        for context in sorted({key[:-1] for key in real.groups if key[-1] != control}):
            own = [key for key in real.groups if key[:-1] == context]
            if (*context, control) not in own:
                raise DataError(f"no real control cells ({control!r}) in context {context}")
            there = [key for key in pred.groups if key[:-1] == context]
            rows += measure(real.select(own), pred.select(there), control)
        return rows

    return run


def _median_normalised(side: Sample) -> Sample:
    """Normalise to the median total of the side; log-normalised values stay as they are."""
    counts = side.counts
    if counts is None:
        return side
    totals = np.asarray(counts.sum(axis=1)).ravel()
    values = log_normalize(counts, target_sum=float(np.median(totals[totals > 0])))
    return Sample(counts, values, side.codes, side.keys, side.genes)


def _cell_eval(real: Sample, pred: Sample, control: str) -> Rows:
    if not any(key[-1] == control for key in pred.groups):
        raise DataError("cell_eval_v1 takes predicted effects against predicted controls: add control cells to pred=")
    return effects.cell_eval_v1(_median_normalised(real), _median_normalised(pred), control)


CONVENTIONS: Mapping[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(
            "scldm",
            "scldm, metrics wired into training",
            "the kernel exp(-|x-y|^2) on counts is 1 on the diagonal and 0 elsewhere, so the MMD is 1/n + 1/m whatever "
            "the cells are; predicted cells are divided by the library sizes of real ones. Their Sinkhorn distance "
            "underflows to 0 and their Tanimoto term is no kernel; both are left out",
            _scldm,
        ),
        Convention(
            "cfgen",
            "CFGen (theislab), compute_evaluation_metrics",
            "components are fitted on the scored real cells; the MMD is a biased sum over five fixed bandwidths (0 to "
            "10), of which three see nothing but the number of cells",
            _cfgen,
            takes_lognorm=True,
        ),
        Convention(
            "cell_eval_v1",
            "cell-eval 0.8.2",
            "each side against its own controls; normalised to its own median; every gene counts, the target too; fold "
            "changes without pseudocount, so genes absent on one side come first",
            _by_context(_cell_eval),
            takes_lognorm=True,
        ),
        Convention(
            "vcc2026",
            "cell-eval2 0.20.0, preset vcc2026",
            "real controls on both sides; targets of the panel left out; raw values, not scaled to baseline and "
            "replicate: vcc2026_score does that",
            _by_context(effects.vcc2026),
        ),
    )
}
"""All conventions by name."""

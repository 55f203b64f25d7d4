"""One tidy table: every metric of every condition beside its floor, its ceiling and the baselines."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics import baselines as simple
from scldm_cd4.metrics.baselines.training import Training
from scldm_cd4.metrics.cells.pseudobulk import Key
from scldm_cd4.metrics.cells.samples import InputType, Keys, Sample
from scldm_cd4.metrics.registry import METRICS, resolve
from scldm_cd4.metrics.scoring.ceilings import Repeats, counts_sample
from scldm_cd4.metrics.scoring.setting import NotScored, read_scored
from scldm_cd4.metrics.scoring.truth import MIN_GENES, Truth

PROFILE_BASELINES: Mapping[str, tuple[str, ...]] = {
    "minimal": ("control", "additive"),
    "paper": ("control", "perturbed_mean", "additive", "two_way", "nearest_context", "real_other_context"),
    "distribution": ("control", "additive", "real_other_context"),
    "full": tuple(simple.BASELINES),
}
"""Baselines that stand in a table by the name of the profile."""
FEW_CONTROLS = 20
"""Control cells of a context below which a note says so."""
COLUMNS = ("context", "perturbation", "metric", "value", "n_real", "n_pred", "n_ctrl", "floor", "ceiling")


def evaluate(
    real: Any,
    pred: Any,
    *,
    train: Any = None,
    perturbation_key: str | None = None,
    context_keys: str | Sequence[str] | None = None,
    control: str | None = None,
    profile: str | Iterable[str] = "paper",
    baselines: Sequence[str] | None = None,
    ceilings: bool = True,
    n_repeats: int = 3,
    layer: str | None = None,
    input_type: InputType = "counts",
    size_factor_key: str | None = None,
    genes: Any = "exact",
    target_genes: Mapping[str, str | None] | None = None,
    min_cells: int = 10,
    max_cells: int = 2000,
    n_components: int = 30,
    pca_on: str = "reference",
    allow_missing: bool = False,
    fdr: float = 0.05,
    seed: int = 0,
) -> Any:
    r"""Score generated cells, of any model, against real cells of the same conditions.

    Every effect, real and predicted, is taken against the real controls of its own context. Principal components are
    fitted on cells that are not scored. Predicted cells are normalised by their own totals. Rank tests take equal
    numbers of real and predicted cells.

    Parameters
    ----------
    real
        AnnData of real cells that the model has not seen, with the controls of their contexts. A context without
        controls here takes a seeded half of the training controls; baselines then see only the other half.
    pred
        AnnData of predicted cells. Predicted control cells are not used.
    train
        AnnData of the cells that the model was trained on: fits the principal components and is all that baselines
        see. Without it a seeded half of ``real`` fits the components and is not scored, and baselines are NaN.
    perturbation_key, context_keys, control
        Columns of ``obs`` and the label of the control; from ``pred.uns["scldm_cd4"]`` by default.
    profile
        ``minimal``, ``paper``, ``distribution`` or ``full``, or a list of metrics
        (:data:`scldm_cd4.metrics.registry.METRICS`).
    baselines
        Names of :data:`scldm_cd4.metrics.baselines.BASELINES`; by default those of the profile.
    ceilings
        Whether to compute what a repeat of the experiment reaches.
    n_repeats
        Random halvings that the ceilings are averaged over.
    layer
        Layer with the values, of those of the three that have it. The others, such as generated cells, and all by
        default: counts where ``setup_anndata`` declared them (so are the names of the genes), else ``X``.
    input_type
        ``counts``, or ``lognorm`` for log-normalised values on all sides (no baselines then, and mean of logarithms
        wherever the logarithm of summed counts is the default).
    size_factor_key
        Column of ``obs`` with the totals to normalise by on all sides, instead of the totals on the given genes.
    genes
        ``exact``, ``intersection``, or the names of the genes to score.
    target_genes
        Gene name of each perturbation (None: no gene), left out of effects and rank tests; the label by default. Where
        it is not among the genes, ``note`` says so.
    min_cells
        Cells of a condition on either side below which all its values are NaN.
    max_cells
        Cells of a condition that W1, W2 and neighbour metrics take.
    n_components
        Principal components (fewer where there are too few cells).
    pca_on
        ``reference``, or ``scored`` to fit the components on the scored real cells, which flatters nobody reliably.
    allow_missing
        Score the conditions that both sides have, instead of an error where they differ.
    fdr
        Adjusted p below which a gene is significant.
    seed
        Of all draws.

    Returns
    -------
    DataFrame with one row per condition and metric: ``context``, the context columns, ``perturbation``, ``metric``,
    ``value``, ``n_real``, ``n_pred``, ``n_ctrl``; ``floor``: what noise alone gives (distances and errors: two halves
    of the real cells; agreement: the chance level); ``baseline_<name>``; ``note``. A repeat of the experiment needs
    two samples of real cells, so ``ceiling`` and ``ceiling_interpolated`` are at half the cells, with separate halves
    of the controls; ``matched_value`` and ``matched_baseline_<name>`` are the prediction and the baselines in just
    that place. Set ``ceiling`` against these, not against ``value``. ``attrs`` says how the table was made.

    Raises
    ------
    DataError
        If keys are not known, conditions, genes or kinds of values differ between the sides, a context has no
        controls, or predicted cells are copies of one profile.

    Examples
    --------
    >>> table = metrics.evaluate(
    ...     real, cells, train=train, profile=["pearson_delta", "energy_distance"], baselines=["additive"], min_cells=5
    ... )
    >>> sorted(table["metric"].unique())
    ['energy_distance', 'pearson_delta']
    """
    metrics = resolve(profile)
    names = _baseline_names(profile, baselines, train, input_type)
    keys = Keys.resolve(pred, perturbation_key, context_keys, control)
    sides = {"real": real, "pred": pred} | ({} if train is None else {"train": train})
    truth, sample, setting, not_scored = read_scored(
        sides,
        keys,
        genes=genes,
        target_genes=target_genes,
        min_cells=min_cells,
        n_components=n_components,
        pca_on=pca_on,
        allow_missing=allow_missing,
        fdr=fdr,
        seed=seed,
        metrics=metrics,
        max_cells=max_cells,
        layer=layer,
        input_type=input_type,
        size_factor_key=size_factor_key,
    )
    _warn_of_targets(truth, target_genes)
    training = None
    if setting.train is not None and input_type == "counts" and (names or ceilings):
        training = Training(setting.train, keys.control)
    fitted_on, extra_notes = setting.fitted_on, setting.notes
    del setting  # copies of the scored cells are all that is needed from here
    found = _Found(truth, sample, training, n_repeats if ceilings else 0)
    _warn_of_copies(found)
    for name in names:
        found.add_baseline(name)
    table = _table(found, keys, extra_notes, not_scored)
    table.attrs = _describe(truth, keys, names) | {
        "profile": profile if isinstance(profile, str) else list(metrics),
        "genes_left_out": {what: int(adata.n_vars - len(truth.real.genes)) for what, adata in sides.items()},
        "components_fitted_on": fitted_on,
        "input_type": input_type,
        "n_repeats": n_repeats if ceilings else 0,
        "min_cells": min_cells,
        "n_conditions": {"scored": len(truth.keys), "not_scored": len(not_scored)},
    }
    return table


def _describe(truth: Truth, keys: Keys, names: Sequence[str]) -> dict[str, Any]:
    """Say how a table was made."""
    return {
        "metrics": "scldm_cd4",
        "perturbation_key": keys.perturbation,
        "context_keys": list(keys.context),
        "control": keys.control,
        "n_genes": len(truth.real.genes),
        "n_components": len(truth.reference.projection.components),
        "baselines": list(names),
        "fdr": truth.options.fdr,
        "seed": truth.options.seed,
        "targets_left_out": int(truth.exclude.any(axis=1).sum()),
    }


class _Found:
    """All that was computed for the scored conditions; cells of baselines are kept only while they are scored."""

    def __init__(self, truth: Truth, pred: Sample, training: Training | None, n_repeats: int) -> None:
        self.truth, self.training = truth, training
        self.values = truth.compare(pred)
        self.baselines: dict[str, dict[str, np.ndarray]] = {}
        self.notes: dict[str, list[str]] = {}
        self.matched: dict[str, dict[str, np.ndarray]] = {}
        self.ceilings: dict[str, dict[str, np.ndarray]] = {}
        self.repeats = Repeats(truth, n_repeats=n_repeats, seed=truth.options.seed) if n_repeats else None
        if self.repeats is not None:
            self.ceilings["ceiling"] = self.repeats.duplicate()
            if training is not None:
                self.ceilings["ceiling_interpolated"] = self.repeats.interpolated(training)
            self.matched["value"] = self.repeats.score(pred)

    def add_baseline(self, name: str) -> None:
        """Score a baseline at as many cells as were predicted."""
        keys, seed = self.truth.keys, self.truth.options.seed
        self.baselines[name], self.notes[name] = {}, ["no training cells"] * len(keys)
        if self.training is None:
            return
        sizes = [int(n) for n in self.values["n_pred"]]
        counts, codes, self.notes[name] = simple.emit(simple.get(name), self.training, keys, sizes, seed=seed)
        sample = counts_sample([counts], [codes], keys, self.truth.real.genes)
        self.baselines[name] = self.truth.compare(sample)
        if self.repeats is not None:
            self.matched[f"baseline_{name}"] = self.repeats.score(sample)


def _baseline_names(profile: Any, given: Sequence[str] | None, train: Any, input_type: str) -> tuple[str, ...]:
    """Check the names of baselines; those of the profile by default."""
    if given is None:
        given = PROFILE_BASELINES[profile if isinstance(profile, str) else "minimal"]
    elif given and train is None:
        raise DataError("baselines see training cells only: pass train=, or baselines=[]")
    elif given and input_type != "counts":
        raise DataError("baselines emit counts: they need input_type='counts' on all sides, or baselines=[]")
    return tuple(simple.get(name).name for name in dict.fromkeys(given))


def _warn_of_targets(truth: Truth, named: Mapping[str, str | None] | None) -> None:
    """Say where targets stay in the scores of some perturbations only."""
    have, named = set(truth.real.genes), named or {}
    labels = {key[-1] for key in truth.keys}
    lost = sorted(label for label in labels if label not in named and label not in have)
    lost += sorted(f"{label} ({named[label]})" for label in labels if named.get(label) and named[label] not in have)
    if lost and len(lost) < len(labels):
        warnings.warn(
            f"the targets of {len(lost)} of {len(labels)} perturbations are not among the genes (e.g. {lost[:3]}); "
            "those of the others are left out of effects. If they go by other names, give target_genes={label: gene}; "
            "{label: None} says that there is none",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_copies(found: _Found) -> None:
    """Say where predicted cells are real ones."""
    if n_shared := int(np.nansum(found.values.get("n_shared", 0))):
        warnings.warn(
            f"{n_shared} predicted cells equal a real cell of their condition: neighbour metrics and distances mean "
            "nothing for copies of the scored cells",
            UserWarning,
            stacklevel=3,
        )


def _table(found: _Found, keys: Keys, notes: Mapping[Key, str], not_scored: NotScored) -> Any:
    """Put everything into one row per condition and metric."""
    import pandas as pd

    truth, metrics = found.truth, found.truth.options.metrics
    n_metrics, n_real = len(metrics), truth.real.sizes()
    n_control = truth.controls.bulks.n[truth.controls.rows(truth.keys)] if truth.keys else np.empty(0)
    all_keys = [*truth.keys, *not_scored]
    sizes = [
        *zip(n_real, found.values["n_pred"], n_control, strict=True),
        *((*n[:2], np.nan) for n in not_scored.values()),
    ]
    columns: dict[str, Any] = {"context": np.repeat([" | ".join(key[:-1]) or "all" for key in all_keys], n_metrics)}
    for i, name in enumerate(keys.context):
        column = name if name not in (*COLUMNS, "note") else f"obs_{name}"
        columns[column] = np.repeat([key[i] for key in all_keys], n_metrics)
    columns["perturbation"] = np.repeat([key[-1] for key in all_keys], n_metrics)
    columns["metric"] = np.tile(np.array(metrics, dtype=object), len(all_keys))
    n_rest = len(not_scored)

    def flat(values: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = [values.get(name, np.full(len(truth.keys), np.nan)) for name in metrics]
        return np.concatenate([np.stack(rows, axis=1).ravel(), np.full(n_rest * n_metrics, np.nan)])

    columns["value"] = flat(found.values)
    for position, name in enumerate(("n_real", "n_pred", "n_ctrl")):
        columns[name] = np.repeat([size[position] for size in sizes], n_metrics)
    columns["floor"] = flat({name: _floor(found, name) for name in metrics})
    columns |= {name: flat(found.ceilings.get(name, {})) for name in ("ceiling", *found.ceilings)}
    for name, values in found.baselines.items():
        columns[f"baseline_{name}"] = flat(values)
    for name, values in found.matched.items():
        columns[f"matched_{name}"] = flat(values)
    columns["note"] = [
        *(note for row, key in enumerate(truth.keys) for note in _notes(found, row, notes.get(key, ""))),
        *(n[2] for n in not_scored.values() for _ in metrics),
    ]
    return pd.DataFrame(columns)


def _floor(found: _Found, name: str) -> np.ndarray:
    """Give what noise alone gives: a repeat for distances and errors, the chance level for agreement."""
    metric, missing = METRICS[name], np.full(len(found.truth.keys), np.nan)
    if metric.floor == "repeat":
        return found.ceilings.get("ceiling", {}).get(name, missing)
    if metric.chance is None:
        return missing
    return (
        found.values.get(metric.chance, missing)
        if isinstance(metric.chance, str)
        else np.full_like(missing, metric.chance)
    )


def _notes(found: _Found, row: int, common: str) -> Iterable[str]:
    """Say what a reader must know of each value of a condition."""
    truth, n_pred = found.truth, int(found.values["n_pred"][row])
    n_real = int(truth.real.sizes()[row])
    shared = found.values.get("n_shared", np.zeros(len(truth.keys)))[row]
    n_control = int(truth.controls.bulks.n[truth.controls.rows([truth.keys[row]])[0]])
    few = f"only {n_control} control cells" if n_control < FEW_CONTROLS else ""
    for name in truth.options.metrics:
        metric, value = METRICS[name], found.values.get(name, np.full(len(truth.keys), np.nan))[row]
        parts = [common] if common else []
        if few and metric.family in ("effect", "discrimination", "de"):
            parts.append(few)
        if metric.family in ("effect", "discrimination", "de") and not truth.finds_target(row):
            parts.append("its target is not among the genes, so not left out")
        if metric.family == "discrimination" and truth.scope == "own":
            parts.append(f"targets of other conditions not left out: fewer than {MIN_GENES} genes are no target")
        if metric.family == "distribution" and shared > 0:
            parts.append(f"{int(shared)} predicted cells equal a real cell")
        if min(n_real, n_pred) < metric.min_cells:
            parts.append(f"wants {metric.min_cells} cells on each side")
        if metric.family == "de" and n_real != n_pred:
            parts.append(f"tested at {min(n_real, n_pred)} cells")
        if max(n_real, n_pred) > truth.options.max_cells and metric.space == "pcs":
            parts.append(f"at most {truth.options.max_cells} cells drawn")
        if np.isnan(value):
            parts.append(_why_undefined(found, row, name))
        parts.extend(_baseline_notes(found, row))
        yield "; ".join(parts)


def _baseline_notes(found: _Found, row: int) -> list[str]:
    """Say which baselines are missing or small, equal reasons together."""
    reasons: dict[str, list[str]] = {}
    for name, notes in found.notes.items():
        if notes[row]:
            reasons.setdefault(notes[row], []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _why_undefined(found: _Found, row: int, name: str) -> str:
    """Give the reason why a value is NaN."""
    truth, metric = found.truth, METRICS[name]
    if metric.family == "de":
        n = found.values.get("de_prevalence", np.ones(len(truth.keys)))[row]
        return "no significant gene in the real cells" if n == 0 else "undefined: too few significant genes"
    if metric.family == "discrimination":
        return "undefined: the only perturbation of its context"
    if name in ("pearson_delta_pert", "memorisation") and truth.reference.bulks is None:
        return "undefined: no training cells"
    if name == "pearson_delta_pert":
        return "undefined: no training perturbation in the context, or no predicted difference to their mean"
    return "undefined: no variation, or too few cells"

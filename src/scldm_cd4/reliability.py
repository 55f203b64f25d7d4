"""How far to believe a prediction: its expected Pearson-delta, learned on conditions held out of training.

It is told from what is known before anything is measured: how large the predicted effect is, how well it agrees with
the prediction in contexts where the perturbation was trained, and on how many cells it was trained (`calibration`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scldm_cd4._errors import DataError
from scldm_cd4.calibration import FEATURES, Calibration, calibrate
from scldm_cd4.conditions import DEFAULT_N_CELLS, as_n_cells, requested_levels, resolve_requests
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.labels import read_labels
from scldm_cd4.metrics import safe_pearson
from scldm_cd4.noise import stream
from scldm_cd4.output import evidence
from scldm_cd4.ranking.effects import MIN_OBSERVED, Context, Generated, Observed, target_genes
from scldm_cd4.ranking.evidence import MIN_CONDITIONS, held_out_conditions
from scldm_cd4.ranking.sources import generated_effects
from scldm_cd4.ranking.targets import MIN_CELLS
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import Sampling, role_columns

MAX_CONTEXTS = 3
"""Contexts in which the perturbation was trained that a prediction is compared with."""
MAX_CONDITIONS = 100
"""Validation conditions that are looked at: a seeded sample of more, which four numbers do not need."""
FIT_SEED = 0
"""With which `reliability` learns by itself, so that what is learned does not depend on the call that came first."""
UNKNOWN = (
    "which conditions this model was trained on is not known (it was imported without numbers of training cells), so "
    "nothing can be learned on conditions that were held out"
)
Array = NDArray[np.float64]
Condition = tuple[str, Context]


def predicted_features(
    generated: Generated, registry: Registry, wanted: Sequence[Condition], n_cells: int
) -> Iterator[tuple[Condition, Array, Array]]:
    """Yield each condition with its predicted effect (genes,) and its features (3,), perturbation by perturbation.

    The perturbed gene has no part. Agreement is NaN for a perturbation without training cells elsewhere.
    """
    elsewhere = {name: _trained_contexts(registry, name) for name, _ in wanted}
    contexts = dict.fromkeys(c for name, context in wanted for c in (context, *elsewhere[name]))
    controls = generated.controls(list(contexts), n_cells)
    for name in dict.fromkeys(name for name, _ in wanted):
        asked = [context for other, context in wanted if other == name]
        needed = {c: controls[c] for c in dict.fromkeys([*asked, *elsewhere[name]])}
        keep = ~target_genes(registry, name)
        deltas = {c: x.delta[0] * keep for c, x in next(generated.changes([name], needed, n_cells)).items()}
        total = evidence(registry, (None, None, name))[0] if registry.train_counts else np.nan
        for context in asked:
            others = [deltas[c] for c in elsewhere[name] if c != context]
            agreement = safe_pearson(deltas[context][keep], np.mean(others, axis=0)[keep]) if others else np.nan
            size = np.sqrt(np.mean(np.square(deltas[context][keep])))
            yield (name, context), deltas[context], np.array([np.log(size + 1e-3), agreement, np.log1p(total)])


def _trained_contexts(registry: Registry, name: str) -> list[Context]:
    """Return the contexts with most training cells of a perturbation."""
    numbers = {(d, t): n for d, by_time in registry.train_counts.get(name, {}).items() for t, n in by_time.items() if n}
    return sorted(numbers, key=lambda context: (-numbers[context], context))[:MAX_CONTEXTS]


def fit_reliability(self: Any, adata: Any = None, *, n_cells: int = 100, seed: int | None = None) -> pd.DataFrame:
    """Learn from conditions held out of training how far predictions of other such conditions are to be believed.

    At most 100 conditions are looked at. What is learned stays with the model, also when it is saved. `reliability`
    calls this with 100 cells and seed 0, whatever its own, where nothing was learned before and the cells of the model
    hold such conditions.

    Parameters
    ----------
    adata
        Cells that hold conditions without training cells, and the controls of their contexts, at least ten cells of
        each; None takes those that the model was built with, some held out by ``train(split={"conditions": ...})``.
        Conditions that a choice of settings was made on make predictions look better than they are.
    n_cells
        Cells to generate per condition, at least 20.
    seed
        Of the generated cells.

    Returns
    -------
    One row per validation condition: labels, ``n_cells`` observed, ``effect_size``, ``agreement`` and
    ``n_train_cells_perturbation`` (see `reliability`), the observed ``pearson_delta``, and ``expected_pearson_delta``,
    ``expected_lo`` and ``expected_hi`` as learned without the perturbation of the row. ``attrs`` holds the errors of
    these, beside that of the mean alone, and ``n_cells`` and ``seed`` of the generated cells.

    Raises
    ------
    NotTrainedError
        A stage is not trained.
    DataError
        There are fewer than ten such conditions, the model does not know which it was trained on, no control was
        declared, or the cells or `n_cells` cannot be used.

    Examples
    --------
    >>> model.fit_reliability(seed=0)  # this model held out three conditions
    Traceback (most recent call last):
    scldm_cd4._errors.DataError: 3 validation conditions ...
    """
    n_cells = _checked(n_cells)
    registry, generated, sampling = _source(self, seed)
    cells = self._adata(adata)
    wanted = _validation_conditions(cells, registry, sampling.seed)
    found = _observe(
        generated,
        Observed(CellData.from_adata(cells, registry, rows=_known(cells, registry)), registry),
        wanted,
        n_cells,
    )
    if len(found) < MIN_CONDITIONS:
        raise DataError(_too_few(len(found)))
    features, r, n = np.array([f for _, f, _, _ in found]), *np.array([[r, n] for *_, r, n in found]).T
    conditions = [condition for condition, *_ in found]
    calibration, left_out = calibrate(features, r, [name for name, _ in conditions], n)
    calibration = replace(calibration, facts=calibration.facts | {"n_cells": n_cells, "seed": sampling.seed})
    self._state.record["reliability"] = calibration.to_dict()
    table = _labels(registry, conditions)
    table["n_cells"] = n.astype(np.int64)
    table = pd.concat([table, _shown(features)], axis=1)
    table["pearson_delta"] = r
    table[["expected_pearson_delta", "expected_lo", "expected_hi"]] = left_out
    table.attrs = dict(calibration.facts)
    return table


def reliability(
    self: Any,
    perturbation: Any = None,
    donor: Any = None,
    timepoint: Any = None,
    *,
    conditions: pd.DataFrame | None = None,
    n_cells: int = 100,
    seed: int | None = None,
) -> pd.DataFrame:
    """Say how far predictions of conditions are to be believed, before anything is measured.

    Parameters
    ----------
    perturbation, donor, timepoint, conditions
        As for `generate`; None takes all levels, without the control.
    n_cells
        Cells to generate per condition, at least 20, and in up to three contexts in which its perturbation was trained.
    seed
        Of the generated cells.

    Returns
    -------
    One row per condition: labels; ``n_train_cells`` of the condition, ``n_train_cells_perturbation`` and
    ``n_train_contexts`` of its perturbation, NaN where they are not known, as in an imported checkpoint;
    ``effect_size``, the root mean square over genes of the predicted difference of log1p(counts per 10,000) from the
    control; ``agreement``, the Pearson correlation of the predicted effect with the mean of those predicted where the
    perturbation was trained; ``expected_pearson_delta`` with a 90 % interval ``expected_lo``, ``expected_hi``: the
    Pearson correlation with the effect in as many real cells as the validation conditions had, each effect against its
    own controls; and ``note``, which says why a figure is missing. ``attrs`` says from how many conditions it was
    learned, with which ``n_cells`` and ``seed``, and how well left-out perturbations were predicted.

    Raises
    ------
    NotTrainedError
        A stage is not trained.
    UnknownCategoryError
        A label is unknown or was never trained.
    DataError
        No control was declared, or `n_cells` is no whole number of at least 20.

    Examples
    --------
    >>> table = model.reliability("GATA3", donor="CE0008162", n_cells=20, seed=0)
    >>> bool(table["expected_pearson_delta"].isna().all())  # too few conditions were held out, as the note says
    True
    """
    n_cells = _checked(n_cells)
    registry, generated, _ = _source(self, seed)
    if conditions is None and perturbation is None:
        perturbation = [x for x in requested_levels(registry, "perturbation", None) if x != registry.control]
    labels = {"perturbation": perturbation, "donor": donor, "timepoint": timepoint}
    requests = resolve_requests(registry, conditions=conditions, **labels)
    asked = [(str(p), (str(d), str(t))) for d, t, p in dict.fromkeys(request.labels for request in requests)]
    calibration, reason = _calibration(self)
    wanted = [condition for condition in asked if condition[0] != registry.control]
    features = {key: values for key, _, values in predicted_features(generated, registry, wanted, n_cells)}
    values = np.array([features.get(key, np.full(len(FEATURES), np.nan)) for key in asked])
    table = _labels(registry, asked)
    is_known = bool(registry.train_counts)
    table["n_train_cells"] = [registry.n_train(name, *c) if is_known else np.nan for name, c in asked]
    table["n_train_contexts"] = [registry.n_train_contexts(name) if is_known else np.nan for name, _ in asked]
    table = pd.concat([table, _shown(values)], axis=1)
    expected = np.full((len(asked), 3), np.nan) if calibration is None else calibration.predict(values)
    table[["expected_pearson_delta", "expected_lo", "expected_hi"]] = expected
    table["note"] = [_note(registry, key, x, reason) for key, x in zip(asked, values, strict=True)]
    table.attrs = {} if calibration is None else dict(calibration.facts)
    return table


def _checked(n_cells: Any) -> int:
    if (n := as_n_cells(n_cells)) < MIN_CELLS:
        raise DataError(f"n_cells must be at least {MIN_CELLS} for an effect, got {n}")
    return n


def _source(self: Any, seed: int | None) -> tuple[Registry, Generated, Sampling]:
    """Return effects from generated cells that share noise with their control."""
    trained, sampling = self._trained(), self._sampling(seed=seed)
    registry: Registry = trained.registry
    if registry.control is None:
        raise DataError("no control was declared, so there are no effects: setup_anndata(..., control=...)")
    return registry, generated_effects(trained, sampling), sampling


def _validation_conditions(adata: Any, registry: Registry, seed: int) -> list[Condition]:
    if not registry.train_counts:
        raise DataError(UNKNOWN)
    names = [x for x in requested_levels(registry, "perturbation", None) if x != registry.control]
    roles = [requested_levels(registry, role, None) for role in ("donor", "timepoint")]
    contexts = [(d, t) for d in roles[0] for t in roles[1]]
    found = held_out_conditions(adata, registry, names, contexts, seed)
    if len(found) <= MAX_CONDITIONS:
        return found
    chosen = stream(seed, ("validation",), 0, "reliability").choice(len(found), MAX_CONDITIONS, replace=False)
    return [found[i] for i in np.sort(chosen)]


def _known(adata: Any, registry: Registry) -> NDArray[np.int64]:
    """Return the rows of the cells with labels that the model knows."""
    keep = np.ones(adata.n_obs, dtype=bool)
    for attribute in registry.attributes:
        if attribute.column is not None:
            codes, levels = read_labels(adata.obs, attribute.column, f"{attribute.role}_key")
            keep &= np.isin(np.array(levels, dtype=object), attribute.levels)[codes]
    return np.flatnonzero(keep)


def _observe(
    generated: Generated, observed: Observed, wanted: Sequence[Condition], n_cells: int
) -> list[tuple[Condition, Array, float, int]]:
    """Return each condition with features, Pearson-delta and observed cells; one that has no control is left out."""
    controls = observed.controls(list(dict.fromkeys(context for _, context in wanted)), n_cells)
    out = []
    usable = [(name, context) for name, context in wanted if context in controls]
    for (name, context), delta, features in predicted_features(generated, observed.registry, usable, n_cells):
        seen = next(observed.changes([name], {context: controls[context]}, n_cells)).get(context)
        if seen is None or not np.isfinite(features).all():
            continue
        keep = ~target_genes(observed.registry, name)
        r = safe_pearson(delta[keep], seen.delta[0][keep])
        if np.isfinite(r):
            out.append(((name, context), features, r, seen.n_cells))
    return out


def _calibration(self: Any) -> tuple[Calibration | None, str]:
    """Return what was learned, if need be now, or why there is nothing."""
    if "reliability" not in self._state.record:
        registry = self._state.registry
        if not registry.train_counts:
            return None, UNKNOWN
        if self.adata is None:
            return None, (
                "nothing was learned on validation conditions, and the model has no cells: call fit_reliability(adata) "
                "with conditions that training did not see"
            )
        n = len(_validation_conditions(self.adata, registry, FIT_SEED))
        if n < MIN_CONDITIONS:
            return None, _too_few(n)
        try:
            self.fit_reliability(n_cells=DEFAULT_N_CELLS, seed=FIT_SEED)
        except DataError as error:
            return None, str(error)
    return Calibration.from_dict(self._state.record["reliability"]), ""


def _too_few(n: int) -> str:
    return (
        f"{n} validation conditions (no training cells, at least {MIN_OBSERVED} observed cells and controls); "
        f"{MIN_CONDITIONS} are needed: hold some out with train(split={{'conditions': ...}})"
    )


def _note(registry: Registry, condition: Condition, features: Array, reason: str) -> str:
    name, context = condition
    if name == registry.control:
        return "the control has no effect"
    if reason:
        return reason
    if np.isnan(features).any():
        return "the perturbation has training cells in no other context to compare with"
    return "trained on; the figure is that of conditions which were not" if registry.n_train(name, *context) else ""


def _labels(registry: Registry, conditions: Sequence[Condition]) -> pd.DataFrame:
    columns = role_columns(registry)
    parts = {"donor": [c[0] for _, c in conditions], "timepoint": [c[1] for _, c in conditions]}
    parts["perturbation"] = [name for name, _ in conditions]
    return pd.DataFrame({columns[role]: values for role, values in parts.items() if role in columns})


def _shown(features: Array) -> pd.DataFrame:
    size, agreement, cells = features.T
    return pd.DataFrame(
        {
            "n_train_cells_perturbation": np.round(np.expm1(cells)),
            "effect_size": np.exp(size) - 1e-3,
            "agreement": agreement,
        }
    )

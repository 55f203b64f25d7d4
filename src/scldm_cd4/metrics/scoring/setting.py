"""Which cells are scored, serve as controls, fit the components, and are seen by baselines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.projection import fit_projection
from scldm_cd4.metrics.cells.pseudobulk import Key
from scldm_cd4.metrics.cells.samples import Keys, Sample, join, read_samples
from scldm_cd4.metrics.scoring.truth import Controls, Options, Reference, Truth, draw, halve

MAX_FITTED = 10_000
"""Reference cells that the principal components are fitted on, drawn where there are more."""


@dataclass(frozen=True)
class Setting:
    """The parts that cells play.

    Attributes
    ----------
    real
        Real cells that may be scored.
    controls
        Real control cells of every context.
    train
        What baselines see; None without training cells.
    fitted, fitted_on
        What the components are fitted on, and in words.
    notes
        What to say of conditions.
    """

    real: Sample
    controls: Sample
    train: Sample | None
    fitted: Sample
    fitted_on: str
    notes: dict[Key, str]


NotScored = dict[Key, tuple[int, int, str]]
"""Numbers of real and predicted cells of conditions, with the reason."""


def read_scored(
    sides: Mapping[str, Any],
    keys: Keys,
    *,
    genes: Any,
    target_genes: Mapping[str, str | None] | None,
    min_cells: int,
    n_components: int,
    pca_on: str,
    allow_missing: bool,
    fdr: float,
    seed: int,
    metrics: tuple[str, ...] = (),
    max_cells: int = 1,
    **reading: Any,
) -> tuple[Truth, Sample, Setting, NotScored]:
    """Read the cells, give each its part and choose the conditions.

    Parameters
    ----------
    sides
        AnnData ``real``, ``pred`` and perhaps ``train``.
    keys
        Columns and control.
    metrics
        What is to be computed.
    genes, target_genes, min_cells, n_components, pca_on, allow_missing, fdr, seed, max_cells
        As in :func:`scldm_cd4.metrics.evaluate`.
    reading
        ``layer``, ``input_type``, ``size_factor_key``, likewise.

    Returns
    -------
    The real and the predicted cells of the scored conditions, the parts of all cells, and what is not scored.

    Raises
    ------
    DataError
        If they cannot be scored.
    """
    read = read_samples(sides, keys, genes, **reading)
    setting = settle(read, keys.control, pca_on, seed)
    scored, not_scored = choose_conditions(setting.real, read["pred"], keys.control, min_cells, allow_missing)
    targets = {label: gene or "" for label, gene in (target_genes or {}).items()}  # "" is no gene
    reference = fit_reference(setting, n_components, seed)
    controls = setting.controls.select([(*c, keys.control) for c in sorted({key[:-1] for key in scored})])
    options = Options(metrics, targets, fdr, max_cells, seed)
    truth = Truth(setting.real.select(scored), Controls(controls, keys.control), reference, options)
    return truth, read["pred"].select(scored), setting, not_scored


def settle(read: Mapping[str, Sample], control: str, pca_on: str, seed: int) -> Setting:
    """Give every cell its part.

    Parameters
    ----------
    read
        ``real``, ``pred`` and perhaps ``train``.
    control
        Label of the control.
    pca_on
        ``reference`` or ``scored``.
    seed
        Of the halves.

    Returns
    -------
    The parts.

    Raises
    ------
    DataError
        If ``pca_on`` is unknown, or a context has no real control.
    """
    if pca_on not in ("reference", "scored"):
        raise DataError(f"pca_on={pca_on!r} is not known; use 'reference' or 'scored'")
    real, train = read["real"], read.get("train")
    if pca_on == "scored":
        fitted, fitted_on = real, "the scored real cells"
    elif train is None:
        real, fitted = halve(real, [seed, 1])
        fitted_on = "a seeded half of the real cells, which is not scored"
    else:
        fitted, fitted_on = train, "the training cells"
    contexts = {key[:-1] for key in real.groups if key[-1] != control}
    have = {key[:-1] for key in real.groups if key[-1] == control}
    controls = real.select([(*context, control) for context in sorted(contexts & have)])
    if not (lacking := sorted(contexts - have)):
        return Setting(real, controls, train, fitted, fitted_on, {})
    wanted = [(*context, control) for context in lacking]
    absent = [key[:-1] for key in wanted if train is None or len(train.rows(key)) < 2]
    if absent or train is None:
        raise DataError(
            f"no real control cells ({control!r}) in {len(absent)} contexts, e.g. {absent[0]}; add them to real= (or "
            "to train=), or drop these contexts"
        )
    first, second = halve(train.select(wanted), [seed, 2])
    controls = join([controls, first]) if controls.n_cells else first
    train = join([train.select([key for key in train.keys if key not in set(wanted)]), second])
    note = "controls: half of the training controls, which baselines do not see"
    notes = {key: note for key in real.groups if key[-1] != control and key[:-1] in set(lacking)}
    return Setting(real, controls, train, fitted, fitted_on, notes)


def choose_conditions(
    real: Sample, pred: Sample, control: str, min_cells: int, allow_missing: bool
) -> tuple[list[Key], NotScored]:
    """Decide which conditions are scored.

    Returns
    -------
    The scored ones, and the numbers of real and predicted cells of the others with the reason.

    Raises
    ------
    DataError
        If the sides have different conditions and ``allow_missing`` is not given, share none, or all are too small.
    """
    here = {key for key in real.groups if key[-1] != control}
    there = {key for key in pred.groups if key[-1] != control}
    if not here & there:
        raise DataError(
            f"no condition is on both sides: {len(here)} real ones (e.g. {_first(here)}), {len(there)} predicted ones "
            f"(e.g. {_first(there)}); check perturbation_key, context_keys and the labels"
        )
    if here != there and not allow_missing:
        raise DataError(
            f"{len(here - there)} real conditions were not predicted (e.g. {_first(here - there)}), "
            f"{len(there - here)} predicted ones have no real cells (e.g. {_first(there - here)}); drop them, or pass "
            "allow_missing=True"
        )
    scored, notes = [], {}
    for key in sorted(here | there):
        sizes = len(real.rows(key)), len(pred.rows(key))
        if min(sizes) >= max(min_cells, 2):
            scored.append(key)
        elif 0 in sizes:
            notes[key] = (*sizes, "not scored: no real cells" if not sizes[0] else "not scored: not predicted")
        else:
            notes[key] = (*sizes, f"not scored: fewer than min_cells={min_cells} cells")
    if not scored:
        most = max(min(n[:2]) for n in notes.values())
        raise DataError(f"no condition has min_cells={min_cells} cells on both sides; at most {most}: lower min_cells")
    return scored, notes


def _first(keys: set[Key]) -> Key | None:
    return min(keys, default=None)


def fit_reference(setting: Setting, n_components: int, seed: int) -> Reference:
    """Fit what is fitted on reference cells."""
    fitted = setting.fitted
    if fitted.n_cells > MAX_FITTED:
        sizes = np.ceil(fitted.sizes() * MAX_FITTED / fitted.n_cells).astype(np.int64)
        fitted = draw(fitted, sizes, seed, 3)
    limit = min(fitted.values.shape) - 1
    projection = fit_projection(fitted.values, min(n_components, limit))
    train = setting.train
    return Reference(
        projection,
        None if train is None else train.pseudobulks(counts=False),
        None if train is None else projection.apply(train.values),
    )

"""Simple predictions that any model should beat. They see training cells only and emit cells with counts.

A model that does not beat :data:`BASELINES` has learnt nothing that these few lines do not know. Means are predicted as
shifts of log(1 + 1e4 share) from the control of the context; cells are then made from the control cells of the context
by thinning and adding counts gene by gene, so they have the zeros and the spread of real cells.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.conditions import as_n_cells
from scldm_cd4.data.labels import as_label
from scldm_cd4.metrics.baselines import shifts
from scldm_cd4.metrics.baselines.counts import draw_rows, emit_counts
from scldm_cd4.metrics.baselines.training import Training
from scldm_cd4.metrics.cells.pseudobulk import Key
from scldm_cd4.metrics.cells.samples import Keys, read_samples

Shift = Callable[[Training, Sequence[Key]], np.ndarray]
Pick = Callable[[Training, Key, np.random.Generator], "tuple[Key, np.ndarray] | None"]

CONTROL_CELLS = "control cells of the context"
CONTEXT = "other perturbations in the context"
ELSEWHERE = "the perturbation in other contexts"
ALL = "all training conditions"
CONDITION = "training cells of the condition itself"


@dataclass(frozen=True)
class Baseline:
    """A simple prediction.

    Attributes
    ----------
    name
        What it is called in tables.
    title
        One line for readers.
    uses
        What of the training cells it may use.
    source
        Where it comes from.
    shift
        Predicts means; cells are made of control cells.
    pick
        Picks real training cells: the condition they come from, and their rows.
    transport
        Whether picked cells are carried to the context by the ratio of the controls.

    Examples
    --------
    >>> metrics.baselines.get("additive").uses[0]
    'control cells of the context'
    """

    name: str
    title: str
    uses: tuple[str, ...]
    source: str
    shift: Shift | None = None
    pick: Pick | None = None
    transport: bool = False


def _shrunk(training: Training, keys: Sequence[Key]) -> np.ndarray:
    return shifts.shrinkage(training) * shifts.additive(training, keys)


def _of_context(training: Training, keys: Sequence[Key]) -> np.ndarray:
    return shifts.averaged(training, keys, "context")


def _of_all(training: Training, keys: Sequence[Key]) -> np.ndarray:
    return shifts.averaged(training, keys, "all")


def _pick_control(training: Training, key: Key, rng: np.random.Generator) -> tuple[Key, np.ndarray] | None:
    control = (*key[:-1], training.control)
    rows = training.sample.rows(control)
    return (control, rows) if len(rows) else None


def _pick_elsewhere(training: Training, key: Key, rng: np.random.Generator) -> tuple[Key, np.ndarray] | None:
    other = training.nearest(key[:-1], training.contexts.get(key[-1], []))
    if other is None:
        return None
    source = (*other, key[-1])
    return source, training.sample.rows(source)


def _pick_copies(training: Training, key: Key, rng: np.random.Generator) -> tuple[Key, np.ndarray] | None:
    rows = training.sample.rows(key)
    if len(rows):
        return key, rows
    pools = [training.sample.rows((*key[:-1], label)) for label in training.labels.get(key[:-1], [])]
    return ((*key[:-1], "any"), np.concatenate(pools)) if pools else None


def _pick_shuffled(training: Training, key: Key, rng: np.random.Generator) -> tuple[Key, np.ndarray] | None:
    others = [label for label in training.labels.get(key[:-1], []) if label != key[-1]]
    if not others:
        return None
    other = (*key[:-1], others[int(rng.integers(len(others)))])
    return other, training.sample.rows(other)


AHLMANN = "Ahlmann-Eltze, Huber & Anders, Nat. Methods 2025"
SYSTEMA = "Systema, Vinas Torne et al., Nat. Biotechnol. 2025"
STATE = "Adduri et al. 2025 (State)"

_ALL = (
    Baseline("control", "no effect: control cells of the context", (CONTROL_CELLS,), AHLMANN, pick=_pick_control),
    Baseline(
        "perturbed_mean",
        "mean of the context's training perturbations, each with equal weight",
        (CONTROL_CELLS, CONTEXT),
        SYSTEMA,
        shift=_of_context,
    ),
    Baseline("global_shift", "mean of all training shifts", (CONTROL_CELLS, ALL), "cell-eval", shift=_of_all),
    Baseline(
        "additive",
        "mean shift of the perturbation in the other contexts (trained nowhere else: the mean of all shifts)",
        (CONTROL_CELLS, ELSEWHERE, ALL),
        STATE,
        shift=shifts.additive,
    ),
    Baseline(
        "additive_shrunk",
        "the same, shrunk by a factor learnt from training conditions predicted from the other contexts",
        (CONTROL_CELLS, ELSEWHERE, ALL),
        STATE,
        shift=_shrunk,
    ),
    Baseline(
        "two_way",
        "shift = mean + context + perturbation, ridge",
        (CONTROL_CELLS, ALL),
        "additive decomposition of effects over contexts and perturbations",
        shift=shifts.two_way,
    ),
    Baseline(
        "nearest_context",
        "shift of the perturbation in the other context with the most similar control",
        (CONTROL_CELLS, ELSEWHERE),
        "transfer from the nearest cell type",
        shift=shifts.nearest_context,
    ),
    Baseline(
        "ridge_bilinear",
        "ridge map from the perturbation's shift in other contexts to this one, on principal components",
        (CONTROL_CELLS, CONTEXT, ELSEWHERE, ALL),
        AHLMANN,
        shift=shifts.ridge_bilinear,
    ),
    Baseline(
        "real_other_context",
        "real cells of the perturbation in the other context with the most similar control",
        (ELSEWHERE,),
        "the honest baseline of distributions",
        pick=_pick_elsewhere,
    ),
    Baseline(
        "real_other_context_shifted",
        "the same cells, carried over by the ratio of the two controls",
        (CONTROL_CELLS, ELSEWHERE),
        "the honest baseline of distributions",
        pick=_pick_elsewhere,
        transport=True,
    ),
    Baseline(
        "copy_training",
        "copies of training cells: of the condition; where it has none, of any perturbation in the context",
        (CONDITION, CONTEXT),
        "what memorisation must show",
        pick=_pick_copies,
    ),
    Baseline(
        "shuffled_label",
        "real cells of a random other perturbation in the context",
        (CONTEXT,),
        "negative control of discrimination and recovery",
        pick=_pick_shuffled,
    ),
)
BASELINES: Mapping[str, Baseline] = {baseline.name: baseline for baseline in _ALL}
"""All baselines by name."""


def get(name: str) -> Baseline:
    """Look a baseline up.

    Parameters
    ----------
    name
        One of ``BASELINES``.

    Returns
    -------
    The baseline.

    Raises
    ------
    DataError
        If there is none of this name.

    Examples
    --------
    >>> metrics.baselines.get("control").name
    'control'
    """
    if name not in BASELINES:
        raise DataError(f"there is no baseline {name!r}; baselines are {', '.join(BASELINES)}")
    return BASELINES[name]


def predict(
    name: str,
    train: Any,
    conditions: Any,
    *,
    perturbation_key: str,
    control: str,
    context_keys: str | Sequence[str] = (),
    n_cells: int = 100,
    layer: str | None = None,
    seed: int = 0,
    allow_missing: bool = False,
) -> Any:
    """Predict cells of conditions by a baseline.

    Parameters
    ----------
    name
        One of :data:`BASELINES`.
    train
        AnnData of training cells with raw counts. Nothing else is looked at.
    conditions
        DataFrame with the columns of context and perturbation, one condition per row, and optionally ``n_cells``.
    perturbation_key, context_keys, control
        Columns of ``obs`` and the label of the control.
    n_cells
        Cells per condition, where the table has no such column.
    layer
        Layer with the counts; by default as ``setup_anndata`` declared, else ``X``.
    seed
        Of the draws. Cells of a condition do not depend on which other conditions are asked for.
    allow_missing
        Leave out conditions that the baseline cannot predict (named in ``uns``) instead of an error.

    Returns
    -------
    AnnData of CSR float32 counts; ``uns["baseline"]`` names the baseline, what it uses, and what it could not predict.

    Raises
    ------
    DataError
        If the baseline is unknown, a column is missing, a number of cells is not a whole number of at least 1, or a
        condition cannot be predicted.

    Examples
    --------
    >>> wanted = conditions.head(2)
    >>> keys = {"perturbation_key": "perturbation", "context_keys": ["donor_id", "timepoint"], "control": "NTC"}
    >>> metrics.baselines.predict("additive", train, wanted, n_cells=5, **keys).n_obs
    10
    """
    import anndata as ad
    import pandas as pd

    baseline = get(name)
    keys = Keys.resolve(None, perturbation_key, context_keys, control)
    columns = [*keys.context, keys.perturbation]
    if absent := [column for column in columns if column not in conditions]:
        raise DataError(f"conditions lacks the columns {absent}")
    wanted = [tuple(as_label(value) for value in row) for row in conditions[columns].itertuples(index=False)]
    if "n_cells" in conditions:
        sizes = [as_n_cells(n, f" in row {i} of conditions") for i, n in enumerate(conditions["n_cells"])]
    else:
        sizes = [as_n_cells(n_cells)] * len(wanted)
    training = Training(read_samples({"train": train}, keys, layer=layer)["train"], keys.control)
    counts, codes, notes = emit(baseline, training, wanted, sizes, seed=seed, repeat=True)
    missing = [key for code, key in enumerate(wanted) if not (codes == code).any()]
    if missing and not allow_missing:
        raise DataError(
            f"{name} cannot predict {len(missing)} conditions, e.g. {missing[0]}: it uses {', '.join(baseline.uses)}; "
            "pass allow_missing=True to leave them out"
        )
    obs = pd.DataFrame(np.array(wanted, dtype=object).reshape(len(wanted), -1)[codes], columns=columns).astype(
        "category"
    )
    obs.index = pd.Index([f"{name}:{i}" for i in range(len(obs))])
    facts = {"name": name, "uses": list(baseline.uses), "seed": seed}
    facts |= {"missing": ["|".join(key) for key in missing], "notes": sorted({note for note in notes if note})}
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=training.sample.genes), uns={"baseline": facts})


def emit(
    baseline: Baseline,
    training: Training,
    keys: Sequence[Key],
    sizes: Sequence[int],
    *,
    seed: int,
    repeat: bool = False,
) -> tuple[sp.csr_matrix, np.ndarray, list[str]]:
    """Make the cells of conditions.

    Parameters
    ----------
    baseline
        The baseline.
    training
        What it sees.
    keys, sizes
        Conditions and cells of each.
    seed
        Of the draws.
    repeat
        Whether cells may be drawn twice where there are too few; else fewer are made.

    Returns
    -------
    Counts, the position in ``keys`` of each cell, and a note per condition (why it has no cells, or fewer).
    """
    moved = None if baseline.shift is None else baseline.shift(training, keys)
    blocks, codes, notes = [], [], []
    for code, (key, n) in enumerate(zip(keys, sizes, strict=True)):
        rng = np.random.default_rng([seed, *"/".join((baseline.name, *key)).encode()])
        shift = None if moved is None else moved[code]
        block, note = _cells(baseline, training, key, n, shift, rng, repeat)
        notes.append(note)
        if block is not None:
            blocks.append(block)
            codes.append(np.full(block.shape[0], code))
    n_genes = len(training.sample.genes)
    counts = sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix((0, n_genes), dtype=np.float32)
    return counts, np.concatenate(codes) if codes else np.empty(0, dtype=np.int64), notes


def _cells(
    baseline: Baseline,
    training: Training,
    key: Key,
    n: int,
    shift: np.ndarray | None,
    rng: np.random.Generator,
    repeat: bool,
) -> tuple[sp.csr_matrix | None, str]:
    """Make the cells of one condition, with a note."""
    needs_control = shift is not None or baseline.transport
    if needs_control and key[:-1] not in training.controls:
        return None, "no training controls in the context"
    if shift is not None and np.isnan(shift).any():
        return None, "no training condition to learn from"
    pick = baseline.pick or _pick_control
    picked = pick(training, key, rng)
    if picked is None:
        return None, "no training cells to draw from"
    source, pool = picked
    rows = draw_rows(pool, n, rng, repeat=repeat)
    few = f"{len(pool)} cells drawn with replacement" if repeat else f"only {len(pool)} cells"
    note = few if n > len(pool) else ""
    counts = training.sample.counts[rows]  # type: ignore[index]
    if not needs_control:
        return sp.csr_matrix(counts, dtype=np.float32), note
    base = training.share[training.position[source]]
    if baseline.transport:
        shift = training.profile[training.position[source]] - training.profile[training.controls[source[:-1]]]
    return emit_counts(counts, base, training.target_share(key[:-1], np.asarray(shift)), rng), note

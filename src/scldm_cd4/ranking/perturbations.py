"""`rank_perturbations`: targets, effects and uncertainty put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4._console import tracked
from scldm_cd4._errors import DataError
from scldm_cd4._settings import settings
from scldm_cd4.conditions import as_n_cells, requested_levels, told_by_role
from scldm_cd4.data.cells import CellData
from scldm_cd4.engines import one_caller
from scldm_cd4.generation import Trained
from scldm_cd4.ranking.effects import (
    Context,
    Control,
    EffectSource,
    Observed,
    Summariser,
    target_genes,
)
from scldm_cd4.ranking.evidence import HeldOut, Reliability, held_out_conditions
from scldm_cd4.ranking.population import Population, latent_embedding
from scldm_cd4.ranking.racing import race, rounds
from scldm_cd4.ranking.scoring import Group, Row, Scorer
from scldm_cd4.ranking.sources import effect_source
from scldm_cd4.ranking.table import Criteria, donor_note, flagged, group_table
from scldm_cd4.ranking.targets import MIN_CELLS, Part, Profile, Reader
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import Sampling

EACH, AVERAGE, GENERATED = "each", "average", "generated"


@told_by_role
def rank_perturbations(
    self: Any,
    target: Any,
    *,
    perturbations: Any = None,
    donor: Any = None,
    timepoint: Any = None,
    direction: str = "toward",
    effects: Any = "generated",
    n_cells: int = 200,
    method: Any = None,
    racing: bool = False,
    top_k: int = 20,
    min_effect: float | None = None,
    n_boot: int = 200,
    off_target: Any = None,
    guidance: Any = 1.0,
    seed: int | None = None,
    engine: Any = None,
) -> pd.DataFrame:
    """Rank perturbations by how far their effects lead toward a target.

    The effect of a perturbation is the difference of the pseudobulk log1p(counts per 10,000) between its cells and
    those of the control in the same context. Generated cells of both share all noise. The perturbed gene takes no part.

    Parameters
    ----------
    target
        What is wanted, in gene identifiers or symbols of the model:

        - genes to go up, as a list, or ``{"up": [...], "down": [...]}``
        - a signature, as a Series of weights (such as log fold changes) by gene
        - a population of cells: AnnData, or a mask or a query string of ``obs`` of the model's cells
        - a direction ``(obs column, from, to)``: the difference of the mean expression of two groups of the model's
          cells, within each donor that has both
        - a weighted sum ``{name: (target, weight)}``; each part counts in units of its spread by chance
    perturbations
        Those to rank; None ranks all that were trained, without the control.
    donor, timepoint
        Levels over which effects are averaged, None for all; ``"each"`` gives one row per perturbation and level.
    direction
        ``toward`` or ``away``; a higher score is more of what was asked.
    effects
        ``generated``; ``observed``, from the cells that the model was built or loaded with, whether it was trained on
        them or not; ``both``, observed effects shrunk toward generated ones; or a `scldm_cd4.ranking.EffectSource`.
    n_cells
        Generated cells per condition, at least 20.
    method
        Score. Gene set: ``ulm`` (default), ``mean_diff``, ``auc``, ``wtcs``; signature: ``cosine`` (default),
        ``projection``, ``spearman``, ``wtcs``; direction: ``projection`` (default), ``cosine``; population:
        ``edistance`` (default), ``mmd``. The page on ranking says what each is. For a sum, a dict by name.
    racing
        Start with few cells per condition for all, and go on up to `n_cells` only with those that are not yet clearly
        in or out of the shortlist. ``round`` and ``n_cells`` say where each stopped; rank the shortlist again with
        ``perturbations=`` for all cells.
    top_k
        Size of the shortlist, for ``p_top_k`` and racing.
    min_effect
        Effect size (L2 norm, natural logarithm) for ``passes_min_effect``; None takes what 5 % of the halves of the
        control exceed.
    n_boot
        Replicates for ranks.
    off_target
        Flags by perturbation, given back as ``offtarget_flag``.
    guidance
        As in `generate`.
    seed
        None draws one, which is recorded.
    engine
        ``"ray"``, or a `scldm_cd4.engines.Ray`: its workers generate, some perturbations at a time; same table.

    Returns
    -------
    One row per perturbation (and level), best first; rows without a score come last with the reason in ``warning``.

    ``score``, ``score_lo``, ``score_hi`` (90 %, over cells and, with three donors or more, over donors), ``se_cells``,
    ``se_donors`` (what donors add), ``se_total``; ``se_model`` and ``calibrated_lo``, ``calibrated_hi`` (with the error
    of the model on held-out conditions; NaN where there are too few); ``rank``, ``rank_lo``, ``rank_hi``, ``p_top_k``;
    ``chance_lo``, ``chance_hi`` and ``z`` (against scores between halves of the control with as many cells),
    ``z_genes`` (against random gene sets of like expression), ``pval`` (one-sided, the larger of both) and ``fdr``
    (Benjamini & Hochberg); ``effect_size`` (L2), ``effect_ratio`` (over its median by chance), ``passes_min_effect``;
    ``n_donors``, ``n_donors_agree``, ``score_min_donor`` and ``score_<donor>``; ``ontarget_pred_log2fc``;
    ``n_train_cells``, ``n_train_contexts``; ``top_genes`` (with the largest part in the score, and their log2 fold
    changes); ``cosine`` of effect and target; ``part_<name>`` for a sum; ``n_genes_used`` and
    ``frac_target_genes_found``. ``attrs`` says how the table was made, what the intervals cover, and the
    ``reliability`` of the model on held-out conditions.

    Raises
    ------
    DataError
        There is no control, the target cannot be used with this model, or an argument is not possible.
    UnknownCategoryError
        A label is unknown or was never trained.
    NotTrainedError
        A stage is not trained.

    Examples
    --------
    >>> target = {"up": list(adata.var_names[:6]), "down": list(adata.var_names[6:12])}
    >>> table = model.rank_perturbations(target, n_cells=20, seed=0)
    >>> table["perturbation"].tolist() == table.sort_values("rank")["perturbation"].tolist()
    True
    """
    trained, sampling = self._trained(), self._sampling(seed=seed, guidance=guidance)
    engine = None if engine is None else one_caller(engine)
    registry = trained.registry
    if registry.control is None:
        raise DataError("ranking compares with the control, but none was declared: setup_anndata(..., control=...)")
    _check(direction, n_cells, top_k, n_boot, min_effect)
    reader = Reader(registry, self.adata, latent_embedding(trained.vae, registry), sampling.seed)
    parts = reader.read(target, method)
    names = _names(registry, perturbations)
    summariser = Summariser(tuple(p.target for p in parts if isinstance(p.target, Population)))
    source = effect_source(trained, sampling, effects, summariser, self.adata, settings.num_workers, engine)
    groups = _groups(registry, donor, timepoint)
    run = _Run(registry, source, parts, groups, sampling.seed)
    sizes = rounds(n_cells) if racing else [n_cells]
    sign = 1.0 if direction == "toward" else -1.0
    held_out = _held_out(source, summariser, self.adata, registry, names, run.contexts, n_cells, sampling.seed)
    rows: dict[str, list[Row | None]] = {}

    def evaluate(some: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
        found = run.rows(some, n, held_out)
        rows.update(found)
        return sign * _by_group(found, "score"), _by_group(found, "se_cells")

    reached = race(names, sizes, evaluate, top_k)
    unknown = f"not looked at: effects are {source.name}" if source.name != GENERATED else "no held-out cells"
    reliability = Reliability.unknown(unknown) if held_out is None else held_out.reliability()
    criteria = Criteria(sign, n_boot, top_k, min_effect, sampling.seed, reliability)
    tables = [
        group_table(registry, group, names, [rows[name][i] for name in names], reached, criteria)
        for i, group in enumerate(groups)
    ]
    table = flagged(pd.concat(tables, ignore_index=True), off_target)
    share = [p.target.share_found for p in parts if isinstance(p.target, Profile)]
    table["frac_target_genes_found"] = min(share, default=np.nan)
    table.attrs = _attrs(trained, sampling, parts, groups, direction, source, reliability)
    table.attrs |= {"n_cells": n_cells, "top_k": top_k, "n_boot": n_boot, "rounds": sizes}
    return table


@dataclass
class _Run:
    """Effects of a source, scored in every group of contexts."""

    registry: Registry
    source: EffectSource
    parts: tuple[Part, ...]
    groups: Sequence[Group]
    seed: int
    contexts: list[Context] = field(init=False)

    def __post_init__(self) -> None:
        self.contexts = list(dict.fromkeys(c for group in self.groups for c in group.contexts))

    def scorers(self, n_cells: int) -> tuple[dict[Context, Control], list[Scorer]]:
        """Return the control of each context, and what scores each group."""
        controls = self.source.controls(self.contexts, n_cells)
        for group in self.groups:
            if not any(context in controls for context in group.contexts):
                raise DataError(f"there are too few {self.source.name} control cells in {group.contexts[0]}")
        return controls, [Scorer(group, self.parts, controls, self.seed) for group in self.groups]

    def rows(self, names: Sequence[str], n_cells: int, held_out: HeldOut | None = None) -> dict[str, list[Row | None]]:
        """Return the rows of perturbations, one per group."""
        controls, scorers = self.scorers(n_cells)
        rows = {}
        made = self.source.changes(names, controls, n_cells)
        found = tracked(made, len(names), "ranking", "perturbations", progress=settings.progress)
        try:
            for name, changes in zip(names, found, strict=True):
                target = target_genes(self.registry, name)
                rows[name] = [scorer.row(changes, ~target, target) for scorer in scorers]
                if held_out is not None:
                    for scorer in scorers:
                        own = {c: changes[c] for c in scorer.group.contexts if c in changes}
                        held_out.add(name, own, scorer, ~target)
        finally:  # a generator that is left half-way gives torch its threads back
            found.close()
        return rows


def _by_group(rows: Mapping[str, list[Row | None]], what: str) -> np.ndarray:
    """Return a figure of rows (groups, names); NaN where there is none."""
    return np.array([[np.nan if row is None else getattr(row, what) for row in each] for each in rows.values()]).T


def _names(registry: Registry, perturbations: Any) -> list[str]:
    asked = dict.fromkeys(requested_levels(registry, "perturbation", perturbations))
    if names := [name for name in asked if name != registry.control]:
        return names
    raise DataError("there is no perturbation to rank beside the control")


def _check(direction: str, n_cells: int, top_k: int, n_boot: int, min_effect: float | None) -> None:
    if direction not in ("toward", "away"):
        raise DataError(f"direction must be 'toward' or 'away', got {direction!r}")
    if as_n_cells(n_cells) < MIN_CELLS:
        raise DataError(f"n_cells must be at least {MIN_CELLS} for an effect with an interval, got {n_cells}")
    for name, value in (("top_k", top_k), ("n_boot", n_boot)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise DataError(f"{name} must be a whole number of at least 1, got {value!r}")
    if min_effect is not None and not 0 <= min_effect < np.inf:
        raise DataError(f"min_effect must be a size of at least 0, got {min_effect!r}")


def _held_out(
    source: EffectSource,
    summariser: Summariser,
    adata: Any,
    registry: Registry,
    names: Sequence[str],
    contexts: Sequence[Context],
    n_cells: int,
    seed: int,
) -> HeldOut | None:
    """Return what compares generated with observed scores, or None where nothing was held out."""
    if source.name != GENERATED:
        return None
    wanted = held_out_conditions(adata, registry, names, contexts, seed)
    if not wanted:
        return None
    observed = Observed(CellData.from_adata(adata, registry), registry, summariser, seed)
    return HeldOut(observed, wanted, n_cells)


def _groups(registry: Registry, donor: Any, timepoint: Any) -> list[Group]:
    sides = []
    for role, value in (("donor", donor), ("timepoint", timepoint)):
        each = isinstance(value, str) and value == EACH
        levels = list(dict.fromkeys(requested_levels(registry, role, None if each else value)))
        sides.append([[level] for level in levels] if each else [levels])
    return [
        Group(_title(donors), _title(times), tuple(product(donors, times))) for donors in sides[0] for times in sides[1]
    ]


def _title(levels: list[str]) -> str:
    return levels[0] if len(levels) == 1 else AVERAGE


def _attrs(
    trained: Trained,
    sampling: Sampling,
    parts: Sequence[Part],
    groups: Sequence[Group],
    direction: str,
    source: EffectSource,
    reliability: Reliability,
) -> dict[str, Any]:
    kinds = [part.target.kind for part in parts]
    guidance = sampling.guidance
    return trained.provenance | {
        "target": kinds[0] if len(parts) == 1 else "weighted sum",
        "parts": {p.name: {"kind": p.target.kind, "method": p.target.method, "weight": p.weight} for p in parts},
        "share_of_target_genes_found": min(part.target.share_found for part in parts),
        "direction": direction,
        "effects": source.name,
        "control": trained.registry.control,
        "seed": sampling.seed,
        "solver": sampling.solver,
        "n_steps": sampling.n_steps,
        "guidance": dict(guidance) if isinstance(guidance, Mapping) else float(guidance),
        "interval": "90 %, over the cells drawn and, from three donors on, over donors; it holds no error of the "
        "model, which calibrated_lo and calibrated_hi add where held-out conditions tell it",
        "donor_interval": donor_note(groups),
        "reliability": {
            "n_conditions": reliability.n_conditions,
            "spearman": reliability.spearman,
            "base_sd": reliability.base_sd,
            "relative_sd": reliability.relative_sd,
            "shared": reliability.shared,
            "note": reliability.note,
        },
        "perturbed_gene": "takes no part"
        + ("; in distances, perturbed cells have its counts of control cells" if "population" in kinds else ""),
    }

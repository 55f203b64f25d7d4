"""Which perturbations lead toward a wanted effect."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scldm_cd4._errors import DataError
from scldm_cd4.conditions import Request, as_n_cells, requested_levels
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.labels import get_column
from scldm_cd4.generation import Trained
from scldm_cd4.noise import stream
from scldm_cd4.output import evidence
from scldm_cd4.registry import Registry, suggestion
from scldm_cd4.sampling import Sampler, Sampling, draw, lognormal, resolve_library

FOLDS = 10
"""Parts into which the cells of a condition are cut, for intervals and chance level."""
N_SPLITS = 400
"""Random halves of the control cells that make the chance level."""
MIN_GENES, MIN_SHARE, GOOD_SHARE = 10, 0.1, 0.5
MIN_CELLS = 20
TARGET_SUM = 1e4
Z90 = 1.6449
EACH, AVERAGE = "each", "average"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """A wanted change of expression."""

    kind: str
    """``signature`` or ``direction``."""
    weights: Array
    """Per gene of the model; 0 where the target says nothing."""
    known: NDArray[np.bool_]
    """Genes that the target speaks of."""
    share_found: float
    """Share of the target's genes that the model has."""

    def score(self, delta: Array, sd: Array, keep: NDArray[np.bool_]) -> tuple[Array, Array, int]:
        """Return score and cosine of effects (k, genes), and the number of genes used.

        A signature scores by the cosine with the effect in units of the control's standard deviation; a direction by
        the length of the effect along it (natural log units), beside the cosine.
        """
        genes = self.known & keep & (sd > 0)
        effect, weights = delta[:, genes], self.weights[genes]
        if self.kind == "direction":
            weights = weights / max(float(np.linalg.norm(weights)), 1e-300)
            along = effect @ weights
            return along, _divide(along, np.linalg.norm(effect, axis=1)), int(genes.sum())
        effect = effect / sd[genes]
        size = np.linalg.norm(effect, axis=1) * np.linalg.norm(weights)
        cosine = _divide(effect @ weights, size)
        return cosine, cosine, int(genes.sum())


def rank(
    trained: Trained,
    sampling: Sampling,
    target: Any,
    *,
    perturbations: Any = None,
    donor: Any = None,
    timepoint: Any = None,
    direction: str = "toward",
    effects: str = "generated",
    n_cells: int = 200,
    adata: Any = None,
    workers: int | None = None,
) -> pd.DataFrame:
    """Rank perturbations by how far their generated effects lead toward a target.

    The effect of a perturbation is the difference of the pseudobulk log1p(counts per 10,000) between generated cells of
    the perturbation and of the control in the same context, drawn with the same noise and library sizes. The perturbed
    gene takes no part.

    Parameters
    ----------
    target
        A signature, as a Series of weights (such as log fold changes) by gene identifier or symbol; or a direction, as
        ``(obs column, from, to)``: the difference of the mean log-normalised expression between two groups of `adata`.
    perturbations
        Those to rank; None ranks all that were trained, without the control.
    donor, timepoint
        Levels over which effects are averaged, None for all; ``"each"`` gives one row per level.
    direction
        ``toward`` or ``away``; a higher score is more of what was asked.
    effects
        ``generated``.
    n_cells
        Cells per condition, at least 20.

    Returns
    -------
    One row per perturbation (and level), best first, with ``score``, its 90 % interval over drawn cells ``score_lo``
    and ``score_hi``, ``rank``, the 5 % and 95 % quantile of the scores between halves of the control cells
    ``chance_lo`` and ``chance_hi``, and ``z``, the distance from chance in its standard deviations. ``attrs`` says how
    it was made.

    Raises
    ------
    DataError
        There is no control, the target has too few genes of the model or is constant, or an argument is not possible.
    UnknownCategoryError
        A label is unknown or was never trained.
    """
    registry = trained.registry
    if registry.control is None:
        raise DataError("ranking compares with the control, but none was declared: setup_anndata(..., control=...)")
    if effects != "generated":
        raise DataError(f"effects must be 'generated', got {effects!r}; observed effects are not ranked yet")
    if direction not in ("toward", "away"):
        raise DataError(f"direction must be 'toward' or 'away', got {direction!r}")
    if as_n_cells(n_cells) < MIN_CELLS:
        raise DataError(f"n_cells must be at least {MIN_CELLS} for an effect with an interval, got {n_cells}")
    wanted = read_target(registry, target, adata)
    names = [x for x in requested_levels(registry, "perturbation", perturbations) if x != registry.control]
    if not names:
        raise DataError("there is no perturbation to rank beside the control")
    groups = _groups(registry, donor, timepoint)
    contexts = list(dict.fromkeys(context for group in groups for context in group.contexts))
    # noise is keyed by the context alone, so that perturbation and control share it
    sampler = Sampler(
        trained.vae, trained.dit, registry, sampling, noise_labels=lambda labels: (labels[0], labels[1], None)
    )
    resolve_library(registry, [], None)
    controls = [Request((*context, registry.control), 2 * n_cells) for context in contexts]
    with closing(draw(sampler, controls, None, workers)) as drawn:
        summaries = [Control.of(cells) for cells in by_request(drawn, controls)]
    control = dict(zip(contexts, summaries, strict=True))
    chance = [_chance(group, control, wanted, sampling.seed) for group in groups]
    requests = [Request((*context, name), n_cells) for name in names for context in contexts]
    rows = []
    with closing(draw(sampler, requests, None, workers)) as drawn:
        cells = by_request(drawn, requests)
        for name in names:
            folds = {context: fold_sums(next(cells), FOLDS) for context in contexts}
            keep = ~target_genes(registry, name)
            rows += [
                _row(registry, name, group, folds, control, wanted, keep, null)
                for group, null in zip(groups, chance, strict=True)
            ]
    table = _ranked(pd.DataFrame(rows), 1.0 if direction == "toward" else -1.0)
    table.insert(len(table.columns), "n_cells", n_cells)
    table.attrs = _attrs(trained, sampling, wanted, direction, groups)
    return table


@dataclass(frozen=True)
class Group:
    """Contexts over which effects are averaged."""

    donor: str
    timepoint: str
    contexts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Control:
    """Generated control cells of one context."""

    folds: Array
    """Summed counts (2 FOLDS, genes); the first half shares the noise of the perturbations."""
    variance: Array
    """Of log1p(counts per 10,000) over the cells (genes,)."""

    @classmethod
    def of(cls, counts: Any) -> "Control":
        """Summarise counts (n, genes)."""
        values = lognormal(counts).astype(np.float64)
        mean = np.asarray(values.mean(axis=0)).ravel()
        square = np.asarray(values.multiply(values).mean(axis=0)).ravel()
        return cls(fold_sums(counts, 2 * FOLDS), np.maximum(square - mean**2, 0.0))


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


def fold_sums(counts: Any, n_folds: int) -> Array:
    """Return the summed counts (n_folds, genes) of consecutive, equally large parts of the cells."""
    from scipy import sparse

    n = counts.shape[0]
    fold = np.arange(n) * n_folds // n
    members = sparse.csr_matrix((np.ones(n), (fold, np.arange(n))), shape=(n_folds, n))
    return np.asarray((members @ counts).toarray(), dtype=np.float64)


def profile(sums: Array) -> Array:
    """Return log1p(counts per 10,000) of summed counts (k, genes)."""
    return np.log1p(TARGET_SUM * sums / np.maximum(sums.sum(axis=1, keepdims=True), 1.0))


def target_genes(registry: Registry, name: str) -> NDArray[np.bool_]:
    """Return which genes carry the name of a perturbation, as identifier or in a string column of ``var``."""
    columns = [registry.genes, *registry.var.values()]
    return np.any([np.array(column, dtype=object) == name for column in columns], axis=0)


def read_target(registry: Registry, target: Any, adata: Any) -> Target:
    """Return a target in the model's genes.

    Raises
    ------
    DataError
        It is of another kind, constant, has too few genes of the model, or its groups have too few cells.
    """
    if isinstance(target, pd.Series):
        return _signature(registry, target)
    if isinstance(target, tuple | list) and len(target) == 3 and all(isinstance(x, str) for x in target):
        return _direction(registry, adata, *target)
    raise DataError("target must be a Series of weights by gene, or (obs column, from, to) of strings")


def _signature(registry: Registry, target: pd.Series) -> Target:
    names = target.index.astype(str)
    if names.has_duplicates:
        raise DataError(f"the signature has genes twice, such as {names[names.duplicated()][0]!r}")
    values = pd.to_numeric(target, errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"the signature has {int((~np.isfinite(values)).sum())} missing or infinite weights; drop them")
    lookup = dict(zip(names, values, strict=True))
    columns = [registry.genes, *registry.var.values()]
    column = max(columns, key=lambda c: len(lookup.keys() & set(c)))
    known = np.array([name in lookup for name in column])
    weights = np.array([lookup.get(name, 0.0) for name in column])
    n, share = int(known.sum()), float(known.sum()) / max(len(lookup), 1)
    if n < MIN_GENES or share < MIN_SHARE:
        raise DataError(
            f"the model has {n} of the {len(lookup)} genes of the signature; at least {MIN_GENES} and {MIN_SHARE:.0%} "
            f"are needed. The signature has names like {names[0] if len(names) else ''!r}, the model like "
            f"{registry.genes[0]!r}"
        )
    if np.ptp(weights[known]) == 0:
        raise DataError("the signature is constant on the model's genes, so it has no direction")
    if share < GOOD_SHARE:
        warnings.warn(f"the model has only {share:.0%} of the signature's genes", UserWarning, stacklevel=4)
    return Target("signature", weights, known, share)


def _direction(registry: Registry, adata: Any, key: str, start: str, end: str) -> Target:
    if adata is None:
        raise DataError("a direction between two groups needs cells: load the model with adata=")
    labels = get_column(adata.obs, key, "target").astype(str).to_numpy()
    cells = CellData.from_adata(adata, registry, labels=False)
    means = []
    for name in (start, end):
        rows = np.flatnonzero(labels == name)
        if len(rows) < MIN_CELLS:
            hint = suggestion(name, sorted(set(labels)), f"labels of obs[{key!r}] are")
            raise DataError(f"{len(rows)} cells have {name!r} in obs[{key!r}], at least {MIN_CELLS} are needed.{hint}")
        total = np.zeros(registry.n_genes)
        for part in np.array_split(rows, max(1, len(rows) // 1000)):
            total += np.asarray(lognormal(cells.counts(part)).sum(axis=0), dtype=np.float64).ravel()
        means.append(total / len(rows))
    return Target("direction", means[1] - means[0], np.ones(registry.n_genes, dtype=bool), 1.0)


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


def _spread(group: Group, control: dict[tuple[str, str], Control]) -> Array:
    return np.sqrt(np.mean([control[c].variance for c in group.contexts], axis=0))


def _chance(group: Group, control: dict[tuple[str, str], Control], target: Target, seed: int) -> Array:
    """Return the scores of halves of the control cells against the other halves (N_SPLITS,)."""
    rng = stream(seed, (group.donor, group.timepoint), 0, "control halves")
    halves = np.zeros((N_SPLITS, 2 * FOLDS))
    np.put_along_axis(halves, rng.random(halves.shape).argsort(axis=1)[:, :FOLDS], 1.0, axis=1)
    deltas = [
        profile(halves @ c.folds) - profile((1 - halves) @ c.folds) for c in map(control.get, group.contexts) if c
    ]
    everything = np.ones(len(target.weights), dtype=bool)
    return target.score(np.mean(deltas, axis=0), _spread(group, control), everything)[0]


def _row(
    registry: Registry,
    name: str,
    group: Group,
    folds: dict[tuple[str, str], Array],
    control: dict[tuple[str, str], Control],
    target: Target,
    keep: NDArray[np.bool_],
    chance: Array,
) -> dict[str, Any]:
    """Score one perturbation in one group of contexts; row 0 of the effects is that of all folds, then one left out."""
    left = np.vstack([np.ones(FOLDS), 1.0 - np.eye(FOLDS)])
    pairs = [(folds[c], control[c].folds[:FOLDS]) for c in group.contexts]
    delta = np.mean([profile(left @ p) - profile(left @ c) for p, c in pairs], axis=0)
    scores, cosine, n_genes = target.score(delta, _spread(group, control), keep)
    error = float(np.sqrt((FOLDS - 1) * np.mean((scores[1:] - scores[1:].mean()) ** 2)))
    n_train = [evidence(registry, (*context, name))[0] for context in group.contexts]
    return {
        "perturbation": name,
        "donor": group.donor,
        "timepoint": group.timepoint,
        "score": float(scores[0]),
        "score_lo": float(scores[0] - Z90 * error),
        "score_hi": float(scores[0] + Z90 * error),
        "rank": np.nan,
        "chance_lo": float(np.quantile(chance, 0.05)),
        "chance_hi": float(np.quantile(chance, 0.95)),
        "z": float((scores[0] - chance.mean()) / max(float(chance.std()), 1e-300)),
        "cosine": float(cosine[0]),
        "effect_size": float(np.linalg.norm(delta[0, keep])),
        "n_genes_used": n_genes,
        "n_train_cells": int(sum(n_train)),
        "n_train_contexts": int(np.count_nonzero(n_train)),
    }


def _ranked(table: pd.DataFrame, sign: float) -> pd.DataFrame:
    """Turn scores so that more is better, rank within each group of contexts, and sort."""
    if sign < 0:
        table[["score", "z", "cosine"]] *= -1
        table[["score_lo", "score_hi"]] = -table[["score_hi", "score_lo"]].to_numpy()
        table[["chance_lo", "chance_hi"]] = -table[["chance_hi", "chance_lo"]].to_numpy()
    table["rank"] = table.groupby(["donor", "timepoint"], sort=False)["score"].rank(ascending=False, method="average")
    return table.sort_values(["donor", "timepoint", "rank"], kind="stable", ignore_index=True)


def _attrs(trained: Trained, sampling: Sampling, target: Target, direction: str, groups: list[Group]) -> dict[str, Any]:
    donors = {context[0] for group in groups for context in group.contexts}
    return trained.provenance | {
        "target": target.kind,
        "share_of_target_genes_found": target.share_found,
        "direction": direction,
        "effects": "generated",
        "control": trained.registry.control,
        "seed": sampling.seed,
        "solver": sampling.solver,
        "n_steps": sampling.n_steps,
        "interval": "90 %, over the cells drawn; it holds no error of the model",
        "donor_interval": f"none: effects of {len(donors)} donor(s) are averaged"
        + (", and fewer than three give no interval" if len(donors) < 3 else ", see donor='each' for their spread"),
    }


def _divide(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)

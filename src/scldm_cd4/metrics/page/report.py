"""A page about generated cells: the table, what it is made of, and how it came about, in one file."""

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4._whole import whole_file
from scldm_cd4.metrics.cells.samples import InputType, Keys
from scldm_cd4.metrics.page import html, parts
from scldm_cd4.metrics.page.scored import Scored
from scldm_cd4.metrics.scoring.evaluate import evaluate

MAX_PANELS = 6
"""Conditions with a scatter of their own, unless others are asked for."""
MAX_CONDITIONS = 24
"""Conditions that may be asked for."""
LIBRARIES = ("numpy", "scipy", "pandas", "anndata", "scikit-learn", "umap-learn", "matplotlib")


def report(
    real: Any,
    pred: Any,
    path: str | Path,
    *,
    train: Any = None,
    perturbation_key: str | None = None,
    context_keys: str | Sequence[str] | None = None,
    control: str | None = None,
    table: Any = None,
    title: str | None = None,
    show: Sequence[str] | None = None,
    layer: str | None = None,
    input_type: InputType = "counts",
    size_factor_key: str | None = None,
    genes: Any = "exact",
    target_genes: Mapping[str, str | None] | None = None,
    min_cells: int = 10,
    n_components: int = 30,
    pca_on: str = "reference",
    allow_missing: bool = False,
    fdr: float = 0.05,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a page about generated cells: one HTML file that loads nothing and runs no script.

    It shows the table of :func:`evaluate` with floors, ceilings and baselines, generated against real mean shifts of
    genes, generated and real cells in a UMAP of reference cells (with real against real cells beside), the recovery of
    significant genes, counts, zeros and variances, and how everything came about. The cells shown are those that the
    table scores. The same input and seed give the same file.

    Parameters
    ----------
    real, pred, train, perturbation_key, context_keys, control
        As in :func:`evaluate`.
    path
        File to write, ``.html``.
    table
        From :func:`evaluate` for the same cells and keywords; computed here by default.
    title
        Of the page.
    show
        Perturbations whose conditions have a scatter, at most 24 conditions; by default 6 conditions from the largest
        to the smallest real effect. The choice never looks at the predictions.
    layer, input_type, size_factor_key, genes, target_genes, min_cells, n_components, pca_on, allow_missing, fdr, seed
        As in :func:`evaluate`.
    overwrite
        Replace a file at the path.
    options
        Further keywords of :func:`evaluate`, such as ``profile``, ``baselines``, ``ceilings``; not with ``table``.

    Returns
    -------
    The path. Where ``uns["simulated"]`` of any side is true, the page and its figures say SIMULATED.

    Raises
    ------
    FileExistsError
        If there is something at the path, and it may not be replaced.
    DataError
        If the path cannot be a page, the cells cannot be scored, or the table is not of these cells.

    Examples
    --------
    >>> path = metrics.report(real, cells, "report.html", train=train, min_cells=5, n_components=5)  # doctest: +SKIP
    """
    path = _free(path, overwrite)
    keys = Keys.resolve(pred, perturbation_key, context_keys, control)
    sides = {"real": real, "pred": pred} | ({} if train is None else {"train": train})
    columns: dict[str, Any] = {
        "perturbation_key": keys.perturbation,
        "context_keys": list(keys.context),
        "control": keys.control,
    }
    settings: dict[str, Any] = {
        "layer": layer,
        "input_type": input_type,
        "size_factor_key": size_factor_key,
        "genes": genes,
        "target_genes": target_genes,
        "min_cells": min_cells,
        "n_components": n_components,
        "pca_on": pca_on,
        "allow_missing": allow_missing,
        "fdr": fdr,
        "seed": seed,
    }
    if table is None:
        table = evaluate(real, pred, train=train, **columns, **settings, **options)
    elif options:
        raise DataError(f"table= is given, so {sorted(options)} would have no effect; leave one of them out")
    scored = Scored.read(sides, keys, **settings)
    table = parts.checked(table, scored, columns | settings)
    title = title or f"Generated cells beside real cells: {len(scored.conditions)} conditions"
    rows = _choose(scored, show)
    is_simulated = any(bool(getattr(side, "uns", {}).get("simulated", False)) for side in sides.values())
    provenance = _provenance(sides, table, scored, columns | settings)
    made = [*parts.sections(table, scored, rows, is_simulated), provenance]
    with whole_file(path) as part:
        part.write_bytes(html.page(title, parts.head(scored, is_simulated), made))
    return path


def _free(path: str | Path, overwrite: bool) -> Path:
    """Refuse a path before the work begins."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"{path} must end in .html")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"there is something at {path}; pass overwrite=True to replace a file")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.absolute().parent}")
    return path


def _choose(scored: Scored, show: Sequence[str] | None) -> list[int]:
    """Choose the conditions that have a scatter, by real cells only."""
    order = np.argsort(-scored.shifts.size, kind="stable")
    if show is None:
        steps = np.linspace(0, len(order) - 1, min(MAX_PANELS, len(order))).round().astype(int)
        return [int(row) for row in order[steps]]
    wanted = [show] if isinstance(show, str) else [str(label) for label in show]
    have = {key[-1] for key in scored.conditions}
    if unknown := [label for label in wanted if label not in have]:
        raise DataError(f"show={unknown} are no scored perturbations, which are {sorted(have)[:10]}")
    rows = [row for label in wanted for row, key in enumerate(scored.conditions) if key[-1] == label]
    if not 0 < len(rows) <= MAX_CONDITIONS:
        raise DataError(f"show= names {len(rows)} conditions; name 1 to {MAX_CONDITIONS}")
    return rows


def _provenance(sides: Mapping[str, Any], scores: Any, scored: Scored, settings: Mapping[str, Any]) -> Element:
    """Say what the page was made of."""
    from scldm_cd4 import __version__

    sample = {"real": scored.truth.real, "pred": scored.pred, "train": None}
    cells = [
        (
            {"real": "real", "pred": "generated", "train": "training"}[what],
            f"{adata.n_obs:,}",
            f"{adata.n_vars:,}",
            "–" if (own := sample[what]) is None else f"{own.n_cells:,}",
        )
        for what, adata in sides.items()
    ]
    cells.append(("controls of the scored contexts", "–", "–", f"{scored.truth.controls.sample.n_cells:,}"))
    made = {**settings, **{k: v for k, v in scores.attrs.items() if k != "metrics"}}
    made |= {"components_fitted_on": scored.fitted_on, "python": ".".join(map(str, sys.version_info[:3]))}
    made |= {"scldm_cd4": __version__} | {name: version(name) for name in LIBRARIES}
    carried = dict(getattr(sides["pred"], "uns", {}).get("scldm_cd4", {}))
    blocks = [
        html.tag("h3", "Cells"),
        html.table(["", "cells", "genes", "scored"], cells),
        html.tag("h3", "How the page was made"),
        html.table(["setting", "value"], [(k, _short(v)) for k, v in made.items()]),
    ]
    if carried:
        blocks.append(html.tag("h3", "What the generated cells say of themselves (uns['scldm_cd4'])"))
        blocks.append(html.table(["entry", "value"], [(k, _short(v)) for k, v in sorted(carried.items())]))
    if scored.not_scored:
        blocks.append(html.tag("h3", f"{len(scored.not_scored)} conditions that are not scored"))
        rows = [(" | ".join(key), n[0], n[1], n[2]) for key, n in sorted(scored.not_scored.items())]
        blocks.append(html.table(["condition", "real cells", "generated cells", "why"], rows))
    return html.section("provenance", "Provenance", *blocks)


def _short(value: Any) -> str:
    """Write a setting; long ones are cut."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= 400 else f"{text[:400]}… ({len(text):,} characters)"

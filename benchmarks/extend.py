"""Measure what a few control cells of a new donor give a trained model.

All cells of one donor are left out of training. The model is extended by the donor from 0, 50 and 200 of its control
cells, and generated controls and perturbed cells are scored against its other cells, beside what needs no model and
beside a model that was trained with the 200 controls::

    python benchmarks/extend.py --data kang simulated --models models --out extend.json

The data files are not part of the project; ``--shared`` names the folder that holds ``data/``.
"""

import argparse
import json
import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from quality import SHARED, show
from scldm_cd4 import CD4Model, datasets, metrics

SCORED = ("energy_distance", "mmd2", "pearson_delta", "l2_delta", "de_f1", "discrimination_cosine")
BASELINES = ("control", "additive", "nearest_context", "real_other_context")
NUMBERS = (0, 50, 200)
TYPES = ("CD4 T cells", "CD14+ Monocytes", "FCGR3A+ Monocytes", "B cells", "CD8 T cells", "NK cells")
CELLS = 100
"""Generated control cells per context."""


@dataclass(frozen=True)
class Case:
    """Cells of a study and the donor that is new."""

    adata: ad.AnnData
    keys: dict[str, str]
    control: str
    new: str
    preset: str

    def rows(self, *, new: bool, control: bool | None = None) -> np.ndarray:
        """Return the rows of the new donor or of the others, of controls or perturbed cells or both."""
        obs = self.adata.obs.astype(str)
        keep = (obs[self.keys["donor_key"]] == self.new).to_numpy() == new
        if control is not None:
            keep &= (obs[self.keys["perturbation_key"]] == self.control).to_numpy() == control
        return np.flatnonzero(keep)


def load(name: str, shared: Path) -> Case:
    """Read cells; genes are chosen on the donors that train."""
    if name == "simulated":
        adata = datasets.synthetic_cd4(8000, 300, n_perturbations=8, n_timepoints=2, control_share=0.3, seed=1)
        keys = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint"}
        return Case(adata, keys, "NTC", sorted(adata.obs["donor_id"].astype(str).unique())[-1], "tiny")
    adata = ad.read_h5ad(shared / "data" / "kang_dev_5donors_paired_3ctrl_only.h5ad")
    keys = {"perturbation_key": "condition", "donor_key": "donor", "timepoint_key": "cell_type"}
    case = Case(adata[adata.obs["cell_type"].isin(TYPES)].copy(), keys, "ctrl", "1015", "small")
    values = metrics.log_normalize(case.adata[case.rows(new=False)])
    variance = np.asarray(values.multiply(values).mean(axis=0) - np.square(values.mean(axis=0))).ravel()
    genes = np.sort(np.argsort(-variance, kind="stable")[:600])
    return Case(case.adata[:, genes].copy(), keys, case.control, case.new, case.preset)


def trained(case: Case, rows: np.ndarray, folder: Path, seed: int) -> Any:
    """Train on some cells, or load what was trained on them before."""
    cells = case.adata[np.sort(rows)].copy()
    CD4Model.setup_anndata(cells, control=case.control, **case.keys)
    if folder.is_dir():
        return CD4Model.load(folder, cells)
    model, start = CD4Model(cells, config=case.preset), time.process_time()
    model.train(seed=seed, progress=False)
    show(f"{folder.name}: trained in {time.process_time() - start:.0f} s of CPU, load {os.getloadavg()[0]:.1f}")
    model.save(folder)
    return model


def conditions_of(cells: ad.AnnData, case: Case) -> pd.DataFrame:
    """Ask for as many perturbed cells per condition as there are, and for `CELLS` controls per context."""
    columns = list(case.keys.values())
    table = (
        cells.obs.groupby(columns, observed=True)
        .size()
        .rename("n_cells")
        .reset_index()
        .astype(dict.fromkeys(columns, str))
    )
    table.loc[table[case.keys["perturbation_key"]] == case.control, "n_cells"] = CELLS
    return table


def control_errors(cells: ad.AnnData, real: ad.AnnData, case: Case, projection: Any) -> dict[str, float]:
    """Compare control cells with real ones of the new donor, context by context, weighted by real cells."""
    key, column = case.keys["timepoint_key"], case.keys["perturbation_key"]
    sides = [x[(x.obs[column].astype(str) == case.control).to_numpy()] for x in (cells, real)]
    levels = sides[1].obs[key].astype(str).value_counts()
    out, weights = [], []
    for level in levels.index[levels >= 10]:
        own, truth = (x[(x.obs[key].astype(str) == level).to_numpy()] for x in sides)
        if not own.n_obs:
            continue
        profiles = [np.log1p(1e4 * p / p.sum()) for p in (np.asarray(x.X.sum(axis=0)).ravel() for x in (own, truth))]
        points = [projection.apply(metrics.log_normalize(x)) for x in (own, truth)]
        distance = float(metrics.energy_distance(*points))
        out.append([float(np.sqrt(np.mean(np.square(profiles[0] - profiles[1])))), distance])
        weights.append(truth.n_obs)
    return dict(zip(("profile_rmse", "energy_distance"), np.average(out, axis=0, weights=weights), strict=True))


def run(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Score all ways to know the new donor."""
    case = load(name, options.shared)
    case = case if options.preset is None else replace(case, preset=options.preset)
    others, perturbed = case.rows(new=False), case.rows(new=True, control=False)
    controls = np.random.default_rng(0).permutation(case.rows(new=True, control=True))
    query, rest = controls[: max(NUMBERS)], controls[max(NUMBERS) :]
    test = case.adata[np.sort(np.concatenate([rest, perturbed]))].copy()
    train = case.adata[np.sort(np.concatenate([others, query]))].copy()
    projection = metrics.fit_projection(metrics.log_normalize(case.adata[others]), 30)
    base = trained(case, others, options.models / f"{name}_base", options.seed)
    donors = {str(d) for d in base.donors}
    rows: list[dict[str, Any]] = []

    def control_row(what: str, cells: ad.AnnData) -> None:
        rows.append({"data": name, "what": what, "cells": "control", **control_errors(cells, test, case, projection)})

    is_control = (train.obs[case.keys["perturbation_key"]].astype(str) == case.control).to_numpy()
    own = train.obs[case.keys["donor_key"]].astype(str)
    control_row("other donors, real", train[is_control & own.isin(donors).to_numpy()])
    nearest = {
        d: control_errors(train[is_control & (own == d).to_numpy()], case.adata[query], case, projection)
        for d in donors
    }
    best = min(nearest, key=lambda d: nearest[d]["profile_rmse"])
    control_row("nearest donor, real", train[is_control & (own == best).to_numpy()])
    for n in NUMBERS[1:]:
        control_row(f"{n} query cells, real", case.adata[query[:n]])

    baselines: tuple[str, ...] = BASELINES
    for what, model in models(case, base, query, options, name):
        cells = model.generate(conditions=conditions_of(test, case), seed=options.seed)
        control_row(what, cells)
        table = metrics.evaluate(
            test, cells, train=train, profile=list(SCORED), baselines=list(baselines), ceilings=False, seed=0
        )
        columns = {"value": what, **{f"baseline_{b}": f"baseline {b}" for b in baselines}}
        for column, label in columns.items():
            means = table.groupby("metric")[column].mean()
            rows.append({"data": name, "what": label, "cells": "perturbed", **means.to_dict()})
        baselines = ()  # they are the same for all
        show(pd.DataFrame(rows).round(4).to_string())
    return rows


def models(case: Case, base: Any, query: np.ndarray, options: argparse.Namespace, name: str) -> Any:
    """Yield the extended models, and one that was trained with the query cells."""
    for n in NUMBERS:
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if n == 0 else "default")
            cells = case.adata[np.sort(query[:n])].copy() if n else None
            model = base.extend(cells, donor=case.new, seed=options.seed)
        show(f"{name}: extended by {n} cells in {time.process_time() - start:.1f} s of CPU")
        yield f"extended by {n} cells", model
    if not options.no_retraining:
        rows = np.concatenate([case.rows(new=False), query])
        yield f"trained with {len(query)} cells", trained(case, rows, options.models / f"{name}_ceiling", options.seed)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["kang", "simulated"], nargs="+", default=["kang", "simulated"])
    parser.add_argument("--models", type=Path, required=True, help="folder for trained models, taken if there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default=None, help="small for kang and tiny for the simulated cells by default")
    parser.add_argument("--no-retraining", action="store_true", help="leave out the model trained with the query cells")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder that holds data/")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the table")
    options = parser.parse_args(argv)
    rows = [row for name in options.data for row in run(name, options)]
    show(pd.DataFrame(rows).round(4).to_string())
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

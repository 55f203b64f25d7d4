"""Measure predictions of conditions that were never seen, beside simple baselines.

Whole conditions are held out whose perturbation and context both occur in training; a model is trained on the rest for
each of them and each seed, and kept in a folder, so that several ways to generate are scored on the same networks::

    python benchmarks/transfer.py --models models --seeds 0 1 2 --out transfer.json

``--development`` takes other hold-outs, for choices that must not be made on the named ones. The data files are not
part of the project; ``--shared`` names the folder that holds ``data/``.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from quality import SHARED, load, show
from scldm_cd4 import datasets, metrics

BASELINES = ("control", "additive", "nearest_context", "real_other_context")
HEADS = {
    "distribution": "energy_distance",
    "delta": "pearson_delta",
    "DE": "de_f1",
    "discrimination": "discrimination_cosine",
}
"""The metric that speaks for each family in the verdict."""
SHOWN = (
    *("energy_distance", "mmd2", "w2", "pearson_delta", "pearson_delta_disjoint", "l2_delta"),
    *("de_f1", "de_pr_auc", "de_precision", "de_recall", "memorisation", "variance_log2_ratio"),
)
"""Metrics of the condition alone; discrimination needs the others of its context."""
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "guided": {"guidance": 1.5},
    "counterfactual": {},
}
"""Ways to generate, as keywords of `generate`; ``counterfactual`` moves control cells of the context."""
SIMULATED = ("GATA3", "STAT6", "IFNGR1", "JAK2", "STAT1", "TBX21")
"""Perturbations of the simulator of which a context each is held out."""


@dataclass(frozen=True)
class HoldOut:
    """Cells, their columns, and the conditions that training must not see."""

    name: str
    adata: ad.AnnData
    columns: tuple[str, ...]
    """Donor, time point where there is one, and perturbation."""
    control: str
    conditions: tuple[tuple[str, ...], ...]
    control_share: float = 0.3
    """Share of the other cells of a context that is held out as well, to measure effects and to tell them apart."""
    n_genes: int | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """Keywords of `metrics.evaluate`."""
        return {
            "perturbation_key": self.columns[-1],
            "context_keys": list(self.columns[:-1]),
            "control": self.control,
        }

    def split(self) -> tuple[ad.AnnData, ad.AnnData]:
        """Hold out the conditions whole and a share of the other cells of their contexts."""
        cells = pd.MultiIndex.from_frame(self.adata.obs[list(self.columns)].astype(str))
        held, rng = cells.isin(self.conditions), np.random.default_rng(0)
        contexts = {condition[:-1] for condition in self.conditions}
        for condition in sorted(set(cells)):
            rows = np.flatnonzero(cells == condition)
            if condition[:-1] in contexts and condition not in self.conditions:
                held[rng.choice(rows, round(self.control_share * len(rows)), replace=False)] = True
        genes: Any = slice(None)
        if self.n_genes is not None:
            values = metrics.log_normalize(self.adata[~held])
            variance = np.asarray(values.multiply(values).mean(axis=0) - np.square(values.mean(axis=0))).ravel()
            genes = np.sort(np.argsort(-variance, kind="stable")[: self.n_genes])
        return self.adata[~held, genes].copy(), self.adata[held, genes].copy()


def hold_outs(data: list[str], shared: Path, *, development: bool) -> Iterator[HoldOut]:
    """Give the named hold-outs, or others to choose by."""
    if "papalexi" in data:
        cells = load("papalexi", shared)
        named = [[(rep, gene)] for gene in ("IFNGR1", "JAK2") for rep in ("rep_1", "rep_2")]
        first, second = ("CUL3", "STAT2", "NFKBIA", "MYC"), ("BRD4", "IRF7", "STAT3", "UBE2L6")
        others = [[*(("rep_1", gene) for gene in first), *(("rep_2", gene) for gene in second)]]
        for conditions in others if development else named:
            name = "papalexi " + (" ".join(reversed(conditions[0])) if len(conditions) == 1 else "others")
            yield HoldOut(name, cells.adata, ("replicate", "perturbation"), "NT", tuple(conditions))
    if "kang" in data:
        adata = ad.read_h5ad(shared / "data" / "kang_dev_5donors_paired_3ctrl_only.h5ad")
        cell_type = "CD14+ Monocytes" if development else "CD4 T cells"
        adata = adata[adata.obs["cell_type"] == cell_type].copy()
        for donor in ("1015", "1016") if development else ("1015", "1016", "101"):
            name = f"kang {cell_type} {donor}"
            yield HoldOut(name, adata, ("donor", "condition"), "ctrl", ((donor, "stim"),), 0.5, 600)
    if "simulator" in data:
        for interaction in (0.0, 0.25, 0.5):
            adata = datasets.synthetic_cd4(
                9000, 300, n_donors=3, n_timepoints=2, interaction=interaction, seed=7 if development else 1
            )
            contexts = sorted(set(zip(*(adata.obs[c].astype(str) for c in ("donor_id", "timepoint")), strict=True)))
            known = [gene for gene in SIMULATED if (adata.obs["perturbation"] == gene).any()]
            conditions = tuple((*contexts[i % len(contexts)], gene) for i, gene in enumerate(known))
            columns = ("donor_id", "timepoint", "perturbation")
            yield HoldOut(f"simulator {interaction:.0%}", adata, columns, "NTC", conditions)


def trained(hold_out: HoldOut, train: ad.AnnData, seed: int, options: argparse.Namespace) -> Any:
    """Load the model of a hold-out and seed, or train and keep it."""
    from scldm_cd4 import CD4Model

    roles = dict(zip(("donor_key", "timepoint_key"), hold_out.columns[:-1], strict=False))
    CD4Model.setup_anndata(train, perturbation_key=hold_out.columns[-1], control=hold_out.control, **roles)
    folder = options.models / f"{hold_out.name.replace(' ', '_').replace('%', '')}_{seed}"
    if folder.exists():
        return CD4Model.load(folder, train)
    start = time.process_time()
    model = CD4Model(train, config=options.preset)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        model.train(seed=seed, progress=False)
    model.save(folder)
    show(f"{hold_out.name}, seed {seed}: trained in {time.process_time() - start:.0f} CPU-seconds")
    return model


def conditions_of(cells: ad.AnnData, hold_out: HoldOut, at_least: int = 1) -> pd.DataFrame:
    """Give the perturbed conditions of some cells with their numbers of cells, raised for those held out."""
    table = cells.obs[list(hold_out.columns)].astype(str)
    table = table[table[hold_out.columns[-1]] != hold_out.control]
    out = table.groupby(list(hold_out.columns)).size().rename("n_cells").reset_index()
    held = pd.MultiIndex.from_frame(out[list(hold_out.columns)]).isin(hold_out.conditions)
    out["n_cells"] = out["n_cells"].mask(held, out["n_cells"].clip(lower=at_least))
    return out


def generate(model: Any, variant: str, conditions: pd.DataFrame, train: ad.AnnData, seed: int) -> ad.AnnData:
    """Generate cells of conditions in one of `VARIANTS`."""
    if variant != "counterfactual":
        return model.generate(conditions=conditions, seed=seed, **VARIANTS[variant])
    columns, parts, rng = list(conditions.columns[:-1]), [], np.random.default_rng(seed)
    perturbation = columns[-1]
    labels = train.obs[columns].astype(str)
    control = model.registry["control"]
    for row in conditions.itertuples(index=False):
        pool = np.flatnonzero((labels[columns[:-1]] == list(row[:-2])).all(axis=1) & (labels[perturbation] == control))
        chosen = rng.choice(pool, row.n_cells, replace=row.n_cells > len(pool))
        cells = train[chosen].copy()
        cells.obs_names_make_unique()
        parts.append(model.generate(perturbation=row[-2], cells=cells, seed=seed))
    out = ad.concat(parts, index_unique="-")
    out.uns["scldm_cd4"] = parts[0].uns["scldm_cd4"]
    return out


def table_of(
    hold_out: HoldOut, sides: tuple[ad.AnnData, ad.AnnData], pred: ad.AnnData, *, seed: int, ceilings: bool = True
) -> pd.DataFrame:
    """Score held-out conditions beside the baselines; one row per condition and metric."""
    train, test = sides
    keys = hold_out.keys | {"train": train, "baselines": BASELINES, "ceilings": ceilings, "seed": seed}
    parts = []
    for profile, real in ((SHOWN, _only(test, hold_out)), ([HEADS["discrimination"]], test)):
        wanted = pd.MultiIndex.from_frame(conditions_of(real, hold_out)[list(hold_out.columns)])
        if len(wanted) < 2 and profile != SHOWN:
            continue  # nothing to be told apart from
        own = pd.MultiIndex.from_frame(pred.obs[list(hold_out.columns)].astype(str)).isin(wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            table = metrics.evaluate(real, pred[own], profile=profile, **keys)
        columns = [table[c].astype(str) for c in (*hold_out.keys["context_keys"], "perturbation")]
        parts.append(table[pd.MultiIndex.from_arrays(columns).isin(hold_out.conditions)])
    return pd.concat(parts, ignore_index=True)


def _only(test: ad.AnnData, hold_out: HoldOut) -> ad.AnnData:
    cells = pd.MultiIndex.from_frame(test.obs[list(hold_out.columns)].astype(str))
    contexts = {condition[:-1] for condition in hold_out.conditions}
    keep = {*hold_out.conditions, *((*context, hold_out.control) for context in contexts)}
    return test[cells.isin(sorted(keep))].copy()


def standard_errors(
    hold_out: HoldOut, sides: tuple[ad.AnnData, ad.AnnData], pred: ad.AnnData, n_boot: int
) -> pd.DataFrame:
    """Bootstrap standard errors of model and baselines: held-out cells redrawn within conditions, baselines made anew.

    Returns
    -------
    One row per metric, averages over the conditions of the hold-out: ``value`` and ``baseline_<name>``.
    """
    train, test = sides
    groups = list(test.obs.groupby(list(hold_out.columns), observed=True).indices.values())
    draws = []
    for i in range(n_boot):
        rng = np.random.default_rng([i, 4])
        again = test[np.concatenate([rng.choice(rows, len(rows)) for rows in groups])].copy()
        again.obs_names_make_unique()
        draws.append(means(table_of(hold_out, (train, again), pred, seed=i, ceilings=False)))
    stacked = pd.concat(draws, keys=range(n_boot))
    return stacked.groupby(level="metric").std()


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Average the conditions of a hold-out where they are defined."""
    values = [c for c in table if c in ("value", "ceiling", "matched_value") or c.startswith("baseline_")]
    return table.groupby("metric", sort=False)[values].mean()


def verdicts(summary: pd.DataFrame, errors: pd.DataFrame) -> pd.DataFrame:
    """Say for each family how the model stands to the best baseline.

    Returns
    -------
    ``model``, ``best`` (value of the best baseline), ``which``, its ``se``, ``ceiling`` with the model in its place
    (``matched``), ``holds`` (not below the best by more than its standard error) and ``above``.
    """
    rows = []
    for family, metric in HEADS.items():
        if metric not in summary.index or summary.loc[metric].isna().all():
            continue
        sign = -1.0 if family == "distribution" else 1.0
        row = summary.loc[metric]
        others = sign * row[[f"baseline_{name}" for name in BASELINES]].astype(float).fillna(-np.inf)
        which = others.idxmax()
        se = float(errors.loc[metric, which])
        gain = sign * (row["value"] - row[which])
        rows.append(
            {
                "family": family,
                "model": row["value"],
                "best": row[which],
                "which": which.removeprefix("baseline_"),
                "se": se,
                "matched": row.get("matched_value"),
                "ceiling": row.get("ceiling"),
                "holds": bool(gain >= -se),
                "above": bool(gain > 0),
            }
        )
    return pd.DataFrame(rows).set_index("family")


def run(hold_out: HoldOut, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train or load, generate, score and print; give records."""
    sides = train, test = hold_out.split()
    show(f"\n{hold_out.name}: {train.n_obs} training, {test.n_obs} held-out cells, {train.n_vars} genes")
    records, errors = [], None
    for seed in options.seeds:
        model = trained(hold_out, train, seed, options)
        if options.train_only:
            continue
        for variant in options.variants:
            pred = generate(model, variant, conditions_of(test, hold_out, options.at_least), train, seed)
            if errors is None:
                errors = standard_errors(hold_out, sides, pred, options.n_boot)
            table = table_of(hold_out, sides, pred, seed=seed)
            summary = means(table)
            found = verdicts(summary, errors)
            show(f"\n{hold_out.name}, seed {seed}, {variant}\n{summary.round(3).to_string()}")
            show(found.round(3).to_string())
            facts = {"hold_out": hold_out.name, "seed": seed, "variant": variant, "at_least": options.at_least}
            records.append(
                facts
                | {"load_average": os.getloadavg()[0]}
                | {
                    name: json.loads(frame.reset_index().to_json(orient="records", double_precision=5))
                    for name, frame in (("table", table), ("verdict", found), ("se", errors))
                }
            )
    return records


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["papalexi", "kang", "simulator"]
    parser.add_argument("--data", choices=names, nargs="+", default=names)
    parser.add_argument("--development", action="store_true", help="other hold-outs, to choose by")
    parser.add_argument("--only", default="", help="hold-outs whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--variants", choices=list(VARIANTS), nargs="+", default=["default"])
    parser.add_argument(
        "--at-least",
        type=int,
        default=1,
        help="cells to generate of each held-out condition of fewer (of baselines too, where there are enough)",
    )
    parser.add_argument("--models", type=Path, required=True, help="folder of trained models")
    parser.add_argument("--train-only", action="store_true", help="train what is missing in the folder, no scores")
    parser.add_argument("--n-boot", type=int, default=20)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder that holds data/")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for all tables")
    options = parser.parse_args(argv)
    options.models.mkdir(parents=True, exist_ok=True)
    records = []
    for hold_out in hold_outs(options.data, options.shared, development=options.development):
        if options.only in hold_out.name:
            records += run(hold_out, options)
    if options.out is not None:
        options.out.write_text(json.dumps(records, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

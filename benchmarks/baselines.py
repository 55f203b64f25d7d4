"""Put the model beside all baselines and ceilings on real cells with combination hold-outs.

Whole conditions are held out whose perturbation and context both occur in training. The model trains on the rest; the
baselines see the same cells::

    python benchmarks/baselines.py --data papalexi kang --out docs/baselines.json

``--no-model`` prints the baselines alone, in a minute. The data files are not part of the project; ``--shared`` names
the folder that holds ``data/``.
"""

import argparse
import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scldm_cd4 import metrics

SHARED = Path(__file__).resolve().parents[2] / "shared"
SHOWN = (
    "energy_distance",
    "mmd2",
    "w2",
    "pearson_delta",
    "pearson_delta_pert",
    "l2_delta",
    "wmse",
    "discrimination_cosine",
    "de_f1",
    "de_pr_auc",
    "de_spearman_lfc",
    "memorisation",
)
"""Metrics of the printed table."""


@dataclass(frozen=True)
class Dataset:
    """Real cells, their columns, and the conditions to hold out."""

    adata: ad.AnnData
    perturbation_key: str
    context_keys: tuple[str, ...]
    control: str
    held_out: pd.DataFrame
    control_share: float

    @property
    def columns(self) -> list[str]:
        """Columns of a condition."""
        return [*self.context_keys, self.perturbation_key]


def load(name: str, shared: Path) -> Dataset:
    """Read one of the data sets and choose its hold-outs."""
    if name == "papalexi":
        adata = ad.read_h5ad(shared / "data" / "papalexi_dev.h5ad")
        pairs = [("rep_1", ("IFNGR1", "CUL3", "STAT2", "NFKBIA", "CMTM6", "ATF2"))]
        pairs += [("rep_2", ("JAK2", "BRD4", "IRF7", "MARCH8", "PDCD1LG2", "STAT5A"))]
        rows = [(context, label) for context, labels in pairs for label in labels]
        held = pd.DataFrame(rows, columns=["replicate", "perturbation"])
        return Dataset(adata, "perturbation", ("replicate",), "NT", held, 0.3)
    adata = ad.read_h5ad(shared / "data" / "kang_dev_5donors_paired_3ctrl_only.h5ad")
    types = ("CD4 T cells", "CD14+ Monocytes", "FCGR3A+ Monocytes", "B cells")
    adata = adata[adata.obs["cell_type"].isin([*types, "CD8 T cells", "NK cells"])].copy()
    rows = [("1015", "CD4 T cells"), ("1015", "CD14+ Monocytes"), ("1015", "FCGR3A+ Monocytes"), ("1015", "B cells")]
    rows += [("1016", "CD4 T cells"), ("1016", "FCGR3A+ Monocytes")]
    held = pd.DataFrame(rows, columns=["donor", "cell_type"]).assign(condition="stim")
    return Dataset(adata, "condition", ("donor", "cell_type"), "ctrl", held, 0.5)


def split(data: Dataset, seed: int = 0) -> tuple[ad.AnnData, ad.AnnData]:
    """Hold out the chosen conditions whole, and a share of the controls of their contexts."""
    obs = data.adata.obs[data.columns].astype(str)
    conditions = pd.MultiIndex.from_frame(obs)
    held = conditions.isin(pd.MultiIndex.from_frame(data.held_out[data.columns]))
    rng = np.random.default_rng(seed)
    contexts = data.held_out[list(data.context_keys)].drop_duplicates()
    for context in contexts.itertuples(index=False):
        own = conditions == (*context, data.control)
        rows = np.flatnonzero(own)
        held[rng.choice(rows, round(data.control_share * len(rows)), replace=False)] = True
    return data.adata[~held].copy(), data.adata[held].copy()


def generate(data: Dataset, train: ad.AnnData, test: ad.AnnData, options: argparse.Namespace) -> ad.AnnData:
    """Train the model and generate as many cells of each held-out condition as are real."""
    from scldm_cd4 import CD4Model

    roles = dict(zip(("donor_key", "timepoint_key"), data.context_keys, strict=False))
    CD4Model.setup_anndata(train, perturbation_key=data.perturbation_key, control=data.control, **roles)
    model = CD4Model(train, config=options.preset)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        model.train(seed=options.seed, **({} if options.max_epochs is None else {"max_epochs": options.max_epochs}))
    show(f"trained in {time.perf_counter() - start:.0f} s, load average {os.getloadavg()[0]:.1f}")
    return model.generate(conditions=conditions_of(test, data), seed=options.seed)


def conditions_of(test: ad.AnnData, data: Dataset) -> pd.DataFrame:
    """Give the held-out conditions with their numbers of cells."""
    table = test.obs[data.columns].astype(str)
    table = table[table[data.perturbation_key] != data.control]
    return table.groupby(data.columns).size().rename("n_cells").reset_index()


def evaluate(data: Dataset, train: ad.AnnData, test: ad.AnnData, pred: ad.AnnData, seed: int) -> pd.DataFrame:
    """Give the full table."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the targets of")
        table = metrics.evaluate(
            test,
            pred,
            train=train,
            perturbation_key=data.perturbation_key,
            context_keys=data.context_keys,
            control=data.control,
            profile="full",
            seed=seed,
        )
    show(f"table with all baselines and ceilings: {time.process_time() - start:.0f} CPU-seconds")
    return table


def methods(table: pd.DataFrame, *, model: bool) -> pd.DataFrame:
    """Put methods below each other, all at the cells of the ceiling, with their ranks."""
    means = metrics.aggregate(table)
    names = {c: c.removeprefix("matched_").removeprefix("baseline_") for c in means if c.startswith("matched_")}
    names |= {"ceiling": "technical_duplicate", "ceiling_interpolated": "interpolated_duplicate"}
    names["matched_value"] = "model"
    out = means[list(names)].rename(columns=names).T[[m for m in SHOWN if m in means.index]]
    ranks = metrics.rank_average(table, ceiling=True)["rank"]
    out["rank"] = ranks.rename({"ceiling": "technical_duplicate", "prediction": "model", "value": "model"})
    out = out.sort_values("rank")
    return out if model else out.drop(index="model")


def show(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables of one data set and give them as records."""
    data = load(name, options.shared)
    train, test = split(data, options.seed)
    shape = f"{train.n_obs} training, {test.n_obs} held-out cells, {train.n_vars} genes"
    show(f"\n{name}: {shape}, {len(data.held_out)} held-out conditions")
    if options.no_model:
        keys = {"perturbation_key": data.perturbation_key, "context_keys": data.context_keys, "control": data.control}
        pred = metrics.baselines.predict("control", train, conditions_of(test, data), **keys)
    else:
        pred = generate(data, train, test, options)
    table = evaluate(data, train, test, pred, options.seed)
    found = {"methods": methods(table, model=not options.no_model)}
    if not options.no_model:
        for baseline in ("control", "additive_shrunk", "two_way"):
            found[f"anchored score of the model, baseline {baseline}"] = metrics.score(
                table, baseline, intervals=True, n_boot=options.n_boot, seed=options.seed
            ).loc[[m for m in SHOWN if m != "memorisation"]]
    for title, frame in found.items():
        show(f"\n{title}\n{frame.round(3).to_string()}")
    records = {
        title: json.loads(frame.to_json(orient="table", double_precision=4))["data"] for title, frame in found.items()
    }
    return {"cells": shape, "load_average": os.getloadavg()[0], **records}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["papalexi", "kang"], nargs="+", default=["papalexi", "kang"])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--max-epochs", type=int, default=None, help="instead of the preset's default")
    parser.add_argument("--no-model", action="store_true", help="baselines and ceilings only")
    parser.add_argument("--n-boot", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder that holds data/")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for all tables")
    options = parser.parse_args(argv)
    found = {name: run(name, options) for name in options.data}
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

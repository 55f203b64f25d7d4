"""Measure how good generated cells are on real data.

Trains a model per seed and prints its scores beside floor, baseline and ceiling::

    python benchmarks/quality.py --data papalexi --seeds 0 1 2 --out papalexi.json

20 % of the cells of every condition are held out. ``protocol.py`` says how cells are scored. The data files are not
part of the project; ``--shared`` names the folder that holds ``data/``.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.stats import ks_2samp

from protocol import ANCHORED, ConditionScorer, no_effect, summarise, upper
from scldm_cd4 import metrics

SHARED = Path(__file__).resolve().parents[2] / "shared"
STRONG = ("NT", "IFNGR1", "IFNGR2", "JAK2", "STAT1", "SMAD4", "IRF1")


@dataclass(frozen=True)
class Dataset:
    """Real cells, the columns of their conditions, and what a linear probe should find in the embedding."""

    adata: ad.AnnData
    perturbation_key: str
    donor_key: str
    control: str
    probe_key: str
    probe_levels: tuple[str, ...] | None = None  # None: all
    n_genes: int | None = None  # keep the most variable genes of the training cells
    scored: bool = True  # generated cells are scored, not only the embedding


def load(name: str, shared: Path) -> Dataset:
    """Read one of the data sets."""
    data = shared / "data"
    if name == "papalexi":
        adata = ad.read_h5ad(data / "papalexi_dev.h5ad")
        return Dataset(adata, "perturbation", "replicate", "NT", "perturbation", STRONG)
    if name == "pbmc":
        adata = ad.read_h5ad(data / "kang2018_pbmc_2donors_ifnb.h5ad")
        return Dataset(adata, "condition", "donor", "ctrl", "cell_type", scored=False)
    adata = ad.read_h5ad(data / "kang_dev_5donors_paired_3ctrl_only.h5ad")
    adata = adata[adata.obs["cell_type"] == "CD4 T cells"].copy()
    return Dataset(adata, "condition", "donor", "ctrl", "condition", n_genes=600 if name == "kang600" else None)


def hold_out(data: Dataset, *, share: float = 0.2, seed: int = 0) -> tuple[ad.AnnData, ad.AnnData]:
    """Hold out a seeded share of the cells of every condition; choose the gene panel on the training cells."""
    rng = np.random.default_rng(seed)
    held = np.zeros(data.adata.n_obs, dtype=bool)
    groups = data.adata.obs.groupby([data.perturbation_key, data.donor_key], observed=True).indices
    for rows in groups.values():
        held[rng.choice(rows, round(share * len(rows)), replace=False)] = True
    genes = slice(None)
    if data.n_genes is not None:
        values = metrics.log_normalize(data.adata[~held])
        variance = np.asarray(values.multiply(values).mean(axis=0) - np.square(values.mean(axis=0))).ravel()
        genes = np.sort(np.argsort(-variance, kind="stable")[: data.n_genes])
    return data.adata[~held, genes].copy(), data.adata[held, genes].copy()


def conditions_of(test: ad.AnnData, data: Dataset, blocks: int) -> pd.DataFrame:
    """Ask for ``blocks`` times as many cells per condition as are held out."""
    table = test.obs.groupby([data.perturbation_key, data.donor_key], observed=True).size().rename("n_cells")
    return (table * blocks).reset_index().astype({data.perturbation_key: str, data.donor_key: str})


def count_checks(scorer: ConditionScorer, generated: Any) -> pd.Series:
    """Compare zeros and library sizes of generated and held-out cells, pooled over conditions.

    As many generated blocks as every condition has enter, n cells each as held out, so both sides have the same
    composition. The floor takes n real training cells in their place, over the redraws.

    Returns
    -------
    ``zero_fraction_difference`` (generated - real), ``library_ks`` (Kolmogorov-Smirnov statistic of the panel
    totals), beside each the 95th percentile of its size between real cells, and the number of held-out cells.
    """
    test, rng = scorer.test, np.random.default_rng([scorer.seed, 3])
    cells = scorer.cells(generated)
    conditions = sorted(set(zip(test.perturbation.tolist(), test.context.tolist(), strict=True)))
    rows = [tuple(x.rows(*condition) for x in (test, cells, scorer.train)) for condition in conditions]
    rows = [(held, made, pool) for held, made, pool in rows if len(held) <= min(len(made), len(pool))]
    blocks = min((len(made) // len(held) for held, made, _ in rows), default=0)
    if not blocks:
        raise ValueError("no held-out condition has enough generated cells")
    real = _zeros_and_totals(test.counts, [held for held, _, _ in rows])
    model = _zeros_and_totals(cells.counts, [made[: blocks * len(held)] for held, made, _ in rows])
    draws = ([rng.choice(pool, len(held), replace=False) for held, _, pool in rows] for _ in range(scorer.n_redraws))
    floor = [_zeros_and_totals(scorer.train.counts, draw) for draw in draws]
    return pd.Series(
        {
            "zero_fraction_difference": model[0] - real[0],
            "zero_fraction_floor": upper(np.array([abs(draw[0] - real[0]) for draw in floor])),
            "library_ks": ks_2samp(model[1], real[1]).statistic,
            "library_ks_floor": upper(np.array([ks_2samp(draw[1], real[1]).statistic for draw in floor])),
            "n_cells": float(len(real[1])),
        }
    )


def _zeros_and_totals(counts: Any, rows: list[np.ndarray]) -> tuple[float, np.ndarray]:
    matrix = csr_matrix(counts)[np.concatenate(rows)]
    return 1.0 - matrix.count_nonzero() / np.prod(matrix.shape), np.asarray(matrix.sum(axis=1)).ravel()


def reconstruction(model: Any, train: ad.AnnData, test: ad.AnnData) -> pd.DataFrame:
    """Held-out reconstruction of the model beside a negative binomial that knows only the library size."""
    library = np.asarray(test.X.sum(axis=1)).ravel()
    share, theta = metrics.intercept_nb(train)
    expected = library[:, None] * share
    decoded = np.asarray(model.get_normalized_expression(test), dtype=np.float64)
    errors = {
        "model": float(np.mean(model.get_reconstruction_error(test))),
        "intercept-only NB": metrics.nb_error(test, expected, theta),
    }
    real, rows = metrics.log_normalize(test), []
    for name, mean in (("model", decoded), ("intercept-only NB", expected)):
        values = metrics.log_normalize(mean)
        rows.append(
            {
                "what": name,
                "nb_error": errors[name],
                "pcc_gene": metrics.pcc(real, values, axis="gene"),
                "pcc_cell": metrics.pcc(real, values, axis="cell"),
                "mse": metrics.mse(real, values),
            }
        )
    return pd.DataFrame(rows).set_index("what")


def probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """Balanced accuracy on held-out cells of a linear classifier fitted on training cells."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5000))
    classifier.fit(train_x, train_y)
    return float(balanced_accuracy_score(test_y, classifier.predict(test_x)))


def embedding(model: Any, train: ad.AnnData, test: ad.AnnData, data: Dataset) -> pd.Series:
    """Linear probe of the latent beside 30 principal components of the training cells and chance."""
    projection = metrics.fit_projection(metrics.log_normalize(train), 30)
    sides = []
    for adata in (train, test):
        labels = adata.obs[data.probe_key].astype(str).to_numpy()
        keep = np.isin(labels, data.probe_levels if data.probe_levels is not None else np.unique(labels))
        pcs = projection.apply(metrics.log_normalize(adata))
        sides.append((np.asarray(model.get_latent(adata))[keep], pcs[keep], labels[keep]))
    (latent, pcs, labels), (test_latent, test_pcs, test_labels) = sides
    return pd.Series(
        {
            "latent": probe(latent, labels, test_latent, test_labels),
            "30 PCs": probe(pcs, labels, test_pcs, test_labels),
            "chance": 1.0 / len(np.unique(labels)),
        },
        name=f"balanced accuracy of {data.probe_key}",
    )


def train_model(train: ad.AnnData, data: Dataset, seed: int, options: argparse.Namespace) -> tuple[Any, float]:
    """Train one model; give it with the seconds it took."""
    from scldm_cd4 import CD4Model

    CD4Model.setup_anndata(
        train, perturbation_key=data.perturbation_key, donor_key=data.donor_key, control=data.control
    )
    model = CD4Model(train, config=options.preset)
    start = time.perf_counter()
    model.train(seed=seed, **({} if options.max_epochs is None else {"max_epochs": options.max_epochs}))
    return model, time.perf_counter() - start


def run_seed(
    seed: int, data: Dataset, cells: tuple[ad.AnnData, ad.AnnData], scorer: ConditionScorer | None, options: Any
) -> dict[str, Any]:
    """Train, generate and score once; print the tables and give them as records."""
    train, test = cells
    model, seconds = train_model(train, data, seed, options)
    show(f"seed {seed}: trained in {seconds:.0f} s, load average {os.getloadavg()[0]:.1f}")
    result: dict[str, Any] = {"seed": seed, "train_seconds": seconds, "load_average": os.getloadavg()[0]}
    tables: dict[str, Any] = {}
    if scorer is not None:
        start = time.perf_counter()
        conditions = conditions_of(test, data, options.blocks)
        generated = model.generate(conditions=conditions, guidance=options.guidance, seed=seed)
        show(f"generated {generated.n_obs} cells in {time.perf_counter() - start:.0f} s")
        scores = scorer.score(generated)
        result["scores"] = scores.to_dict("records")
        tables.update(report(scores), counts=count_checks(scorer, generated))
    tables["reconstruction of held-out cells"] = reconstruction(model, train, test)
    tables["linear probe"] = embedding(model, train, test, data)
    for name, table in tables.items():
        show(f"\n{name}\n{table.round(3).to_string()}")
        result[name] = table.reset_index().to_dict("records") if isinstance(table, pd.DataFrame) else table.to_dict()
    return result


def report(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Cut the table of scores into what a reader wants to see."""
    columns = ["perturbation", "metric", "n", "model", "baseline", "ceiling", "score", "repeat_q05", "counted_single"]
    counted, w2 = scores[scores["counted"]], scores[scores["metric"] == "w2"]
    rest = scores[scores["metric"].isin(counted["metric"].unique()) & ~scores["counted"]]
    raw = w2.set_index("perturbation")[["n", "model", "ceiling", "baseline"]].rename(columns={"ceiling": "floor"})
    return {
        "anchored scores (gap above 3 standard errors of the means)": summarise(scores),
        "anchored scores (gap above 3 standard deviations of one draw)": summarise(scores, "counted_single"),
        "perturbations that count": counted[columns].set_index(["metric", "perturbation"]).sort_index(),
        "not counted": rest.pivot_table(index=["perturbation", "n"], columns="metric", values="model"),
        "W2, raw": raw[raw.index.isin(counted["perturbation"])],
        "significant genes of perturbations without an effect": no_effect(scores),
    }


def over_seeds(scores: list[pd.DataFrame], seeds: list[int]) -> dict[str, pd.DataFrame]:
    """Put the training seeds side by side: the median per metric, and the score of every perturbation that counts."""
    medians = pd.DataFrame({seed: summarise(table)["median"] for seed, table in zip(seeds, scores, strict=True)})
    single = [summarise(table, "counted_single")["median"] for table in scores]
    every = pd.concat(scores, keys=seeds, names=["seed"]).reset_index(level="seed")
    counted = every[every["counted"] & every["metric"].isin(ANCHORED)]
    each = counted.pivot_table(index=["metric", "perturbation", "counted_single"], columns="seed", values="score")
    return {
        "median anchored score by training seed": medians,
        "the same over perturbations that one repeat tells from the control": pd.DataFrame(
            dict(zip(seeds, single, strict=True))
        ),
        "anchored score by training seed": each,
    }


def show(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["papalexi", "kang", "kang600", "pbmc"], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the held-out cells and of the redraws")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--max-epochs", type=int, default=None, help="instead of the preset's default")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--blocks", type=int, default=5, help="generated sets of the held-out size per condition")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder that holds data/")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for all tables")
    options = parser.parse_args(argv)
    data = load(options.data, options.shared)
    train, test = hold_out(data, seed=options.split_seed)
    show(f"{options.data}: {train.n_obs} training, {test.n_obs} held-out cells, {train.n_vars} genes")
    start, scorer = time.perf_counter(), None
    if data.scored:
        keys = {"perturbation_key": data.perturbation_key, "context_key": data.donor_key, "control": data.control}
        scorer = ConditionScorer(train, test, seed=options.split_seed, **keys)
        show(f"ceilings and baselines in {time.perf_counter() - start:.0f} s")
    runs = [run_seed(seed, data, (train, test), scorer, options) for seed in options.seeds]
    if scorer is not None:
        for name, table in over_seeds([pd.DataFrame(run["scores"]) for run in runs], options.seeds).items():
            show(f"\n{name}\n{table.round(3).to_string()}")
    if options.out is not None:
        options.out.write_text(json.dumps({"options": vars(options), "runs": runs}, indent=1, default=str))


if __name__ == "__main__":
    main()

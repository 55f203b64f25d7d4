"""Rankings against known truth: quality, intervals and false discoveries; common random numbers; racing.

Cells are SIMULATED (`datasets.synthetic_cd4`), so their figures say nothing about real cells; those of `papalexi` are
real (``--shared`` names the folder that holds ``data/``, which is not part of the project)::

    OMP_NUM_THREADS=1 python benchmarks/ranking.py quality --seeds 0 1 2 --out quality.json
    OMP_NUM_THREADS=1 python benchmarks/ranking.py cost
    OMP_NUM_THREADS=1 python benchmarks/ranking.py papalexi --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/ranking.py noise
    OMP_NUM_THREADS=1 python benchmarks/ranking.py racing

`quality` trains a model with a quarter of the conditions held out and ranks these toward Th1 genes, beside the transfer
of effects from other contexts, the mean effect of the context, effect sizes and random order. `noise` and `cost` take
that model too. `racing` replaces the model's effects by draws around known ones.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

from scldm_cd4 import CD4Model, datasets
from scldm_cd4.data.cells import CellData
from scldm_cd4.metrics import ranking
from scldm_cd4.noise import stream
from scldm_cd4.ranking.effects import (
    MIN_OBSERVED,
    Change,
    Context,
    Control,
    Generated,
    Observed,
    Side,
    Summariser,
    contrast,
    jackknife_variance,
    leave_one_out,
    n_folds,
    target_genes,
)
from scldm_cd4.ranking.targets import Reader
from scldm_cd4.sampling import Sampler, Sampling

KEYS = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint", "control": "NTC"}
METHOD = "mean_diff"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def simulate(options: argparse.Namespace, seed: int) -> tuple[Any, list[dict[str, str]]]:
    """Return declared cells, and a random quarter of the conditions of each perturbation, to hold out."""
    adata = datasets.synthetic_cd4(
        options.cells, options.genes, n_perturbations=options.perturbations, no_effect_share=0.6, seed=seed
    )
    CD4Model.setup_anndata(adata, **KEYS)
    settings = adata.uns["synthetic_cd4"]
    rng = np.random.default_rng([seed, 1])
    contexts = [(d, t) for d in settings["donors"] for t in settings["timepoints"]]
    held = [
        {"perturbation": name, "donor_id": contexts[i][0], "timepoint": contexts[i][1]}
        for name in settings["perturbations"]
        for i in rng.choice(len(contexts), len(contexts) // 4, replace=False)
    ]
    return adata, held


def train(adata: Any, held: list[dict[str, str]], options: argparse.Namespace, seed: int) -> CD4Model:
    """Train without the held-out conditions."""
    name = f"{options.preset}_{options.perturbations}_{options.cells}_{seed}"
    return _fitted(adata, options, name, seed, {"conditions": held})


def _fitted(adata: Any, options: argparse.Namespace, name: str, seed: int, split: Any) -> CD4Model:
    """Train a model, or take the one that the same run kept before."""
    kept = options.models / name if options.models else None
    if kept is not None and kept.exists():
        return CD4Model.load(kept, adata)
    model = CD4Model(adata, options.preset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        model.train(seed=seed, split=split)
    if kept is not None:
        model.save(kept)
    return model


def true_effects(adata: Any, conditions: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """Return the effects (k, genes) of endless cells, differences of log1p(counts per 10,000)."""
    out = []
    for name, donor, timepoint in conditions:
        log2 = (
            adata.var["true_base_log2"]
            + adata.varm["true_timepoint_log2fc"][timepoint]
            + adata.varm["true_donor_log2fc"][donor]
        )
        share = np.exp2(log2 - log2.max())
        share = 1e4 * (share / share.sum()).to_numpy()
        change = datasets.true_log2fc(adata, name, donor, timepoint).to_numpy()
        out.append(np.log1p(share * np.exp2(change)) - np.log1p(share))
    return np.array(out)


def generated(model: CD4Model, seed: int, workers: int | None = None) -> "Kept":
    """Return the effects of a model as its ranking takes them, made once for all rankings of this run."""
    state = model._state
    sampling = model._sampling(seed=seed)
    sampler = Sampler(state.vae, state.dit, state.registry, sampling, noise_labels=lambda x: (*x[:2], None))
    return Kept(sampler, workers=workers)


@dataclass(frozen=True)
class Kept(Generated):
    """Generated effects that are kept when asked for again."""

    made: dict[Any, Any] = field(default_factory=dict)

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        """Generate the controls, or take those that were."""
        key = (tuple(contexts), n_cells)
        if key not in self.made:
            self.made[key] = super().controls(contexts, n_cells)
        return self.made[key]

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        """Generate the effects, or take those that were."""
        key = (tuple(names), tuple(controls), n_cells)
        if key not in self.made:
            self.made[key] = list(super().changes(names, controls, n_cells))
        yield from self.made[key]


def quality(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Rank held-out conditions and compare with the truth and with rankings that need no model."""
    adata, held = simulate(options, seed)
    start = time.perf_counter()
    model = train(adata, held, options, seed)
    trained = time.perf_counter()
    axis = adata.var["true_th1_axis"]
    goal = {"up": list(axis.index[axis > 0]), "down": list(axis.index[axis < 0])}
    choice: dict[str, Any] = {"donor": "each", "timepoint": "each", "method": METHOD, "seed": seed}
    source = generated(model, seed, options.workers)
    table = model.rank_perturbations(goal, effects=source, n_cells=options.n_cells, **choice)
    ranked = time.perf_counter()
    index = ["perturbation", "donor", "timepoint"]
    table = table.set_index(index)
    seen = model.rank_perturbations(goal, effects="observed", n_cells=options.n_cells, **choice).set_index(index)
    wanted = [(h["perturbation"], h["donor_id"], h["timepoint"]) for h in held]
    registry = model._state.registry
    profile = Reader(registry).read_one(goal, METHOD)
    ones = np.ones(registry.n_genes)

    def score(effects: np.ndarray, names: Sequence[str]) -> np.ndarray:
        keep = [~target_genes(registry, name) for name in names]
        return np.array([profile.score(e[None], ones, k)[0, 0] for e, k in zip(effects, keep, strict=True)])

    effects = true_effects(adata, wanted)
    truth = pd.Series(score(effects, [name for name, *_ in wanted]), index=pd.MultiIndex.from_tuples(wanted))
    out = {"seconds": {"train": trained - start, "rank": ranked - trained}, "reliability": table.attrs["reliability"]}
    out |= orders(model, adata, wanted, truth, table, score, options)
    kinds = dict(zip(adata.uns["synthetic_cd4"]["perturbations"], adata.uns["synthetic_cd4"]["kinds"], strict=True))
    has_effect = np.array([kinds[name] != "none" for name, *_ in wanted])
    out |= intervals(table.loc[wanted], seen.loc[wanted], truth, has_effect)
    every = model.rank_perturbations(goal, effects=source, n_cells=options.n_cells, method=METHOD, seed=seed)
    both = {
        "generated": every,
        "observed": model.rank_perturbations(goal, effects="observed", method=METHOD, seed=seed),
    }
    out["discoveries"] = {kind: discoveries(adata, t, score) for kind, t in both.items()}
    return out


def orders(
    model: CD4Model, adata: Any, wanted: list[Any], truth: pd.Series, table: pd.DataFrame, score: Any, options: Any
) -> dict[str, Any]:
    """Compare rankings of the held-out conditions, all in one list."""
    registry = model._state.registry
    observed = Observed(CellData.from_adata(adata, registry), registry)
    contexts = [(d, t) for d in registry.donor.levels for t in registry.timepoint.levels]
    controls = observed.controls(contexts, options.n_cells)
    names = [name for name in registry.perturbation.levels if name != registry.control]
    left_out = set(wanted)
    training = {
        ("/".join(context), name): change.delta[0]
        for name, changes in zip(names, observed.changes(names, controls, options.n_cells), strict=True)
        for context, change in changes.items()
        if (name, *context) not in left_out
    }
    keys = [(f"{donor}/{timepoint}", name) for name, donor, timepoint in wanted]
    guesses = ranking.baselines(training, keys, lambda e: score(e, [name for _, name in keys]))
    guesses.index = truth.index
    methods = {"model": table.loc[wanted, "score"], **{name: guesses[name] for name in guesses}}
    compared = ranking.compare(truth, methods, k=options.top_k)
    rng = np.random.default_rng(0)
    perturbations = truth.index.get_level_values(0).to_numpy()
    gaps = []
    for _ in range(200):
        drawn = rng.choice(np.unique(perturbations), len(np.unique(perturbations)))
        rows = np.concatenate([np.flatnonzero(perturbations == name) for name in drawn])
        values = [ranking.spearman(truth.to_numpy()[rows], methods[m].to_numpy()[rows]) for m in ("model", "transfer")]
        gaps.append(values[0] - values[1])
    return {
        "rankings": json.loads(compared.round(3).to_json(orient="index")),
        "precision_by_chance": compared.attrs["precision_by_chance"],
        "model_minus_transfer": {"spearman": float(np.mean(gaps)), "bootstrap_se": float(np.std(gaps))},
    }


def intervals(table: pd.DataFrame, seen: pd.DataFrame, truth: pd.Series, has_effect: np.ndarray) -> dict[str, Any]:
    """Return how often intervals hold the truth in held-out pairs with an effect."""
    out = {}
    for name, rows, ends in (
        ("sampling", table, ("score_lo", "score_hi")),
        ("calibrated", table, ("calibrated_lo", "calibrated_hi")),
        ("observed", seen, ("score_lo", "score_hi")),
    ):
        low, high = (rows[end].to_numpy() for end in ends)
        covered = (low <= truth.to_numpy()) & (truth.to_numpy() <= high)
        out[name] = {"coverage": float(covered[has_effect].mean()), "width": float(np.median((high - low)[has_effect]))}
    return {"intervals": out, "pairs_with_effect": int(has_effect.sum())}


def discoveries(adata: Any, table: pd.DataFrame, score: Any, fdr: float = 0.1) -> dict[str, float]:
    """Return the share of false discoveries, and the power; a true one has an effect and a score above 0."""
    settings = adata.uns["synthetic_cd4"]
    contexts = [(d, t) for d in settings["donors"] for t in settings["timepoints"]]
    truth = {
        name: float(np.mean(score(true_effects(adata, [(name, *c) for c in contexts]), [name] * len(contexts))))
        for name in table["perturbation"]
    }
    kinds = dict(zip(settings["perturbations"], settings["kinds"], strict=True))
    is_true = np.array([kinds[n] != "none" and truth[n] > 0 for n in table["perturbation"]])
    named = ((table["fdr"] < fdr) & table["passes_min_effect"]).to_numpy()
    false = float((named & ~is_true).sum() / max(named.sum(), 1))
    return {
        "named": int(named.sum()),
        "false": false,
        "power": float(named[is_true].mean()),
        "true": int(is_true.sum()),
    }


def noise(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return how many times fewer cells effects need when perturbation and control share all random numbers."""
    adata, held = simulate(options, seed)
    model = train(adata, held, options, seed)
    state = model._state
    source = generated(model, seed, options.workers)
    contexts = [(d, t) for d in state.registry.donor.levels[:2] for t in state.registry.timepoint.levels[:1]]
    names = [n for n in state.registry.perturbation.levels if n != state.registry.control][:20]
    axis = adata.var["true_th1_axis"]
    profile = Reader(state.registry).read_one({"up": list(axis.index[axis > 0])}, METHOD)
    folds = n_folds(options.n_cells)
    rows = leave_one_out(folds)
    controls = source.controls(contexts, options.n_cells)
    ones = np.ones(state.registry.n_genes)
    paired, free = [], []
    for changes in source.changes(names, controls, options.n_cells):
        for context, change in changes.items():
            arm = controls[context].arm
            first, second = (Side.of(np.hstack(x), arm) for x in ((rows, 0 * rows), (0 * rows, rows)))
            perturbed = Side(change.delta + first.profiles, first.distances, change.n_cells)
            for found, out in ((change, paired), (contrast(perturbed, second), free)):
                scores = profile.score(found.delta, ones, ones > 0)[1:, 0]
                out.append((float(jackknife_variance(scores)), jackknife_variance(found.delta[1:])))
    score = np.sum([v for v, _ in free]) / np.sum([v for v, _ in paired])
    genes = np.sum([v for _, v in free]) / np.sum([v for _, v in paired])
    return {"fewer_cells_for_score": float(score), "fewer_cells_for_effects": float(genes), "conditions": len(paired)}


def cost(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return time and memory of rankings with few cells per condition, and how well these agree with many."""
    import resource

    adata, held = simulate(options, seed)
    model = train(adata, held, options, seed)
    axis = adata.var["true_th1_axis"]
    goal = {"up": list(axis.index[axis > 0]), "down": list(axis.index[axis < 0])}
    names = [name for name in model.perturbations if name != "NTC"]

    def ranked(n: int, n_cells: int) -> tuple[pd.Series, float]:
        start = time.process_time()
        table = model.rank_perturbations(
            goal,
            perturbations=names[:n],
            donor=model.donors[0],
            timepoint=model.timepoints[0],
            method=METHOD,
            n_cells=n_cells,
            seed=seed,
        )
        return table.set_index("perturbation")["score"], time.process_time() - start

    out: dict[str, Any] = {"load": os.getloadavg(), "threads": torch.get_num_threads()}
    for n in (20, len(names)):
        few, seconds = ranked(n, options.n_cells)
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cells = options.n_cells * (n + 2)  # twice as many of the control
        out[f"{n} candidates"] = {"cells": cells, "cpu_seconds": seconds, "per_cpu_s": cells / seconds, "peak_mib": mib}
    some = len(names) // 2
    many, _ = ranked(some, options.many)
    both = pd.DataFrame({"few": few, "many": many}).dropna()
    out["agreement"] = {
        "candidates": len(both),
        "cells": [options.n_cells, options.many],
        "spearman": ranking.spearman(both["many"], both["few"]),
        "top_10": ranking.precision_at_k(both["many"], both["few"], 10),
    }
    conditions = len(names) * len(model.donors) * len(model.timepoints)
    rate = out[f"{len(names)} candidates"]["per_cpu_s"]
    out["all_contexts"] = {"conditions": conditions, "cpu_minutes": conditions * options.n_cells / rate / 60}
    return out


class Draws:
    """Effects of known size along one direction, with independent noise of cells."""

    name = "simulated"

    def __init__(self, truth: Mapping[str, float], direction: np.ndarray, sd: float, seed: int) -> None:
        self.truth, self.direction, self.sd, self.seed, self.n_drawn = truth, direction, sd, seed, 0

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        """Return a control of even expression."""
        from scipy import sparse

        counts = stream(self.seed, ("control",), n_cells, "draws").poisson(50.0, (2 * n_cells, len(self.direction)))
        control = Summariser().control(sparse.csr_matrix(counts), 2 * n_folds(n_cells))
        return dict.fromkeys(contexts, control)

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        """Draw effects; cells with the same number have the same noise, however many are asked for."""
        folds = n_folds(n_cells)
        rows = leave_one_out(folds)
        fold = np.arange(n_cells) * folds // n_cells
        members = (fold == np.arange(folds)[:, None]) / np.bincount(fold)[:, None]
        for name in names:
            out = {}
            for context in controls:
                cells = stream(self.seed, (name, *context), 0, "draws").normal(size=(n_cells, len(self.direction)))
                means = rows @ (members @ cells * self.sd) / rows.sum(axis=1, keepdims=True)
                delta = self.truth[name] * self.direction + means
                out[context] = Change(delta, np.zeros((folds + 1, 0, 2)), 2 / n_cells, n_cells)
                self.n_drawn += n_cells
            yield out


def racing(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return cells and recall of the true top 100 of 2,000 with and without racing."""
    from scldm_cd4.data.setup import fit_registry
    from scldm_cd4.generation import Trained
    from scldm_cd4.ranking import rank_perturbations

    adata = datasets.synthetic_cd4(200, 60, n_perturbations=2, n_donors=1, n_timepoints=1, seed=seed)
    CD4Model.setup_anndata(adata, **KEYS)
    registry = fit_registry(adata)
    names = [f"candidate{i:04d}" for i in range(options.candidates)]
    registry = replace(registry, perturbation=replace(registry.perturbation, levels=("NTC", *names)))
    rng = np.random.default_rng(seed)
    has_effect = rng.random(len(names)) < 0.3
    truth = dict(zip(names, np.where(has_effect, rng.laplace(scale=1.0, size=len(names)), 0.0).tolist(), strict=True))
    weights = rng.normal(size=registry.n_genes)
    target = pd.Series(weights, index=registry.genes)
    direction = weights / np.linalg.norm(weights)
    k = 100
    best = set(sorted(names, key=lambda n: -truth[n])[:k])

    def run(n_cells: int, *, race: bool) -> dict[str, float]:
        source = Draws(truth, direction, options.sd, seed)
        trained: Any = Trained(None, None, registry, {})  # type: ignore[arg-type]
        no_model = SimpleNamespace(adata=None, _trained=lambda: trained, _sampling=lambda **_: Sampling(seed=seed))
        table = rank_perturbations(
            no_model,
            target,
            effects=source,
            method="projection",
            n_cells=n_cells,
            racing=race,
            top_k=k,
            n_boot=20,
        )
        recall = len(best & set(table["perturbation"][:k])) / k
        return {"n_cells": n_cells, "cells": source.n_drawn, "recall": recall}

    even = [run(n, race=False) for n in (20, 40, 80, 160, 320, 640, 1280)]
    raced = [run(n, race=True) for n in (64, 256, 1024, 4096)]
    for row in raced:
        enough = [e["cells"] for e in even if e["recall"] >= row["recall"]]
        row["times_fewer"] = min(enough) / row["cells"] if enough else float("nan")
    return {"uniform": even, "racing": raced}


def papalexi(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Rank real knock-outs toward the signature of IFNGR1 in the replicate that the model never saw.

    How well the other members of its pathway separate from the rest, by generated and by observed effects. Two or
    three members among some twenty knock-outs make wide intervals.
    """
    import anndata as ad

    members = ("JAK2", "IFNGR2", "STAT1", "IRF1")
    cells = ad.read_h5ad(options.shared / "data" / "papalexi_dev.h5ad")
    signatures = {name: _ifngr1(cells[cells.obs["replicate"] == name]) for name in ("rep_1", "rep_2")}
    out: dict[str, Any] = {}
    for unseen, signature in signatures.items():
        adata = cells[cells.obs["replicate"] != unseen].copy()
        CD4Model.setup_anndata(adata, perturbation_key="perturbation", control="NT")
        model = _fitted(adata, options, f"papalexi_without_{unseen}_{seed}", seed, None)
        cells_of = adata.obs["perturbation"].value_counts()
        others = [x for x in model.perturbations if x not in ("NT", "IFNGR1") and cells_of[x] >= MIN_OBSERVED]
        known = np.isin(others, members)
        found = {}
        for effects in ("generated", "observed", "both"):
            table = model.rank_perturbations(signature, perturbations=others, effects=effects, seed=seed)
            scores = table.set_index("perturbation")["score"]
            area, low, high = ranking.bootstrap_auroc(known, scores.loc[others].to_numpy(), seed=seed)
            ranks = {name: int(rank) for name, rank in zip(table["perturbation"], table["rank"], strict=True)}
            found[effects] = {
                "auroc": area,
                "ci": [low, high],
                "ranks": {name: ranks[name] for name in members if name in ranks},
            }
        out[f"signature of {unseen}"] = found | {"scored": len(others)}
    return out


def _ifngr1(cells: Any) -> pd.Series:
    """Return differences of the pseudobulk log1p(counts per 10,000), IFNGR1 - NT."""
    sums = [
        np.asarray(cells.X[(cells.obs["perturbation"] == name).to_numpy()].sum(axis=0)) for name in ("IFNGR1", "NT")
    ]
    up, down = (np.log1p(1e4 * x.ravel() / x.sum()) for x in sums)
    return pd.Series(up - down, index=cells.var_names)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "cost", "papalexi", "noise", "racing"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cells", type=int, default=60_000)
    parser.add_argument("--genes", type=int, default=500)
    parser.add_argument("--perturbations", type=int, default=200)
    parser.add_argument("--n-cells", type=int, default=32)
    parser.add_argument("--many", type=int, default=200, help="cells that few are compared with")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--sd", type=float, default=1.0, help="noise of one cell, in units of the effects")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--workers", type=int, help="threads that generate; all cores if not given")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder that holds data/")
    parser.add_argument("--models", type=Path, help="folder to keep trained models in")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = {"quality": quality, "cost": cost, "papalexi": papalexi, "noise": noise, "racing": racing}[options.what]
    results = {str(seed): work(options, seed) for seed in options.seeds}
    text = json.dumps({"what": options.what, "simulated": options.what != "papalexi", "results": results}, indent=1)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

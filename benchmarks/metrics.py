"""Time the metrics and their memory.

One prediction of 100 perturbations x 200 cells x 3,699 genes, profile ``full``, without ceilings and baselines; then
the table with all baselines and ceilings; then the rank tests beside tie-corrected scanpy, interleaved in one run::

    OMP_NUM_THREADS=1 python benchmarks/metrics.py --out metrics.json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

CONTROL = "NTC"
KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "context_keys": [], "control": CONTROL}


def simulate(n_perturbations: int, n_cells: int, n_control: int, n_genes: int, seed: int) -> ad.AnnData:
    """Draw SIMULATED counts: negative binomial, about 10 % not zero, each perturbation with its own effects."""
    truth, rng = np.random.default_rng(7), np.random.default_rng([8, seed])
    base = truth.lognormal(-3.2, 1.7, n_genes)
    sizes = [n_control, *[n_cells] * n_perturbations]
    blocks = []
    for size in sizes:
        effect = truth.normal(0.0, 0.8, n_genes) * (truth.random(n_genes) < 0.05) * bool(blocks)
        depth = rng.lognormal(0.0, 0.35, size)
        mean = depth[:, None] * base * np.exp(effect)
        blocks.append(sp.csr_matrix(rng.poisson(mean * rng.gamma(2.0, 0.5, mean.shape)).astype(np.float32)))
    names = [CONTROL, *(f"P{i:03d}" for i in range(n_perturbations))]
    obs = pd.DataFrame({"perturbation": np.repeat(names, sizes)}, index=[f"c{i}" for i in range(sum(sizes))])
    return ad.AnnData(
        sp.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    )


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """CPU and wall seconds of some work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def peak() -> float:
    """Most memory that this process has held, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def table(options: argparse.Namespace, *, everything: bool) -> dict[str, float]:
    """Evaluate one prediction; give seconds and memory."""
    from scldm_cd4 import metrics

    shape = (options.perturbations, options.cells, options.controls, options.genes)
    real, pred, train = (simulate(*shape, seed) for seed in (0, 1, 2))
    before = peak()
    more: dict[str, Any] = {} if everything else {"baselines": [], "ceilings": False}
    found = timed(lambda: metrics.evaluate(real, pred, train=train, profile="full", n_repeats=1, **more, **KEYS))
    return {**found, "peak_gb": peak(), "input_gb": before}


def rank_tests(options: argparse.Namespace) -> dict[str, Any]:
    """Time rank tests of some groups, ours and tie-corrected scanpy by turns; compare log10 p."""
    import scanpy as sc

    from scldm_cd4 import metrics

    real = simulate(options.perturbations, options.cells, options.controls, options.genes, 0)
    values = metrics.log_normalize(real)
    codes, keys = metrics.condition_codes([real.obs["perturbation"]])
    groups = [key[-1] for key in keys if key[-1] != CONTROL][: options.scanpy_groups]
    few = np.isin(real.obs["perturbation"], [CONTROL, *groups])
    normalised = ad.AnnData(values[few], obs=real.obs[few].copy(), var=real.var)
    normalised.obs["perturbation"] = normalised.obs["perturbation"].astype("category")
    ours, theirs, found = [], [], {}

    def own() -> None:
        controls = metrics.control_ranks(values, codes, keys, control=CONTROL)
        found["own"] = metrics.de_tests(values, codes, keys, controls, control=CONTROL)

    def other() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sc.tl.rank_genes_groups(
                normalised, "perturbation", groups=groups, reference=CONTROL, method="wilcoxon", tie_correct=True
            )

    for _ in range(options.repeats):
        ours.append(timed(own)["cpu_seconds"] / options.perturbations)
        theirs.append(timed(other)["cpu_seconds"] / len(groups))
    differences = []
    for group in groups:
        expected = sc.get.rank_genes_groups_df(normalised, group).set_index("names")["pvals"].reindex(real.var_names)
        p = found["own"].p[[key[-1] for key in found["own"].keys].index(group)]
        both = (p > 1e-300) & (expected.to_numpy() > 1e-300)
        differences.append(np.abs(np.log10(p[both]) - np.log10(expected.to_numpy()[both])))
    apart = np.concatenate(differences)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "cpu_seconds_per_group": float(np.median(ours)),
        "scanpy_cpu_seconds_per_group": float(np.median(theirs)),
        "ratios": [round(r, 1) for r in ratios],
        "max_log10_p_difference": float(apart.max()),
        "q999_log10_p_difference": float(np.quantile(apart, 0.999)),
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "full": lambda options: table(options, everything=False),
    "all_baselines_and_ceilings": lambda options: table(options, everything=True),
    "rank_tests": rank_tests,
}


def main(argv: list[str] | None = None) -> None:
    """Run each part in a process of its own, so that memory is told apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perturbations", type=int, default=100)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--controls", type=int, default=3000)
    parser.add_argument("--genes", type=int, default=3699)
    parser.add_argument("--scanpy-groups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(argv)
    if options.only:
        print(json.dumps({**PARTS[options.only](options), "load_average": os.getloadavg()[0]}))
        return
    found = {}
    for part in options.parts:
        arguments = [a for a in (argv or sys.argv[1:]) if a]
        done = subprocess.run([sys.executable, __file__, *arguments, "--only", part], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(
            part,
            json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found[part].items()}),
            flush=True,
        )
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

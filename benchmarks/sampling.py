"""Generation beside a sampler in the manner of the reference, solvers by their error, memory, start, attention.

    python -m benchmarks sampling guidance --model FOLDER    one pass against doubled batch and two passes, equal solver
    python -m benchmarks sampling whole --model FOLDER       cells per second of both samplers, and the factors
    python -m benchmarks sampling solvers --model FOLDER     error against RK4-100: latents, mean effects, DE genes
    python -m benchmarks sampling memory --model FOLDER      peak memory of 2,000 and of 20,000 cells to disk
    python -m benchmarks sampling cold --model FOLDER        seconds from a fresh process to the first cell
    python -m benchmarks sampling attention                  written out against the fused kernel, by shape
    python -m benchmarks sampling precision --model FOLDER   fp32 through MKL and oneDNN, and bf16
    python -m benchmarks sampling compiled --model FOLDER    latents and cells with the flow network compiled

FOLDER is a saved model. Ways take turns in one process and are compared by CPU seconds; one thread.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.measure import cpu_seconds, ratio, report
from benchmarks.rival import Rival, velocity
from torch import Tensor

from scldm_cd4 import CD4Model
from scldm_cd4._precision import Precision, matmul_error
from scldm_cd4.conditions import Request, resolve_requests
from scldm_cd4.config import ROLES
from scldm_cd4.flow import solve
from scldm_cd4.flow.solvers import evaluations
from scldm_cd4.nn import layers
from scldm_cd4.sampling import Sampler, Sampling, Segment, WorkUnit, plan_units

SOLVERS = [("midpoint", n) for n in (4, 5, 6, 10)] + [("ab2", n) for n in (8, 10, 12, 16)] + [("heun", 6), ("rk4", 3)]
SHAPES = [(4, 8, 8, 16), (4, 16, 16, 32), (4, 600, 16, 16), (8, 32, 32, 64), (4, 64, 64, 64), (8, 128, 128, 64)]
SHAPES += [(8, 256, 256, 64), (4, 3699, 256, 64)]
"""Heads, queries, keys, width of a head: presets tiny and small, between, and the released size."""


def sampler_of(model: CD4Model, **options: Any) -> Sampler:
    """Return the sampler of a model, with the defaults of `generate`."""
    state = model._state
    sampling = Sampling.resolve(model.device, seed=0, **options)
    return Sampler(state.vae, state.dit, state.registry, sampling)


def segments(model: CD4Model, n_cells: int, names: Any = None) -> list[Segment]:
    """Return the cells of perturbations, by default the control, in the first context."""
    registry = model._state.registry
    requests = resolve_requests(
        registry,
        perturbation=names or registry.control,
        donor=model.donors[0],
        timepoint=model.timepoints[0],
        n_cells=n_cells,
        conditions=None,
        used=frozenset(ROLES),
    )
    return [segment for request in requests for unit in plan_units([request], 2**20) for segment in unit.segments]


def states(model: CD4Model, n_cells: int, names: Any = None) -> tuple[Sampler, np.ndarray, np.ndarray]:
    """Return a sampler, and noise and codes of the cells of `segments`."""
    sampler, parts = sampler_of(model), segments(model, n_cells, names)
    codes = [np.tile(sampler.codes(s.labels), (len(s), 1)) for s in parts]
    return sampler, np.concatenate([sampler._noise(s) for s in parts]), np.concatenate(codes)


def guidance(options: argparse.Namespace) -> None:
    """Time the way to the conditional velocity at guidance 1, with the network and the solver of the package."""
    model = CD4Model.load(options.model)
    sampler, noise, codes = states(model, options.cells)
    x, labels, dit = torch.from_numpy(noise), torch.from_numpy(codes), model._state.dit
    null = dit.unconditional.expand(2 * len(x), -1)

    def redundant(state: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        v = dit(state, t, null)
        return v + 1.0 * (dit(state, t, labels) - v)

    out: dict[str, Tensor] = {}

    @torch.inference_mode()
    def ours() -> None:
        out["ours"] = solve(sampler.velocity, x, labels, solver="midpoint", n_steps=2)

    @torch.inference_mode()
    def rival() -> None:
        twice, both = torch.cat([x, x]), torch.cat([labels, labels])
        out["rival"] = solve(redundant, twice, both, solver="midpoint", n_steps=2)[: len(x)]

    times = cpu_seconds({"ours": ours, "rival": rival}, rounds=options.rounds)
    difference = float((out["ours"] - out["rival"]).abs().max())
    value = ratio(times, "rival", "ours")
    report("guidance path", times, value=value, goal=3.8, per=len(x), limit=4.0, largest_difference=difference)


def whole(options: argparse.Namespace) -> None:
    """Time both samplers from noise to counts, and the factors between them."""
    model = CD4Model.load(options.model)
    state, sampler = model._state, sampler_of(model, output="counts")
    _, noise, codes = states(model, options.cells)
    x, labels = torch.from_numpy(noise), torch.from_numpy(codes)
    log_sizes = np.log(sampler._library(segments(model, len(x))[0]))
    sizes = {"_".join(str(c) for c in row[:2]): (float(log_sizes.mean()), float(log_sizes.std())) for row in codes}
    rival = Rival(state.vae, state.dit)
    units = list(plan_units([Request(s.labels, len(s)) for s in segments(model, len(x))], sampler.sampling.batch_size))

    def ours() -> None:
        for unit in units:
            sampler.run(unit)

    def reference() -> None:
        rival.evaluations = 0
        rival.cells(x, labels, sizes)

    t = torch.full((len(x),), 0.4)
    flow_ways = {
        "network": lambda: state.dit(x, t, labels),
        "plain network": lambda: velocity(state.dit, x, t, labels),
    }
    times = cpu_seconds({"ours": ours, "rival": reference}, rounds=options.rounds)
    with torch.inference_mode():
        kernels = cpu_seconds(flow_ways, rounds=3 * options.rounds)
    mine = evaluations(sampler.sampling.solver, sampler.sampling.n_steps) or 0
    factors = {"redundancy": 4.0, "evaluations": rival.evaluations / mine, "precision": 1.0}
    factors["kernel"] = ratio(kernels, "plain network", "network")
    medians = {k: float(np.median(v)) for k, v in times.items()}
    report(
        f"whole sampler, {state.vae.n_genes} genes",
        times,
        value=ratio(times, "rival", "ours"),
        goal=25.0,
        per=len(x),
        **{f"factor_{k}": v for k, v in factors.items()},
        product=float(np.prod(list(factors.values()))),
        evaluations_of_rival=rival.evaluations,
        evaluations_of_ours=mine,
        precision=sampler.sampling.precision,
        cells_per_second_ours=len(x) / medians["ours"],
        cells_per_second_rival=len(x) / medians["rival"],
    )


def log_normal(x: np.ndarray) -> np.ndarray:
    """log1p(counts per 10,000)."""
    return np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1.0))


def solvers(options: argparse.Namespace) -> None:
    """Print the errors of solvers against RK4-100, in latents, mean effects and significant genes."""
    from scipy.stats import false_discovery_control, mannwhitneyu

    model = CD4Model.load(options.model)
    registry = model._state.registry
    seen = [p for p in model.perturbations if p != registry.control]
    seen.sort(key=lambda p: -registry.n_train(p, model.donors[0], model.timepoints[0]))
    names = [registry.control, *(options.perturbations or seen[:7])]
    sampler, noise, codes = states(model, options.cells, names)
    control = registry.perturbation.levels.index(registry.control)
    uniforms = np.random.default_rng(0).random((options.draws, len(codes), sampler.vae.n_genes))
    sizes = np.concatenate([sampler._library(s) for s in segments(model, options.cells)])
    library = np.tile(sizes, len(names))  # the same sizes for every condition, as in a ranking

    def carry(solver: str, n_steps: int) -> tuple[np.ndarray, float]:
        way = Sampler(sampler.vae, sampler.dit, sampler.registry, Sampling(0, "latent", solver=solver, n_steps=n_steps))
        start = time.process_time()
        return way.flow(noise, codes), time.process_time() - start

    def measured(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[set[int]]]:
        means = log_normal(sampler.express(z, codes, library, None).astype(np.float64))
        drawn = [sampler.express(z, codes, library, u).toarray().astype(np.float64) for u in uniforms]
        counts, labels = log_normal(np.concatenate(drawn)), np.tile(codes[:, 2], options.draws)
        base, control_cells = labels == control, codes[:, 2] == control
        found, effects = [], []
        for code in sorted(set(codes[:, 2].tolist()) - {control}):
            p = np.nan_to_num(mannwhitneyu(counts[labels == code], counts[base], axis=0).pvalue, nan=1.0)
            found.append(set(np.flatnonzero(false_discovery_control(p) < 0.05)))
            effects.append(means[codes[:, 2] == code].mean(0) - means[control_cells].mean(0))
        return np.array(effects), counts, found

    truth, _ = carry("rk4", 100)
    effects, counts, found = measured(truth)
    sd, expressed = counts.std(0) + 1e-9, counts.mean(0) > 0.05
    print(f"{len(codes)} cells, {len(effects)} perturbations, {sum(map(len, found))} significant genes in all")
    chosen = [(name, int(n)) for name, n in (text.split(":") for text in options.solvers or ())]
    for solver, n_steps in chosen or SOLVERS:
        z, seconds = carry(solver, n_steps)
        mine, _, genes = measured(z)
        shift = ((mine - effects) / sd)[:, expressed]
        union = sum(len(a | b) for a, b in zip(genes, found, strict=True))
        row = {
            "solver": solver,
            "n_steps": n_steps,
            "evaluations": evaluations(solver, n_steps),
            "latent_error": float(np.sqrt(np.square(z - truth).mean()) / truth.std()),
            "effect_error": float(np.sqrt(np.square(shift).mean())),
            "effect_error_worst_gene": float(np.abs(shift).max()),
            "de_jaccard": sum(len(a & b) for a, b in zip(genes, found, strict=True)) / max(union, 1),
            "cpu_ms_per_cell": 1e3 * seconds / len(codes),
        }
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    print("load", [round(x, 1) for x in os.getloadavg()])


CHILD = """
import json, resource, sys, time
from scldm_cd4 import CD4Model, settings
settings.progress, settings.num_workers = False, 1
model = CD4Model.load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.generate(model.perturbations[0], model.donors[0], model.timepoints[0], n_cells=int(sys.argv[2]), seed=0,
               solver="euler", n_steps=1, out=sys.argv[3]).file.close()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"loaded_mb": before / 1024, "peak_mb": after / 1024}))
"""


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of fresh processes that write cells to disk; one step, as steps do not change it."""
    peaks = {}
    for n_cells in (2000, 20_000):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", CHILD, str(options.model), str(n_cells), f"{folder}/cells.h5ad"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[n_cells] = json.loads(done.stdout.splitlines()[-1])
        print(n_cells, "cells", peaks[n_cells], flush=True)
    value = peaks[20_000]["peak_mb"] / peaks[2000]["peak_mb"]
    print(json.dumps({"name": "memory of 20,000 over 2,000 cells", "value": round(value, 4), "goal": 1.1}))


def cold(options: argparse.Namespace) -> None:
    """Print the seconds of fresh processes from start to the first cell."""
    code = (
        "import sys; from scldm_cd4 import CD4Model; m = CD4Model.load(sys.argv[1]); "
        "m.generate(m.perturbations[0], m.donors[0], m.timepoints[0], n_cells=1, seed=0)"
    )
    for name, command in (("import scldm_cd4", ["import scldm_cd4"]), ("first cell", [code, str(options.model)])):
        for _ in range(options.rounds):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, "-c", *command], check=True)
            wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            load = round(os.getloadavg()[0], 1)
            print(
                json.dumps({"name": name, "wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "load": load})
            )


def attention(options: argparse.Namespace) -> None:
    """Print the time of attention written out over that of the fused kernel, by shape."""
    written = layers.EXPLICIT_ATTENTION_KEYS
    for n_heads, queries, keys, d in SHAPES:
        b = max(1, 2**21 // (n_heads * queries * max(keys, d)))
        q, k, v = (torch.randn(b, n_heads, n, d) for n in (queries, keys, keys))

        def attend(limit: int, tensors: tuple[Tensor, ...] = (q, k, v)) -> Tensor:
            layers.EXPLICIT_ATTENTION_KEYS = limit
            return layers.attend(*tensors)

        ways = {"written": partial(attend, 10**9), "fused": partial(attend, 0)}
        with torch.inference_mode():
            times = cpu_seconds(ways, rounds=options.rounds)
            exact = attend(10**9, (q.double(), k.double(), v.double()))
            errors = {f"error_{name}": float((way() - exact).norm() / exact.norm()) for name, way in ways.items()}
            difference = float((attend(10**9) - attend(0)).abs().max())
        row = {"heads": n_heads, "queries": queries, "keys": keys, "width": d, "difference": difference} | errors
        print(json.dumps(row | {"fused_over_written": round(ratio(times, "fused", "written"), 2)}), flush=True)
    layers.EXPLICIT_ATTENTION_KEYS = written
    print("written out up to", written, "keys; load", round(os.getloadavg()[0], 1))


def precision(options: argparse.Namespace) -> None:
    """Print the time and error of the network's velocity by arithmetic."""
    model = CD4Model.load(options.model)
    _, noise, codes = states(model, options.cells)
    dit, x, labels = model._state.dit, torch.from_numpy(noise), torch.from_numpy(codes)
    t = torch.full((len(x),), 0.4)
    ways = {name: Precision(kind, "cpu", m) for name, kind, m in PRECISIONS}
    out = {}

    def way(name: str) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            with ways[name].context():
                out[name] = dit(x, t, labels).double()

        return run

    times = cpu_seconds({name: way(name) for name in ways}, rounds=options.rounds)
    plain = out["fp32 (MKL)"]
    for name, arithmetic in ways.items():
        with arithmetic.matmuls():
            product = matmul_error()
        difference = float((out[name] - plain).norm() / plain.norm())
        row = {"precision": name, "speed_over_mkl": ratio(times, "fp32 (MKL)", name), "velocity_difference": difference}
        print(json.dumps(row | {"product_error": product, "load": round(os.getloadavg()[0], 1)}), flush=True)


PRECISIONS = (("fp32 (MKL)", "fp32", "highest"), ("fp32 (oneDNN)", "fp32", "medium"), ("bf16", "bf16", "highest"))


def compiled(options: argparse.Namespace) -> None:
    """Time latents and whole cells with and without a compiled flow network; print what compiling takes."""
    model = CD4Model.load(options.model)
    cells = WorkUnit(0, tuple(segments(model, options.cells)))
    ways, out, start = {}, {}, time.process_time()
    for name, compile in (("plain", False), ("compiled", True)):
        for output in ("latent", "counts"):
            sampler = sampler_of(model, output=output, compile=compile)
            ways[f"{output}, {name}"] = partial(sampler.run, cells)
            out[output, compile] = sampler.run(cells).values
    start = time.process_time() - start
    times = cpu_seconds(ways, rounds=options.rounds)
    z, other = (out["latent", compile] for compile in (False, True))
    facts = {"relative_difference": float(np.linalg.norm(other - z) / np.linalg.norm(z))}
    different = abs(out["counts", True] - out["counts", False]).nnz
    facts |= {"counts_that_differ": different / np.prod(out["counts", False].shape), "first_calls_s": start}
    for output in ("latent", "counts"):
        own = {way: t for way, t in times.items() if way.startswith(output)}
        value = ratio(own, f"{output}, plain", f"{output}, compiled")
        report(f"flow network compiled, {output}", own, value=value, goal=1.0, per=options.cells, **facts)


def main(argv: list[str] | None = None) -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {f.__name__: f for f in (guidance, whole, solvers, memory, cold, attention, precision, compiled)}
    parser.add_argument("what", choices=ways)
    parser.add_argument("--model", type=Path, help="folder of a saved model")
    parser.add_argument("--cells", type=int, default=64, help="cells, of each condition for solvers")
    parser.add_argument("--perturbations", nargs="*", help="for solvers; the most frequent ones by default")
    parser.add_argument("--solvers", nargs="*", help="such as midpoint:6, in place of all")
    parser.add_argument("--draws", type=int, default=1, help="counts drawn of each latent, for solvers")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if options.model is None and options.what != "attention":
        parser.error("--model is needed: a folder written by model.save")
    torch.set_num_threads(1)
    ways[options.what](options)


if __name__ == "__main__":
    main()

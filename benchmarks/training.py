"""Training steps beside the matrix products in them, fused against plain AdamW, cached latents against encoding anew.

    python -m benchmarks training steps --preset small
    python -m benchmarks training steps --preset cd4 --batch 4 --precision bf16
    python -m benchmarks training cache --preset cd4 --batch 8
    python -m benchmarks training optimizer
    python -m benchmarks training subset --preset small
    python -m benchmarks training memory --preset small

``steps`` records every matrix product of one training step (forward, backward, attention as its products) and runs them
alone, at the same shapes, strides and types into memory that is already there. The fraction is the time of the products
over the time of the step.
"""

import argparse
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks.encoding import EXPRESSED, PANEL, plain_encode, simulated
from benchmarks.measure import cpu_seconds, ratio, report
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scldm_cd4._precision import choose
from scldm_cd4.config import PRESETS, ModelConfig
from scldm_cd4.data.matrix import expressed_batch
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.train.ema import EMA
from scldm_cd4.train.memory import kept_memory
from scldm_cd4.train.plans import FlowPlan, StagePlan, VAEPlan

aten = torch.ops.aten
VOCABULARY = (4, 3, 100)
GOALS = {"fp32": 0.85, "bf16": 0.5}
Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Products(TorchDispatchMode):
    """Counts the matrix products made inside, by shapes, strides and types of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Spec, Spec]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.bmm.default):
            self._add(args[0], args[1])
        elif func in (aten.addmm.default, aten.baddbmm.default):
            self._add(args[1], args[2])
        elif "scaled_dot_product" in func.__name__:
            self._attention(*args[1:4] if "backward" in func.__name__ else args[:3], "backward" in func.__name__)
        return func(*args, **(kwargs or {}))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
        """Add the two products of attention, or the four of its gradient: of weights, values, queries and keys."""
        weights = q.new_empty(*q.shape[:-1], k.shape[-2])
        pairs = [(q, k.mT), (weights, v)]
        if backward:
            pairs = [(q, v.mT), (weights.mT, q), (weights, k), (weights.mT, q)]
        for a, b in pairs:
            self._add(a.flatten(0, 1), b.flatten(0, 1))

    def _add(self, a: Tensor, b: Tensor) -> None:
        self.counts[_spec(a), _spec(b)] += 1

    @property
    def flops(self) -> float:
        """Additions and multiplications of all of them."""
        return sum(2.0 * n * torch.Size(a[0]).numel() * b[0][-1] for (a, b), n in self.counts.items())

    def replay(self) -> Callable[[], None]:
        """Return a function that makes all of them again, from and into memory of their own."""
        calls = []
        for (a, b), n in self.counts.items():
            x, y = _like(a), _like(b)
            product = torch.bmm if x.ndim == 3 else torch.mm
            calls.append((product, x, y, product(x, y), n))

        def run() -> None:
            for product, x, y, out, n in calls:
                for _ in range(n):
                    product(x, y, out=out)

        return run


def _spec(x: Tensor) -> Spec:
    return tuple(x.shape), tuple(x.stride()), x.dtype


def _like(spec: Spec) -> Tensor:
    shape, stride, dtype = spec
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return torch.randn(size).to(dtype).as_strided(shape, stride)


class Step:
    """One training step of a plan on a batch, as the training loop makes it."""

    def __init__(self, plan: StagePlan, batch: dict[str, Tensor], *, bf16: bool = False, fused: bool = True) -> None:
        c = plan.config
        self.plan, self.batch, self.bf16 = plan.train(), batch, bf16
        options = {"lr": 1e-6, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        self.optimizer = torch.optim.AdamW(plan.parameter_groups(), **options, **({"fused": True} if fused else {}))
        self.ema = (
            EMA(plan.network, decay=c.ema_decay, every=c.ema_every, after=0) if isinstance(plan, FlowPlan) else None
        )

    def __call__(self) -> None:
        """Make the step."""
        generator = torch.Generator().manual_seed(0)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss, _ = self.plan.step_loss(self.batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.plan.network.parameters(), self.plan.config.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.plan.network)


def vae_plan(config: ModelConfig, n_genes: int) -> VAEPlan:
    """Make a fresh autoencoder in training."""
    torch.manual_seed(0)
    return VAEPlan(VAE(config.vae, n_genes, VOCABULARY), config.train_vae, 0)


def vae_batch(config: ModelConfig, n_genes: int, n_expressed: int, batch: int) -> dict[str, Tensor]:
    """Make a batch of simulated counts as the loader gives it."""
    counts = simulated(batch, n_genes, n_expressed)
    out = {"target": torch.from_numpy(counts.toarray())}
    if config.vae.encode == "expressed":
        genes, values = expressed_batch(counts)
        out |= {"genes": torch.from_numpy(genes), "counts": torch.from_numpy(values)}
    return out


def flow_plan(config: ModelConfig) -> FlowPlan:
    """Make a fresh flow network in training."""
    torch.manual_seed(0)
    vae = config.vae
    return FlowPlan(DiT(config.flow, vae.latent_tokens, vae.n_channels, VOCABULARY), config.train_flow, 0)


def flow_batch(config: ModelConfig, batch: int) -> dict[str, Tensor]:
    """Make a batch of latents and labels."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, config.vae.latent_tokens, config.vae.n_channels, generator=generator)
    labels = torch.stack([torch.randint(n, (batch,), generator=generator) for n in VOCABULARY], 1)
    return {"latent": latent, "labels": labels}


def steps(options: argparse.Namespace) -> None:
    """Time both training steps beside their matrix products."""
    config, bf16 = PRESETS[options.preset], options.precision == "bf16"
    n_genes, n_expressed = PANEL[options.preset], EXPRESSED[options.preset]
    size = options.batch or {"cd4": 4}.get(options.preset, config.train_vae.batch_size)
    made = {
        "autoencoder": lambda: (vae_plan(config, n_genes), vae_batch(config, n_genes, n_expressed, size)),
        "flow": lambda: (flow_plan(config), flow_batch(config, size)),
    }
    arithmetic = choose("bf16" if bf16 else "fp32", torch.device("cpu"))
    for name, make in made.items():
        if options.stage not in (None, name):
            continue
        step = Step(*make(), bf16=bf16)
        with arithmetic.matmuls(), kept_memory():
            with Products() as products:
                step()
            if options.compile:
                step.plan.compile_step()
            times = cpu_seconds({"step": step, "products": products.replay()}, rounds=options.rounds)
        value = 1.0 / ratio(times, "step", "products")
        rate = products.flops / sorted(times["products"])[len(times["products"]) // 2] / 1e9
        facts = {"gflop_per_step": products.flops / 1e9, "gflops_of_products": rate, "batch": size, "limit": 1.0}
        facts |= {
            "compiled": options.compile,
            "arithmetic": arithmetic.name,
            "cells_per_core_second": size / sorted(times["step"])[options.rounds // 2],
        }
        title = f"share of matrix products in the {name} step, {options.preset}, {options.precision}"
        report(title, times, value=value, goal=GOALS[options.precision], **facts)


def cache(options: argparse.Namespace) -> None:
    """Time a flow step on cached latents beside one that encodes its cells first."""
    config = PRESETS[options.preset]
    config = replace(config, vae=replace(config.vae, encode="all", mask_padding=False))
    n_genes, size = PANEL[options.preset], options.batch or {"cd4": 4}.get(options.preset, 64)
    vae = vae_plan(config, n_genes).vae.eval()
    target = vae_batch(config, n_genes, EXPRESSED[options.preset], size)["target"]
    genes = torch.arange(1, n_genes + 1).expand(size, -1)
    step = Step(flow_plan(config), flow_batch(config, size))

    def encode_and_step() -> None:
        with torch.no_grad():
            step.batch["latent"] = plain_encode(vae, target, genes)
        step()

    with choose("fp32", torch.device("cpu")).matmuls(), kept_memory():
        with Products() as in_step:
            step()
        with Products() as in_both:
            encode_and_step()
        times = cpu_seconds({"encoder in the loop": encode_and_step, "cached": step}, rounds=options.rounds)
    value, limit = ratio(times, "encoder in the loop", "cached"), in_both.flops / in_step.flops
    facts = {"limit_by_operations": limit, "fraction_of_limit": value / limit, "batch": size}
    report(f"flow epoch from cached latents, {options.preset}", times, value=value, goal=1.13, **facts)


def optimizer(options: argparse.Namespace) -> None:
    """Time fused AdamW beside the default on the weights of a preset's flow network."""
    config = PRESETS[options.preset]
    ways = {}
    for name, fused in (("default", False), ("fused", True)):
        step = Step(flow_plan(config), {}, fused=fused)
        for p in step.plan.network.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        ways[name] = step.optimizer.step
    times = cpu_seconds(ways, rounds=options.rounds)
    n = sum(p.numel() for p in step.plan.network.parameters())
    report(f"fused AdamW, {options.preset}", times, value=ratio(times, "default", "fused"), goal=2.0, parameters=n)


def subset(options: argparse.Namespace) -> None:
    """Time autoencoder steps that decode some genes beside steps that decode all."""
    config = PRESETS[options.preset]
    n_genes, size = options.genes or PANEL[options.preset], options.batch or config.train_vae.batch_size
    batch = vae_batch(config, n_genes, options.expressed or n_genes * 13 // 100, size)
    ways = {}
    for name, width in (("all genes", None), ("some genes", config.train_vae.genes_per_step)):
        plan = vae_plan(replace(config, train_vae=replace(config.train_vae, genes_per_step=width)), n_genes)
        ways[name] = Step(plan, batch)
    with choose("fp32", torch.device("cpu")).matmuls(), kept_memory():
        times = cpu_seconds(ways, rounds=options.rounds)
    value = ratio(times, "all genes", "some genes")
    report(f"decoding some genes, {options.preset}", times, value=value, goal=1.5, genes=n_genes, batch=size)


def memory(options: argparse.Namespace) -> None:
    """Time autoencoder steps that keep their memory beside steps that give it back, and count cleared pages."""
    config = PRESETS[options.preset]
    size = options.batch or config.train_vae.batch_size
    step = Step(
        vae_plan(config, PANEL[options.preset]),
        vae_batch(config, PANEL[options.preset], EXPRESSED[options.preset], size),
    )
    faults: Counter[str] = Counter()

    def some_steps(name: str) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            step()
        faults[name] = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4

    def kept() -> None:
        with kept_memory():
            some_steps("kept")

    times = cpu_seconds({"given back": lambda: some_steps("given back"), "kept": kept}, rounds=options.rounds)
    facts = {f"pages_{name.replace(' ', '_')}": n for name, n in faults.items()} | {"batch": size}
    value = ratio(times, "given back", "kept")
    report(f"memory kept from step to step, {options.preset}", times, value=value, goal=1.1, per=4, **facts)


def main(argv: list[str] | None = None) -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"steps": steps, "cache": cache, "optimizer": optimizer, "subset": subset, "memory": memory}
    parser.add_argument("what", choices=sorted(ways))
    parser.add_argument("--preset", choices=sorted(PANEL), default=None)
    parser.add_argument("--stage", choices=["autoencoder", "flow"], default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--genes", type=int, default=None, help="size of the panel, for subset")
    parser.add_argument("--expressed", type=int, default=None, help="genes with counts in each cell, for subset")
    parser.add_argument("--compile", action="store_true", help="compile the steps")
    parser.add_argument("--precision", choices=sorted(GOALS), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    options.preset = options.preset or {"optimizer": "cd4"}.get(options.what, "small")
    torch.set_num_threads(options.threads)
    ways[options.what](options)


if __name__ == "__main__":
    main()

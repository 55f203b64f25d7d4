"""What a run will take: memory, disk and hours for a data set and a machine, from counted operations and a short probe.

Operations are counted by running the very networks once, not by formulas beside them. A probe times them on this
machine; for a machine that is named, hours are operations over what its matrix units reach, times a share of that.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scldm_cd4._errors import DataError
from scldm_cd4.config import ModelConfig, StageConfig
from scldm_cd4.flow.solvers import evaluations
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.sampling import Sampling
from scldm_cd4.train.plans import FlowPlan, VAEPlan
from scldm_cd4.train.rng import isolated_rng
from scldm_cd4.train.stage import n_epochs

SHARE = 0.4
"""Of the limit of matrix units that a well-fed network is taken to reach; the limit stands beside it in every plan."""
LINK = 50e9
"""Bytes per second at which devices exchange gradients."""
OBS_BYTES = 100
"""Labels, library size and name of a cell."""
CSR_BYTES = 8
"""Of a count other than zero in an h5ad file without compression: float32, and int32 for the gene."""
STATES = 5
"""Copies of the weights in training: the weights, gradients, two moments of AdamW, the average."""


@dataclass(frozen=True)
class Machine:
    """Devices that share the work."""

    name: str
    n_devices: int
    flops: float
    """Operations per second of one device that matrix units reach."""
    memory: float
    """Bytes of one device."""
    share: float
    """Of `flops` that is taken for hours; 1 where the operations per second were measured on these networks."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Measured operations per second by part of the work, in place of `flops`."""

    def seconds(self, work: "Work", parts: Mapping[str, int]) -> float:
        """Return the seconds of one device at the limit for one cell, which takes each part so many times."""
        return sum(n * getattr(work, part) / self.rates.get(part, self.flops) for part, n in parts.items())


DEVICES = {"H200": (790e12, 141e9), "H100": (790e12, 80e9)}
"""bf16 operations per second that large matrix products reach, and bytes of memory."""


@dataclass(frozen=True)
class Work:
    """Operations of one cell in every part of a model, and what the probe saw."""

    vae_step: float
    """Operations per cell and training step, backward pass included."""
    flow_step: float
    encode: float
    decode: float
    velocity: float
    """One evaluation of the velocity."""
    vae_parameters: int
    flow_parameters: int
    vae_activations: int
    """Bytes per cell that a training step of the autoencoder keeps for its backward pass, fp32."""
    flow_activations: int
    rates: dict[str, float]
    """Operations per second of one core of this machine, by part; empty without a probe."""


def measure(
    config: ModelConfig, n_genes: int, *, vocabulary: tuple[int, int, int] = (20, 4, 100), seconds: float = 2.0
) -> Work:
    """Count the operations of a model, and time them on this machine.

    Parameters
    ----------
    config
        The model.
    n_genes
        Its genes.
    vocabulary
        Numbers of donors, time points and perturbations.
    seconds
        To time each part for; 0 counts only.
    """
    with isolated_rng(0):
        vae = VAE(config.vae, n_genes, vocabulary)
        dit = DiT(config.flow, config.vae.latent_tokens, config.vae.n_channels, vocabulary)
    vae_plan, flow_plan = VAEPlan(vae, config.train_vae, 0), FlowPlan(dit, config.train_flow, 0)
    generator = torch.Generator().manual_seed(0)
    genes = torch.arange(1, n_genes + 1)

    def vae_step(n: int) -> Any:
        counts = torch.poisson(torch.full((n, n_genes), 0.3), generator=generator)
        loss, _ = vae_plan.step_loss({"counts": counts, "target": counts}, generator)
        return loss

    def flow_step(n: int) -> Any:
        latent = torch.randn(n, config.vae.latent_tokens, config.vae.n_channels, generator=generator)
        loss, _ = flow_plan.step_loss({"latent": latent, "labels": torch.zeros(n, 3, dtype=torch.long)}, generator)
        return loss

    def encode(n: int) -> Any:
        return vae.encode(torch.ones(n, n_genes), genes.expand(n, -1))

    latent = torch.zeros(1, config.vae.latent_tokens, config.vae.n_channels)

    def decode(n: int) -> Any:
        return vae.decode(latent.expand(n, -1, -1), genes, torch.ones(n, 1), torch.zeros(n, 3, dtype=torch.long))

    def velocity(n: int) -> Any:
        return dit(latent.expand(n, -1, -1), torch.zeros(n), torch.zeros(n, 3, dtype=torch.long))

    parts: dict[str, Callable[[int], Any]] = {
        "vae_step": vae_step,
        "flow_step": flow_step,
        "encode": encode,
        "decode": decode,
        "velocity": velocity,
    }
    counted = {name: _count(part) for name, part in parts.items()}
    rates = {name: counted[name] / _seconds_per_cell(part, seconds) for name, part in parts.items()} if seconds else {}
    return Work(
        **counted,
        vae_parameters=sum(p.numel() for p in vae.parameters()),
        flow_parameters=sum(p.numel() for p in dit.parameters()),
        vae_activations=_kept_bytes(vae_step),
        flow_activations=_kept_bytes(flow_step),
        rates=rates,
    )


def _run(part: Callable[[int], Any], n: int) -> None:
    """Run a part; one that gives a loss also goes backward."""
    out = part(n)
    if isinstance(out, torch.Tensor) and out.ndim == 0:
        out.backward()


def _count(part: Callable[[int], Any]) -> float:
    """Return the operations of one cell; attention is counted in its plain form, as fused kernels are not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _run(part, 1)
    return float(counter.get_total_flops())


def _kept_bytes(step: Callable[[int], Any], n: int = 2) -> int:
    """Return the bytes per cell that a step keeps for its backward pass."""

    def kept(size: int) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_leaf or not tensor.requires_grad:
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step(size)
        del loss
        return sum(seen.values())

    return max(0, (kept(2 * n) - kept(n)) // n)


def _seconds_per_cell(part: Callable[[int], Any], seconds: float) -> float:
    """Return processor seconds per cell with one thread; the batch doubles until a pass takes a quarter of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n, spent = 1, 0.0
        while spent < seconds / 4 and n < 256:
            n = n if spent == 0 else 2 * n
            start = time.process_time()
            _run(part, n)  # with what the backward pass needs, also forward: a few percent slow
            spent = time.process_time() - start
        return max(spent, 1e-9) / n
    finally:
        torch.set_num_threads(threads)


def this_machine(work: Work) -> Machine:
    """Return the cores of this machine as devices, at the rates that the probe measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    return Machine("core of this machine", cores, min(work.rates.values()), memory, 1.0, work.rates)


def named_machine(name: str, n_devices: int) -> Machine:
    """Return devices by name.

    Raises
    ------
    DataError
        The name is unknown.
    """
    if name not in DEVICES:
        raise DataError(f"unknown device {name!r}; known: {', '.join(DEVICES)}, or 'this' for a probe of this machine")
    flops, memory = DEVICES[name]
    return Machine(name, n_devices, flops, memory, SHARE)


def plan(
    config: ModelConfig,
    work: Work,
    machine: Machine,
    *,
    n_cells: int,
    n_genes: int,
    n_generated: int | None = None,
    solver: str | None = None,
    n_steps: int | None = None,
    density: float = 0.13,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Return what each stage takes.

    Parameters
    ----------
    n_cells
        Training cells.
    n_generated
        Cells to generate; as many as there are training cells by default. Guidance other than 1 doubles the cost.
    density
        Share of counts other than zero.
    batch_size
        Cells per step and device in both stages; None takes the configuration's.

    Returns
    -------
    One row per stage: ``cells`` (of all epochs), ``gflop_per_cell``, ``hours_at_limit``, ``hours`` (at the share of the
    limit that is taken for real, and with the exchange of gradients beside the computation), ``device_gb`` (in
    training, weights, gradients, moments, average and what the backward pass needs; a file read in a stream takes
    little), ``disk_gb`` (counts, latents, generated counts; nothing is compressed). ``attrs`` says on what.

    Raises
    ------
    DataError
        The solver adapts its steps.
    """
    solver, n_steps = solver or Sampling.solver, n_steps or Sampling.n_steps
    n_velocities = evaluations(solver, n_steps)
    if n_velocities is None:
        raise DataError(f"the solver {solver!r} decides itself how often it evaluates the velocity: plan another")
    n_generated = n_cells if n_generated is None else n_generated
    latents = n_cells * 4 * config.vae.latent_tokens * config.vae.n_channels
    per_cell = n_genes * density * CSR_BYTES + OBS_BYTES
    k, rows = machine.n_devices, []
    for name, parts, disk in (("vae", {"vae_step": 1}, n_cells * per_cell), ("flow", {"flow_step": 1}, latents)):
        stage: StageConfig = getattr(config, f"train_{name}")
        size, kept = getattr(work, f"{name}_parameters"), getattr(work, f"{name}_activations")
        batch = stage.batch_size if batch_size is None else batch_size
        epochs = n_epochs(stage, n_cells, k * batch)
        exchange = epochs * math.ceil(n_cells / (k * batch)) * 8 * size * (k - 1) / k / LINK
        rows.append((f"train {name}", n_cells * epochs, parts, exchange, STATES * 4 * size + batch * kept, disk))
    weights = 4 * (work.vae_parameters + work.flow_parameters)
    rows.append(("encode", n_cells, {"encode": 1}, 0.0, weights, latents))
    parts = {"velocity": n_velocities, "decode": 1}
    rows.append(("generate", n_generated, parts, 0.0, weights, n_generated * per_cell))
    out = {}
    for name, cells, parts, exchange, memory, disk in rows:
        limit = cells * machine.seconds(work, parts) / k
        out[name] = {
            "cells": cells,
            "gflop_per_cell": sum(n * getattr(work, part) for part, n in parts.items()) / 1e9,
            "hours_at_limit": limit / 3600,
            "hours": (limit / machine.share + exchange) / 3600,
            "device_gb": memory / 1e9,
            "disk_gb": disk / 1e9,
        }
    table = pd.DataFrame.from_dict(out, orient="index").rename_axis("stage")
    table.attrs = {
        "machine": f"{k} x {machine.name}",
        "tflops_per_device": machine.flops / 1e12,
        "share": machine.share,
        "evaluations": n_velocities,
        "fits": bool((table["device_gb"] * 1e9 < machine.memory).all()),
    }
    return table


def sentences(table: pd.DataFrame) -> str:
    """Return a plan as text for people."""
    facts = table.attrs
    shown = table.assign(cells=table["cells"].map("{:,}".format)).round(
        {"gflop_per_cell": 3, "hours_at_limit": 2, "hours": 2, "device_gb": 2, "disk_gb": 1}
    )
    measured = "measured here, one thread to a core, and no better on a busy machine"
    taken = f"{facts['share']:.0%} of {facts['tflops_per_device']:.0f} TFLOP/s are taken for hours"
    lines = [
        f"{facts['machine']}: {measured if facts['share'] == 1 else taken}",
        shown.to_string(),
        f"generate: {facts['evaluations']} evaluations of the velocity per cell at guidance 1, twice as many elsewhere",
        "train flow and encode share the latents on disk; units of generated cells take as much again until joined",
    ]
    if not facts["fits"]:
        lines.append("a stage does not fit in the memory of a device: take a smaller --batch-size")
    return "\n".join(lines)

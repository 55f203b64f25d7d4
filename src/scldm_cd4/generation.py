"""Generated and counterfactual cells as AnnData."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse

from scldm_cd4._console import tracked
from scldm_cd4._errors import DataError
from scldm_cd4._parallel import in_order, one_thread_each
from scldm_cd4._settings import settings
from scldm_cd4.conditions import Request, known_label
from scldm_cd4.config import ROLES
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.noise import stream
from scldm_cd4.output import (
    UNITS,
    describe_cells,
    describe_counterfactuals,
    describe_genes,
    describe_latents,
    gene_positions,
)
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import (
    Drawn,
    Sampler,
    Sampling,
    draw,
    given_library,
    resolve_library,
    role_columns,
)
from scldm_cd4.sinks import MemorySink, collect, file_sink
from scldm_cd4.train.latents import encode_rows


@dataclass(frozen=True)
class Trained:
    """What generation needs of a trained model."""

    vae: VAE
    dit: DiT
    registry: Registry
    provenance: dict[str, str]
    """Of the model, for ``uns``."""


def generate_cells(
    trained: Trained,
    sampling: Sampling,
    requests: Sequence[Request],
    *,
    size_factors: Any = None,
    genes: Any = None,
    out: Any = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Any:
    """Draw the cells of requests; see `scldm_cd4.CD4Model.generate`."""
    registry = trained.registry
    positions = gene_choice(registry, sampling, genes)
    library = resolve_library(registry, requests, size_factors)
    sampler = Sampler(trained.vae, trained.dit, registry, sampling)
    sink = MemorySink() if out is None else file_sink(out, overwrite=overwrite)
    try:
        units = draw(sampler, requests, library, workers)
        with closing(_told(units, sum(r.n_cells for r in requests), in_memory=out is None)) as drawn:
            sizes = collect(drawn, sink, positions)
        obs = describe_cells(registry, requests, sizes)
        return sink.finish(obs, _var(trained, sampling, positions), provenance(trained, sampling, size_factors))
    except BaseException:
        sink.abort()
        raise


def counterfactual_cells(
    trained: Trained,
    sampling: Sampling,
    cells: CellData,
    labels: Mapping[str, Any],
    *,
    size_factors: Any = None,
    genes: Any = None,
    out: Any = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Any:
    """Give cells as they would be under other labels; see `scldm_cd4.CD4Model.generate`.

    Each cell is encoded, carried back to noise under its own labels at guidance 1, and forward under the new ones.
    Counts are drawn anew, with random numbers keyed by the name of the cell: two counterfactuals of a cell share them.
    """
    registry = trained.registry
    positions = gene_choice(registry, sampling, genes)
    source, target = _relabel(registry, cells, labels)
    given = None if size_factors is None else given_library(size_factors, cells.n_cells)
    sampler = Sampler(trained.vae, trained.dit, registry, sampling)
    names = _unique_names(cells.obs_names)
    conditional = sampler.velocity_at(1.0)

    def run(rows: NDArray[np.int64]) -> Drawn:
        latent = encode_rows(trained.vae, cells, rows, batch_size=len(rows)).numpy()
        noise = sampler.flow(latent, source[rows], reverse=True, velocity=conditional)
        latent = sampler.flow(noise, target[rows])
        own = np.asarray(cells.counts(rows).sum(axis=1), dtype=np.float64).ravel()
        library = own if given is None else given[rows]
        if sampling.output == "latent":
            return Drawn(latent.reshape(len(rows), -1), library)
        uniforms = None
        if sampling.output != "mean":
            streams = (stream(sampling.seed, names[row], "cell", "counts") for row in rows)
            uniforms = np.stack([s.random(registry.n_genes) for s in streams])
        return Drawn(sampler.express(latent, target[rows], library, uniforms), library)

    sink = MemorySink() if out is None else file_sink(out, overwrite=overwrite)
    chunks = (
        np.arange(i, min(i + sampling.batch_size, cells.n_cells)) for i in range(0, cells.n_cells, sampling.batch_size)
    )
    try:
        with (
            one_thread_each(sampler.device, workers) as n,
            closing(_told(in_order(run, chunks, n), cells.n_cells, in_memory=out is None)) as drawn,
        ):
            sizes = collect(drawn, sink, positions)
        dropped = [role for role in ROLES if role not in sampler.used]
        obs = describe_counterfactuals(registry, cells.obs_names, source, target, dropped, sizes)
        uns = provenance(trained, sampling, "cells" if size_factors is None else size_factors)
        uns["scldm_cd4"]["counterfactual"] = True
        return sink.finish(obs, _var(trained, sampling, positions), uns)
    except BaseException:
        sink.abort()
        raise


def _told(drawn: Iterator[Drawn], n_cells: int, *, in_memory: bool) -> Generator[Drawn, None, None]:
    """Yield drawn cells, and tell how far they have come."""
    return tracked(
        drawn,
        n_cells,
        "generating",
        "cells",
        size=lambda part: part.values.shape[0],
        n_bytes=_bytes if in_memory else None,
        progress=settings.progress,
    )


def _bytes(part: Drawn) -> int:
    values = part.values
    return int(
        sum(x.nbytes for x in (values.data, values.indices, values.indptr)) if issparse(values) else values.nbytes
    )


def provenance(trained: Trained, sampling: Sampling, size_factors: Any) -> dict[str, Any]:
    """Return ``uns``: keys, units, and how the cells came about; plain values that every file can hold."""
    registry = trained.registry
    guidance = sampling.guidance
    facts: dict[str, Any] = {f"{role}_key": column for role, column in role_columns(registry).items()}
    if registry.control is not None:
        facts["control"] = registry.control
    kind = "drawn per context" if size_factors is None else size_factors if isinstance(size_factors, str) else "given"
    facts |= trained.provenance | {
        "output": sampling.output,
        "units": UNITS[sampling.output],
        "solver": sampling.solver,
        "n_steps": sampling.n_steps,
        "guidance": dict(guidance) if isinstance(guidance, Mapping) else float(guidance),
        "guidance_interval": dict(zip(("from", "to"), map(float, sampling.guidance_interval), strict=True)),
        "seed": sampling.seed,
        "precision": sampling.precision,
        "compiled": sampling.compile,
        "batch_size": sampling.batch_size,
        "device": str(next(trained.dit.parameters()).device),
        "torch_version": str(torch.__version__),
        "size_factors": kind,
    }
    return {"scldm_cd4": facts}


def gene_choice(registry: Registry, sampling: Sampling, genes: Any) -> NDArray[np.int64] | None:
    """Return the positions of the genes that are asked for, or None for all."""
    if sampling.output == "latent" and genes is not None:
        raise DataError("genes= has no meaning for output='latent'")
    return gene_positions(registry, genes)


def _var(trained: Trained, sampling: Sampling, positions: NDArray[np.int64] | None) -> Any:
    if sampling.output == "latent":
        return describe_latents(trained.vae.config.latent_tokens * trained.vae.config.n_channels)
    return describe_genes(trained.registry, positions)


def _relabel(
    registry: Registry, cells: CellData, labels: Mapping[str, Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the codes of the cells' own labels and of the new ones, (n, 3) each."""
    if cells.labels is None:
        raise DataError("the labels of the cells are needed to carry them back to noise")
    if all(value is None for value in labels.values()):
        raise DataError("say what to change: give perturbation=, donor= or timepoint= with cells=")
    target = cells.labels.copy()
    for position, attribute in enumerate(registry.attributes):
        for label in attribute.decode(np.unique(cells.labels[:, position])):
            known_label(registry, attribute, label)
        value = labels[attribute.role]
        if value is None:
            continue
        if not isinstance(value, str | bytes) and np.ndim(value) != 0:
            raise DataError(f"cells= takes one {attribute.role}, not several: call generate once for each")
        target[:, position] = attribute.encode(known_label(registry, attribute, value))[0]
    return cells.labels, target


def _unique_names(names: Any) -> list[tuple[str, str]]:
    """Return name and number of occurrence of every cell."""
    seen: dict[str, int] = {}
    out = []
    for name in map(str, names):
        seen[name] = seen.get(name, -1) + 1
        out.append((name, str(seen[name])))
    return out

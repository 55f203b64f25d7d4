"""Generation by work units, from the request to one file; the units are in `units`, who computes them in `engines`."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from scldm_cd4._console import tracked
from scldm_cd4._errors import DataError
from scldm_cd4._settings import settings
from scldm_cd4.conditions import Request, resolve_requests
from scldm_cd4.engines import Engine, resolve_engine
from scldm_cd4.generation import Trained, gene_choice, provenance
from scldm_cd4.output import describe_genes, describe_latents
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import Sampling, resolve_library, used_roles
from scldm_cd4.sinks import file_sink, written_fact
from scldm_cd4.units import (
    ENDING,
    Job,
    RunFolder,
    all_levels,
    compute,
    describe_request,
    describe_unit,
)

HASH = "request_hash"


def generate_divided(
    model: Any,
    engine: Any,
    labels: Mapping[str, Any],
    *,
    n_cells: Any = None,
    conditions: Any = None,
    seed: int | None = None,
    sampling: Mapping[str, Any],
    **options: Any,
) -> Path | None:
    """Generate cells of a `scldm_cd4.CD4Model` by an engine; see its `generate` and `generate_units`.

    Without a seed, a run that was begun goes on with its own.

    Raises
    ------
    DataError
        There is no seed for several processes.
    """
    divided = resolve_engine(engine)
    if seed is None:
        seed = recorded_seed(options["out"])
        if seed is None and getattr(divided, "count", 1) > 1:
            raise DataError("several processes need one seed: give seed=")
    trained = model._trained()
    how = model._sampling(seed=seed, **sampling)
    used = used_roles(trained.dit, how)
    requests = resolve_requests(trained.registry, n_cells=n_cells, conditions=conditions, used=used, **labels)
    return generate_units(
        trained, how, requests, divided, workers=settings.num_workers, progress=settings.progress, **options
    )


def generate_units(
    trained: Trained,
    sampling: Sampling,
    requests: Sequence[Request],
    engine: Engine,
    *,
    out: Any,
    overwrite: bool = False,
    size_factors: Any = None,
    genes: Any = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> Path | None:
    """Draw the cells of requests unit by unit, and join the units when all are there.

    Units are kept in the folder ``<out>.units`` until then. Those whose files are there are not drawn again; where the
    output itself is there, of the very same request, nothing is done.

    Returns
    -------
    The file; None where units of other processes are missing, or another process is joining them.

    Raises
    ------
    DataError
        ``<out>.units`` holds units of another request, an argument is not possible, or workers write elsewhere.
    FileExistsError
        There is another file at `out`.
    """
    path = output_path(out)
    registry, positions = trained.registry, gene_choice(trained.registry, sampling, genes)
    library = resolve_library(registry, requests, size_factors)
    device = next(trained.dit.parameters()).device.type
    facts = trained.provenance | {"torch_version": str(torch.__version__)}
    request = describe_request(
        registry, sampling, requests, device=device, facts=facts, genes=positions, library=library
    )
    planned = RunFolder(run_folder(path), request, {})
    if is_finished(path, planned.key):
        return path
    file_sink(path, overwrite=overwrite).abort()  # refuses what may not be replaced before the work begins
    run = RunFolder.open(planned.path, request, provenance(trained, sampling, size_factors))
    cutting = run.cutting(library)
    units = (cutting[i] for i in range(len(cutting)) if engine.takes(i))
    missing = [unit.number for unit in units if not run.is_done(unit)]
    job = Job(trained, sampling, run, positions, workers)
    done = engine.map(compute, job, (cutting[i] for i in missing), gpu=device != "cpu")
    for _ in tracked(done, len(missing), "generating", "units", progress=progress):
        pass
    if lost := [i for i in missing if not run.file(i).exists() and not is_finished(path, run.key)]:
        raise DataError(
            f"unit {lost[0]} was drawn, but {run.file(lost[0])} is not there: the folder of the output must be one "
            "that all workers share"
        )
    return merge_units(run, path, overwrite=overwrite)


def merge_units(run: RunFolder, path: Path, *, overwrite: bool = False) -> Path | None:
    """Join the units of a run in one file, and delete its folder; memory does not grow with the number of cells.

    Returns
    -------
    The file; None where units are missing, or another process is joining them.

    Raises
    ------
    DataError
        A unit is damaged, or has not the cells that were asked for.
    FileExistsError
        There is another file at `path`.
    """
    try:
        with FileLock(run.path / ".merge.lock", blocking=False):
            if not is_finished(path, run.key):
                if run.n_files() < len(run.cutting()):
                    return None
                _join(run, path, overwrite=overwrite)
            shutil.rmtree(run.path, ignore_errors=True)
    except Timeout:
        return None
    except FileNotFoundError:  # another process has joined the units and deleted them
        if not is_finished(path, run.key):
            raise
    return path


def _join(run: RunFolder, path: Path, *, overwrite: bool) -> None:
    registry = Registry.from_dict(dict(run.request["registry"]))
    cutting = run.cutting()
    levels = all_levels(registry, cutting.requests)
    sink = file_sink(path, overwrite=overwrite)
    try:
        width = 0
        for unit in cutting:
            drawn = run.load(unit)
            sink.append(drawn.values)
            sink.append_obs(describe_unit(registry, levels, unit, drawn.library))
            width = drawn.values.shape[1]
        if sink.n != cutting.n_cells:
            raise DataError(f"{cutting.n_cells} cells were asked for, the units of {run.path} hold {sink.n}")
        latent = run.request["sampling"]["output"] == "latent"
        var = describe_latents(width) if latent else describe_genes(registry, run.genes)
        uns = dict(run.uns)
        uns["scldm_cd4"] = {**uns["scldm_cd4"], HASH: run.key}
        sink.complete(None, var, uns)
    except BaseException:
        sink.abort()
        raise


def output_path(out: Any) -> Path:
    """Return where the joined cells go.

    Raises
    ------
    DataError
        There is no `out`.
    """
    if out is None:
        raise DataError("engine= writes the cells to a file: give out=, an .h5ad file or a .zarr store")
    return Path(out).expanduser().resolve()


def run_folder(path: Path) -> Path:
    """Return where the units of an output are kept until they are joined."""
    return path.with_name(path.name + ENDING)


def recorded_seed(out: Any) -> int | None:
    """Return the seed of a run to an output that was begun, or None."""
    folder = run_folder(output_path(out))
    return int(RunFolder.read(folder).request["sampling"]["seed"]) if folder.is_dir() else None


def is_finished(path: Path, key: str) -> bool:
    """Return whether a file holds the cells of a request, whole."""
    return path.exists() and written_fact(path, HASH) == key

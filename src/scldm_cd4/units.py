"""Requests as fixed work units: any process computes any unit, and what was killed goes on where it stopped.

A unit is a fixed number of consecutive cells of a request. It becomes one file in a run folder, written beside its
place and moved there when it is complete. Cells do not depend on their neighbours (`sampling`), so units may be
computed anywhere and in any order; read in the order of their numbers they are the cells that one process draws.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4._errors import DataError
from scldm_cd4._whole import whole_file
from scldm_cd4.checkpoint.native import plain
from scldm_cd4.conditions import Request
from scldm_cd4.engines import trained_on
from scldm_cd4.generation import Trained
from scldm_cd4.output import describe_cells, label_columns
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import Drawn, Sampler, Sampling, draw
from scldm_cd4.sinks import MemorySink, collect

PASSES = 8
"""Network passes of a unit: seconds of work on a GPU, and what a killed worker loses at most."""
FORMAT = 1
MANIFEST = "request.json"
ENDING = ".units"
"""A run folder has the name of the output with this after it."""
NAMES = ("data", "indices", "indptr", "values", "library")


@dataclass(frozen=True)
class Unit:
    """Some consecutive cells of a request."""

    number: int
    requests: tuple[Request, ...]
    library: NDArray[np.float64] | None = None
    """Library sizes (n,) that replace the drawn ones."""

    @property
    def n_cells(self) -> int:
        """The number of its cells."""
        return sum(r.n_cells for r in self.requests)


@dataclass(frozen=True)
class Cutting:
    """Requests cut into units.

    Parameters
    ----------
    requests
        In the order of the output.
    size
        Cells of every unit but the last.
    library
        Library size of every cell (n,), or None where they are drawn.
    """

    requests: Sequence[Request]
    size: int
    library: NDArray[np.float64] | None = None
    _ends: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", tuple(accumulate(r.n_cells for r in self.requests)))

    @property
    def n_cells(self) -> int:
        """The cells of all units."""
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return -(-self.n_cells // self.size)

    def __getitem__(self, number: int) -> Unit:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, stop = number * self.size, min((number + 1) * self.size, self.n_cells)
        parts, done = [], start
        while done < stop:
            at = bisect_right(self._ends, done)
            request = self.requests[at]
            offset = done - (self._ends[at] - request.n_cells)
            n = min(request.n_cells - offset, stop - done)
            parts.append(replace(request, n_cells=n, first=request.first + offset))
            done += n
        return Unit(number, tuple(parts), None if self.library is None else self.library[start:stop])

    def __iter__(self) -> Iterator[Unit]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: what was asked, and a file for each unit that is done.

    Build it with `open` or `read`.
    """

    path: Path
    request: Mapping[str, Any]
    """What was asked, as JSON holds it; see `describe_request`."""
    uns: Mapping[str, Any]
    """How the cells are made, for the output."""

    @classmethod
    def open(cls, path: Path, request: Mapping[str, Any], uns: Mapping[str, Any]) -> "RunFolder":
        """Begin a run or go on with one.

        Raises
        ------
        DataError
            The folder holds a run of another request (what differs is named), or cannot be used.
        """
        request = plain(request)
        if (path / MANIFEST).exists() or (path.exists() and not path.is_dir()):
            there = cls.read(path)
            if differences := _differences(there.request, request):
                raise DataError(
                    f"{path} holds units of another request; {'; '.join(differences)}. Ask for the same, give another "
                    "output, or delete the folder"
                )
            return there
        run = cls(path, request, plain(uns))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{path} cannot be made: {error}") from error
        if foreign := [p.name for p in path.iterdir() if not p.name.startswith(".")]:
            raise DataError(f"{path} is in the way: it is no run folder, it holds {foreign[0]!r}")
        _write(path / MANIFEST, json.dumps({"format": FORMAT, "request": run.request, "uns": run.uns}).encode())
        return run

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read what was asked.

        Raises
        ------
        DataError
            It is not the folder of a run.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            if manifest["format"] != FORMAT:
                raise DataError(f"{path} is a run folder of format {manifest['format']!r}; this version reads {FORMAT}")
            return cls(path, manifest["request"], manifest["uns"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not a run folder with a readable {MANIFEST}: {error!r}") from error

    @property
    def key(self) -> str:
        """Hash of the request, which every file carries."""
        return request_hash(self.request)

    def cutting(self, library: NDArray[np.float64] | None = None) -> Cutting:
        """Return the units of the request."""
        requests = [Request(tuple(labels), n, first) for labels, n, first in self.request["conditions"]]
        return Cutting(requests, self.request["unit_cells"], library)

    @property
    def genes(self) -> NDArray[np.int64] | None:
        """The positions of the genes asked for; None for all."""
        genes = self.request["genes"]
        return None if genes is None else np.array(genes, dtype=np.int64)

    def file(self, number: int) -> Path:
        """Return the place of a unit."""
        return self.path / f"unit-{number:06d}.safetensors"

    def write(self, unit: Unit, values: Any, library: NDArray[np.float64]) -> None:
        """Write the cells of a unit, whole or not at all.

        Raises
        ------
        DataError
            There are not as many cells as asked for.
        """
        from safetensors.numpy import save

        if not values.shape[0] == len(library) == unit.n_cells:
            raise DataError(f"unit {unit.number} gave {values.shape[0]} cells in place of {unit.n_cells}")
        arrays = {"library": library}
        if sparse.issparse(values):
            shape = np.array([values.shape[1]])
            arrays |= {"data": _narrow(values.data), "indices": _narrow(values.indices), "indptr": values.indptr}
            arrays["n_columns"] = shape
        else:
            arrays["values"] = np.ascontiguousarray(values)
        _write(self.file(unit.number), save(arrays, self._identity(unit, arrays)))

    def load(self, unit: Unit) -> Drawn:
        """Read the cells of a unit.

        Raises
        ------
        DataError
            Its file is missing, damaged, or of another request.
        """
        from safetensors import SafetensorError, safe_open

        path = self.file(unit.number)
        try:
            with safe_open(path, framework="np") as file:
                identity = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is missing or damaged: {error}") from error
        if identity != self._identity(unit, arrays):
            raise DataError(f"{path} is damaged or of another request")
        if "values" in arrays:
            return Drawn(arrays["values"], arrays["library"])
        data, shape = arrays["data"].astype(np.float32), (len(arrays["library"]), int(arrays["n_columns"][0]))
        rows = sparse.csr_matrix((data, arrays["indices"].astype(np.int32), arrays["indptr"]), shape=shape)
        return Drawn(rows, arrays["library"])

    def is_done(self, unit: Unit) -> bool:
        """Return whether the file of a unit is there and sound."""
        if not self.file(unit.number).exists():
            return False
        try:
            self.load(unit)
        except DataError:
            return False
        return True

    def n_files(self) -> int:
        """Return how many units have a file, sound or not."""
        return sum(1 for _ in self.path.glob("unit-*.safetensors"))

    def _identity(self, unit: Unit, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
            digest.update(np.ascontiguousarray(arrays[name]).data)
        return {"request": self.key, "unit": str(unit.number), "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Job:
    """What a worker needs to compute any unit of a run."""

    trained: Trained
    sampling: Sampling
    run: RunFolder
    genes: NDArray[np.int64] | None
    workers: int | None = None

    def on(self, device: str) -> "Job":
        """Return it with the networks on a kind of device."""
        return replace(self, trained=trained_on(self.trained, device))


def compute(job: Job, unit: Unit) -> int:
    """Draw a unit and write its file; return the number of its cells."""
    sink = MemorySink()
    sampler = Sampler(job.trained.vae, job.trained.dit, job.trained.registry, job.sampling)
    with closing(draw(sampler, unit.requests, unit.library, job.workers)) as drawn:
        library = collect(drawn, sink, job.genes)
    job.run.write(unit, sink.joined(), library)
    return unit.n_cells


def describe_request(
    registry: Registry,
    sampling: Sampling,
    requests: Sequence[Request],
    *,
    device: str,
    facts: Mapping[str, str],
    genes: NDArray[np.int64] | None,
    library: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Return all that decides the cells, as plain values.

    Parameters
    ----------
    device
        Kind of device; the last bits of a cell may differ between kinds.
    facts
        Of the model and the versions that draw.
    """
    drawn = None if library is None else hashlib.sha256(np.ascontiguousarray(library).data).hexdigest()
    request: dict[str, Any] = {
        **facts,
        "device": device,
        "sampling": asdict(sampling),
        "unit_cells": PASSES * sampling.batch_size,
        "genes": genes,
        "library": drawn,
        "conditions": [[list(r.labels), r.n_cells, r.first] for r in requests],
        "registry": registry.to_dict(),
    }
    return dict(plain(request))


def request_hash(request: Mapping[str, Any]) -> str:
    """Return a hash of what was asked."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def describe_unit(registry: Registry, levels: Mapping[str, Any], unit: Unit, library: Any) -> Any:
    """Return ``obs`` of a unit, with the categories of the whole output (`all_levels`)."""
    obs = describe_cells(registry, unit.requests, library)
    for column, categories in levels.items():
        obs[column] = obs[column].cat.set_categories(categories)
    return obs


def all_levels(registry: Registry, requests: Sequence[Request]) -> dict[str, Any]:
    """Return the categories of the label columns of an output."""
    labels = [r.labels for r in requests]
    columns = label_columns(registry, labels, np.ones(len(labels), dtype=np.int64))
    return {name: column.categories for name, column in columns.items()}


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers of at least 0 in as few bytes as hold them, others as they are."""
    largest = values.max(initial=0)
    if values.min(initial=0) < 0 or not np.isfinite(largest) or not (values == np.rint(values)).all():
        return values
    return values.astype(np.min_scalar_type(int(largest)))


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Say in what two requests differ."""
    out = []
    for name in sorted(set(there) | set(asked)):
        a, b = there.get(name), asked.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping) and name != "registry":
            out += _differences(a, b)
        elif name == "conditions" and a is not None and b is not None:
            cells = [sum(n for _, n, _ in side) for side in (a, b)]
            out.append(f"conditions: {len(a)} with {cells[0]} cells there, {len(b)} with {cells[1]} asked")
        elif name in ("registry", "genes", "library"):
            what = {"registry": "labels and library sizes of the model", "library": "size_factors"}.get(name, name)
            out.append(f"{what}: others")
        else:
            out.append(f"{name}: {a!r} there, {b!r} asked")
    return out


def _write(path: Path, data: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    try:
        with whole_file(path, sync=True) as part:
            part.write_bytes(data)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error

"""Who computes work units: the processes that a launcher started, or the workers of Ray."""

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch

from scldm_cd4._errors import DataError

In = TypeVar("In")
Out = TypeVar("Out")
Parts = TypeVar("Parts", bound=Any)
Network = TypeVar("Network", bound=torch.nn.Module)
ENGINES = ("units", "ray")
RETRIES = 3
"""Times that Ray computes a unit again whose worker died."""
AHEAD = 2
"""Units per worker that wait or run at once."""


class Engine(Protocol):
    """Who computes units."""

    def takes(self, number: int) -> bool:
        """Return whether a unit is to be computed in this process, or on its behalf."""
        ...

    def map(self, function: Callable[[Any, In], Out], shared: Any, items: Iterable[In], *, gpu: bool) -> Iterator[Out]:
        """Yield ``function(shared, item)`` in the order of the items.

        A method ``on(device)`` of `shared` returns it with its networks on ``cpu``, as it travels, or on ``cuda``.
        """
        ...


@dataclass(frozen=True)
class Units:
    """The process itself computes its share of the units; torchrun, ``srun`` or a SLURM array start several.

    Parameters
    ----------
    index, count
        Units whose number leaves the rest `index` when divided by `count` are those of this process.

    Raises
    ------
    DataError
        `index` is not one of 0 to `count` - 1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise DataError(f"a share is one of 0 to count - 1, got {self.index} of {self.count}")

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Units":
        """Return the share that a launcher gives this process; tasks of a SLURM array are divided further by torchrun.

        Parameters
        ----------
        environ
            ``RANK`` and ``WORLD_SIZE`` (torchrun), else ``SLURM_PROCID`` and ``SLURM_NTASKS`` (``srun``);
            ``SLURM_ARRAY_TASK_ID``, ``_COUNT``, ``_MIN`` and ``_STEP``.

        Raises
        ------
        DataError
            The numbers of the array are not evenly spaced.
        """
        index, count = 0, 1
        if "SLURM_ARRAY_TASK_ID" in environ:
            number, low, high, step, count = (
                int(environ.get(f"SLURM_ARRAY_TASK_{name}", default))
                for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("STEP", 1), ("COUNT", 1))
            )
            if count > 1 and (high - low) // max(step, 1) + 1 != count:
                raise DataError("units are divided among the tasks of a SLURM array numbered evenly, such as 0-7")
            index = (number - low) // step if count > 1 else 0
        for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if world in environ:
                size = int(environ[world])
                return cls(index * size + int(environ[rank]), count * size)
        return cls(index, count)

    def takes(self, number: int) -> bool:
        """Return whether the unit is one of this process."""
        return number % self.count == self.index

    def map(self, function: Callable[[Any, In], Out], shared: Any, items: Iterable[In], *, gpu: bool) -> Iterator[Out]:
        """Compute in this process, one item after the other."""
        return (function(shared, item) for item in items)


@dataclass(frozen=True)
class Ray:
    """Ray's workers compute the units; it places them on cores, GPUs and nodes, and repeats those whose worker died.

    Parameters
    ----------
    address
        Of a cluster, as `ray.init` takes it (``"auto"``, ``"ray://host:10001"``); None takes the one that this process
        is connected to, or starts one on this machine.
    num_cpus
        Workers of one that is started here; None takes all cores.
    options
        Of each task, as `ray.remote` takes them, such as ``{"num_cpus": 2}``.
    """

    address: str | None = None
    num_cpus: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def takes(self, number: int) -> bool:
        """Return True: Ray's workers compute all units."""
        return True

    def map(self, function: Callable[[Any, In], Out], shared: Any, items: Iterable[In], *, gpu: bool) -> Iterator[Out]:
        """Compute items on Ray's workers, each of which is sent `shared` once.

        Raises
        ------
        DataError
            Ray is not installed or cannot be reached, or there is no GPU for `gpu`.
        """
        ray = self._connected()
        wanted = {"num_cpus": 1, "num_gpus": int(gpu), "max_retries": RETRIES, "max_calls": 0, **self.options}
        kind, each = ("GPU", wanted["num_gpus"]) if gpu else ("CPU", wanted["num_cpus"])
        task = ray.remote(**wanted)(_apply)
        place = ray.put(shared.on("cpu") if hasattr(shared, "on") else shared)
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(task.remote(function, [place], item))
                slots = int(ray.cluster_resources().get(kind, 0) / (each or 1))
                if slots < 1:
                    raise DataError(f"the Ray cluster has no {kind} for a unit: {ray.cluster_resources()}")
                while len(waiting) > AHEAD * slots:
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        finally:
            for left in waiting:
                ray.cancel(left)

    def _connected(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise DataError("engine='ray' needs Ray: pip install 'scldm_cd4[ray]'") from error
        if not ray.is_initialized():
            started = {} if self.num_cpus is None else {"num_cpus": self.num_cpus}
            try:
                ray.init(self.address, include_dashboard=False, log_to_driver=False, **started)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise DataError(f"Ray cannot be reached at {self.address!r}: {error}") from error
        return ray


def local_device(device: str, environ: Mapping[str, str]) -> str:
    """Return the device of this process: with ``auto``, each process of a machine takes a GPU of its own.

    Parameters
    ----------
    environ
        ``LOCAL_RANK`` (torchrun), else ``SLURM_LOCALID`` (``srun``).
    """
    local = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID"))
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def resolve_engine(engine: Any, environ: Mapping[str, str] | None = None) -> Engine:
    """Return the engine meant by ``"units"``, ``"ray"`` or an engine.

    Raises
    ------
    DataError
        It is neither.
    """
    if engine == "units":
        return Units.of(os.environ if environ is None else environ)
    if engine == "ray":
        return Ray()
    if hasattr(engine, "takes") and hasattr(engine, "map"):
        known: Engine = engine
        return known
    raise DataError(f"engine must be one of {ENGINES}, engines.Units(...) or engines.Ray(...), got {engine!r}")


def one_caller(engine: Any) -> Engine:
    """Return an engine whose workers serve this process alone.

    Raises
    ------
    DataError
        It is one whose processes each compute a share.
    """
    if engine == "units" or isinstance(engine, Units):
        raise DataError("engine='units' divides generated cells only; take engine='ray'")
    return resolve_engine(engine)


def _apply(function: Callable[[Any, In], Out], place: list[Any], item: In) -> Out:
    """Compute an item in a worker of Ray."""
    return function(_fetch(place[0]), item)


@lru_cache(maxsize=1)
def _fetch(place: Any) -> Any:
    """Return what all items of a run share; a worker asks for it once."""
    import ray

    shared = ray.get(place)
    return shared.on("cuda") if hasattr(shared, "on") and ray.get_gpu_ids() else shared


def trained_on(trained: Parts, device: str) -> Parts:
    """Return a trained model with its networks on a kind of device."""
    return replace(trained, vae=on_device(trained.vae, device), dit=on_device(trained.dit, device))


def on_device(network: Network, device: str) -> Network:
    """Return a network on a kind of device: itself where it is there, else a copy."""
    here = next(network.parameters()).device
    return network if here.type == device else copy.deepcopy(network).to(device)

"""Training state as one safetensors file: tensors, and the rest as JSON in its header. Nothing is pickled."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4._whole import whole_file
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.splits import Split
from scldm_cd4.registry import Registry

FORMAT = "scldm_cd4.training"
VERSION = 1
RECORD = "training.json"
"""File beside the state with the seed of the training."""
SPLIT = "split.safetensors"
"""File beside it with the part of each cell."""


def write_state(state: dict[str, Any], path: str | Path) -> None:
    """Write nested dicts, lists, tuples, numbers, strings and tensors, atomically: the old file stays until the end.

    Raises
    ------
    CheckpointError
        A value has another type, or the file cannot be written.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_flatten(state, "state", tensors))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, sync=True) as part:
            save_file(tensors, part, metadata={"format": FORMAT, "version": str(VERSION), "state": tree})
    except (OSError, SafetensorError) as error:
        need = sum(t.nbytes for t in tensors.values()) / 2**20
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else float("nan")
        raise CheckpointError(
            f"the training state could not be written to {path}: {error}. It needs {need:.0f} MiB, {free:.0f} MiB are "
            "free; an earlier file is unchanged."
        ) from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a small file of plain values, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")


def recorded_seed(folder: str | Path) -> int:
    """Return the seed of a training that wrote its state to `folder`.

    Raises
    ------
    CheckpointError
        There is no such record.
    """
    path = Path(folder) / RECORD
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no record of a training: {error}") from error


def write_split(folder: Path, split: Split, registry: Registry) -> None:
    """Write which cells train, and the genes."""
    state = {"parts": torch.from_numpy(split.parts), "spec": split.spec, "genes": list(registry.genes)}
    write_state(state, folder / SPLIT)


def recorded_split(folder: str | Path, cells: CellData) -> Split | None:
    """Return the split of a training that wrote its state to `folder`; None where an early version wrote it.

    Raises
    ------
    DataError
        The training was on other cells or genes.
    CheckpointError
        The file cannot be read.
    """
    path = Path(folder) / SPLIT
    if not path.is_file():
        return None
    state = read_state(path)
    split = Split.saved(state["parts"].numpy(), state["spec"])
    for what, same in (
        ("cells, or cells with other labels", split.spec.get("cells") == cells.identity),
        ("genes", state["genes"] == list(cells.registry.genes)),
    ):
        if not same:
            raise DataError(f"the training in {folder} was on other {what}: resume it with the data that it began with")
    return split


def has_state(folder: Path) -> bool:
    """Whether a folder holds training state to go on from."""
    return any((folder / f"{name}.safetensors").is_file() for name in ("vae", "vae_done", "flow"))


def read_state(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or no training state of a version known here.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no training state at {path}")
    try:
        with safe_open(path, "pt", device=str(device)) as handle:
            header = handle.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no training state of this package")
            if header.get("version") != str(VERSION):
                raise CheckpointError(
                    f"{path} has version {header.get('version')!r} of the training state; this release reads {VERSION}"
                )
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        state: dict[str, Any] = _restore(json.loads(header["state"]), tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return state


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain JSON values; a tensor goes to `tensors` under its path."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": path}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
        items = [[_flatten(k, path, tensors), _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]
        return {"$items": items}
    if isinstance(value, list | tuple):
        out = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return out if isinstance(value, list) else {"$tuple": out}
    raise CheckpointError(f"a training state cannot hold {type(value).__name__} at {path}")


def _restore(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_restore(v, tensors) for v in value["$tuple"])
    if "$items" in value:
        return {_restore(k, tensors): _restore(v, tensors) for k, v in value["$items"]}
    return {k: _restore(v, tensors) for k, v in value.items()}


class SafetensorsIO(CheckpointIO):
    """Lightning's door to training state, without pickle."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write all of Lightning's state."""
        write_state(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it back, on the CPU; Lightning moves it."""
        return read_state(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file of state."""
        Path(path).unlink(missing_ok=True)

"""The folder of a saved model: safetensors and JSON with checksums, replaced as a whole or not at all.

``model.safetensors``, ``config.json``, ``registry.json``, ``history.json``, ``README.md`` and ``manifest.json``, which
holds the format version, the version of the package that wrote the folder, and size and sha256 of every other file.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from scldm_cd4 import __version__
from scldm_cd4._errors import CheckpointError

FORMAT = "scldm_cd4"
FORMAT_VERSION = 1
TENSORS, MANIFEST, README = "model.safetensors", "manifest.json", "README.md"
JSON_FILES = ("config.json", "registry.json", "history.json")
FILES = (TENSORS, *JSON_FILES, README)
MAX_JSON_BYTES = 256 * 2**20
MAX_MANIFEST_BYTES = 2**20


@dataclass(frozen=True)
class Saved:
    """What a folder holds."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    registry: dict[str, Any]
    history: dict[str, Any]
    manifest: dict[str, Any]


MIGRATIONS: dict[int, Callable[[Saved], Saved]] = {}
"""From a format version to the next: what to change in a folder that was written then."""


def save_folder(
    path: str | Path,
    *,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    registry: Mapping[str, Any],
    history: Mapping[str, Any],
    readme: str,
    overwrite: bool = False,
) -> Path:
    """Write a folder, all of it or nothing.

    Everything is written and synced beside the target and then moved into place; a folder that is replaced is kept
    until the new one is complete. Killed at any moment, `load_folder` still finds the old one or the new one.

    Parameters
    ----------
    path
        The folder. Missing parents are made.
    tensors
        Of any device; shared storage is written out for each name.
    config, registry, history
        Values that JSON can hold; numpy numbers and arrays are turned into such, non-finite numbers into null.
    readme
        Markdown text.
    overwrite
        Replace a folder that this function wrote. Any other folder or file is never replaced.

    Returns
    -------
    The folder.

    Raises
    ------
    FileExistsError
        There is something at `path`, and it may not be replaced.
    CheckpointError
        The disk is full or the place cannot be written.
    """
    target = Path(path).expanduser().resolve()
    contents = {
        TENSORS: save(_independent(tensors)),
        **{name: _to_json(value) for name, value in zip(JSON_FILES, (config, registry, history), strict=True)},
        README: readme.encode(errors="replace"),
    }
    if large := [name for name in JSON_FILES if len(contents[name]) > MAX_JSON_BYTES]:
        raise CheckpointError(
            f"{', '.join(large)} would be larger than the {MAX_JSON_BYTES} bytes that can be read again"
        )
    needed = sum(map(len, contents.values())) + MAX_MANIFEST_BYTES
    try:
        _recover(target)
        conflict = _conflict(target, overwrite)
        if conflict is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(target.parent).free) < needed:
                raise OSError(errno.ENOSPC, f"{free} bytes free")
            _write_and_swap(target, contents)
    except OSError as error:
        raise CheckpointError(_explain(error, target, needed)) from error
    if conflict is not None:
        raise FileExistsError(conflict)
    return target


def load_folder(path: str | Path) -> Saved:
    """Read a folder after checking every file of it.

    The README may have been edited; hidden files are ignored.

    Raises
    ------
    CheckpointError
        The folder or a file is missing, damaged, unexpected, or of a format that this version does not know.
    """
    folder = Path(path).expanduser()
    try:
        if not folder.exists() and _previous(folder.resolve()).is_dir():
            folder = _previous(folder.resolve())  # a save was killed between its two renames
        if not folder.is_dir():
            why = "that is a file, not a folder" if folder.exists() else "no such folder"
            raise CheckpointError(f"there is no saved model at {folder}: {why}")
        return _load(folder)
    except OSError as error:
        raise CheckpointError(f"the saved model at {folder} cannot be read: {error.strerror or error}") from error


def _load(folder: Path) -> Saved:
    manifest = _read_manifest(folder)
    if extra := sorted(p.name for p in folder.iterdir() if p.name not in (*FILES, MANIFEST) and p.name[0] != "."):
        raise CheckpointError(f"{folder} holds what is no part of a saved model: {', '.join(extra)}; move it elsewhere")
    for name in FILES:
        if name != README:
            _check_file(folder / name, manifest["files"][name])
    config, registry, history = (_read_json(folder / name, MAX_JSON_BYTES) for name in JSON_FILES)
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / TENSORS} is no readable safetensors file: {error}") from error
    saved = Saved(tensors, config, registry, history, manifest)
    for version in range(manifest["format_version"], FORMAT_VERSION):
        saved = MIGRATIONS[version](saved)
    return saved


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} is no saved model, or an incomplete one: {MANIFEST} is missing")
    manifest = _read_json(path, MAX_MANIFEST_BYTES)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a saved {FORMAT} model")
    version, writer = manifest.get("format_version"), manifest.get("package_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} gives no format version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} was written by scldm_cd4 {writer} in format {version}; this is {__version__}, which reads "
            f"formats up to {FORMAT_VERSION}: update scldm_cd4"
        )
    if lost := [v for v in range(version, FORMAT_VERSION) if v not in MIGRATIONS]:
        raise CheckpointError(
            f"{folder} was written by scldm_cd4 {writer} in format {version}, and {__version__} has no way from format "
            f"{lost[0]} to {FORMAT_VERSION}: load and save it with a version between"
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} lists no files")
    if foreign := sorted(set(files) - set(FILES)):
        raise CheckpointError(f"{path} lists files that are no part of a saved model: {', '.join(map(repr, foreign))}")
    if missing := [name for name in FILES if name not in files]:
        raise CheckpointError(f"{path} does not list {', '.join(missing)}")
    if gone := [name for name in FILES if not (folder / name).exists()]:
        raise CheckpointError(f"the saved model at {folder} is incomplete: {', '.join(gone)} missing")
    return manifest


def _check_file(path: Path, entry: Any) -> None:
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= set(entry):
        raise CheckpointError(f"{path.parent / MANIFEST} has no size and checksum for {path.name}")
    size = _regular_size(path)
    if size != entry["bytes"]:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes, {entry['bytes']} were written")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its checksum is not the one that was written; copy the model again")


def _regular_size(path: Path) -> int:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a file")
    return status.st_size


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    if (size := _regular_size(path)) > limit:
        raise CheckpointError(f"{path} has {size} bytes, more than the {limit} that such a file may have")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no table of names and values")
    return value


def _previous(target: Path) -> Path:
    """Where the folder that is being replaced is kept for a moment."""
    return target.with_name(f".{target.name}.previous")


def _conflict(target: Path, overwrite: bool) -> str | None:
    """Say why what is at the target may not be replaced; None if it may, or nothing is there."""
    if not target.exists():
        return None
    if not target.is_dir():
        return f"{target} is a file; a model is saved as a folder"
    found = {p.name for p in target.iterdir()}
    if not found:
        return None
    foreign = {name for name in found if name[0] != "."} - {*FILES, MANIFEST}
    if MANIFEST not in found or foreign:
        what = ", ".join(sorted(foreign)[:5]) or "no manifest"
        return f"{target} is not a folder of a saved model alone ({what}); choose another folder"
    return None if overwrite else f"there is a saved model at {target}; pass overwrite=True to replace it"


def _recover(target: Path) -> None:
    """Tidy up after a save that was killed between or after its two renames."""
    previous = _previous(target)
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(target)


def _write_and_swap(target: Path, contents: dict[str, bytes]) -> None:
    previous = _previous(target)
    new = target.with_name(f".{target.name}.saving-{secrets.token_hex(4)}")
    try:
        new.mkdir()
        for name, data in contents.items():
            _write(new / name, data)
        _write(new / MANIFEST, _to_json(_manifest(contents)))
        _sync(new)
        _swap(new, target, previous)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _swap(new: Path, target: Path, previous: Path) -> None:
    if target.exists():
        target.rename(previous)
    try:
        new.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise
    _sync(target.parent)


def _manifest(contents: dict[str, bytes]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
        },
    }


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: Path, needed: int) -> str:
    try:
        kept = "; the model saved there before is untouched" if (target / MANIFEST).exists() else ""
    except OSError:
        kept = ""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        place = next(p for p in target.parents if p.is_dir())
        free = shutil.disk_usage(place).free
        return (
            f"the disk is full: saving to {target} needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            f"{kept}. Make room or save elsewhere"
        )
    return (
        f"the model cannot be saved to {target}: {error.strerror or error}{kept}. Choose a folder that can be written"
    )


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which share storage."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out


def _to_json(value: Any) -> bytes:
    return (json.dumps(_plain(value), indent=1, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

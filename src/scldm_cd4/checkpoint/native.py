"""The folder of a saved model: safetensors and JSON with checksums, replaced as a whole or not at all.

``model.safetensors``, ``config.json``, ``registry.json``, ``history.json``, ``README.md`` and ``manifest.json``, which
holds the format version, the version of the package that wrote the folder, and size and sha256 of every other file.
"""

import hashlib
import json
import math
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
from scldm_cd4.checkpoint.folder import check_link, previous, write_folder

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
    contents = {
        TENSORS: save(independent(tensors)),
        **{name: to_json(value) for name, value in zip(JSON_FILES, (config, registry, history), strict=True)},
        README: readme.encode(errors="replace"),
    }
    if large := [name for name in JSON_FILES if len(contents[name]) > MAX_JSON_BYTES]:
        raise CheckpointError(
            f"{', '.join(large)} would be larger than the {MAX_JSON_BYTES} bytes that can be read again"
        )
    return write_folder(
        path,
        contents,
        (MANIFEST, lambda _: to_json(_manifest(contents))),
        known=(*FILES, MANIFEST),
        needed=sum(map(len, contents.values())) + MAX_MANIFEST_BYTES,
        overwrite=overwrite,
    )


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
        if not folder.exists() and previous(folder.resolve()).is_dir():
            folder = previous(folder.resolve())  # a save was killed between its two renames
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
    check_link(path)
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


def _manifest(contents: dict[str, bytes]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
        },
    }


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU, no two of which share storage."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out


def to_json(value: Any) -> bytes:
    """Return JSON of plain values; numbers that are not finite become null."""
    return (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""Folders written as a whole or not at all."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from scldm_cd4._errors import CheckpointError

Content = bytes | Callable[[Path], None]
"""What a file holds, or what writes it."""


def write_folder(
    path: str | Path,
    contents: Mapping[str, Content],
    last: tuple[str, Callable[[Path], bytes]],
    *,
    known: Collection[str],
    needed: int,
    overwrite: bool,
) -> Path:
    """Write a folder, all of it or nothing.

    Everything is written and synced beside the target and then moved into place; a folder that is replaced is kept
    until the new one is complete. Killed at any moment, the old one or the new one is there: at the target, or for the
    moment between two renames at `previous` of it.

    Parameters
    ----------
    path
        The folder. Missing parents are made.
    contents
        By file name.
    last
        Name of the file that tells a complete folder, and what gives it from the folder of the others.
    known
        Names that such a folder may hold beside hidden ones; one that holds others is never replaced.
    needed
        Bytes that are needed, about.
    overwrite
        Replace a folder of this kind. Any other folder or file is never replaced.

    Returns
    -------
    The folder, without links in its path.

    Raises
    ------
    FileExistsError
        There is something at `path`, and it may not be replaced.
    CheckpointError
        The disk is full or the place cannot be written.
    """
    target = Path(path).expanduser().resolve()
    try:
        _recover(target)
        conflict = _conflict(target, last[0], known, overwrite)
        if conflict is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(target.parent).free) < needed:
                raise OSError(errno.ENOSPC, f"{free} bytes free")
            _write_and_swap(target, contents, last)
    except OSError as error:
        raise CheckpointError(_explain(error, target, needed, last[0])) from error
    if conflict is not None:
        raise FileExistsError(conflict)
    return target


def previous(target: Path) -> Path:
    """Where the folder that is being replaced is kept for a moment."""
    return target.with_name(f".{target.name}.previous")


def check_link(path: Path) -> None:
    """Refuse a link that leads out of its folder, other than into the blobs of the hub's cache.

    Raises
    ------
    CheckpointError
        It leads elsewhere.
    """
    if not path.is_symlink():
        return
    folder, target = path.parent.resolve(), path.resolve()
    if target.parent != folder and target.parent != folder.parent.parent / "blobs":
        raise CheckpointError(f"{path} is a link out of its folder, which is not followed: put the file itself there")


def _conflict(target: Path, last: str, known: Collection[str], overwrite: bool) -> str | None:
    """Say why what is at the target may not be replaced; None if it may, or nothing is there."""
    if not target.exists():
        return None
    if not target.is_dir():
        return f"{target} is a file; a model is saved as a folder"
    found = {p.name for p in target.iterdir()}
    if not found:
        return None
    foreign = {name for name in found if name[0] != "."} - set(known)
    if last not in found or foreign:
        what = ", ".join(sorted(foreign)[:5]) or f"no {last}"
        return f"{target} is not a folder of a saved model alone ({what}); choose another folder"
    return None if overwrite else f"there is a saved model at {target}; pass overwrite=True to replace it"


def _recover(target: Path) -> None:
    """Tidy up after a save that was killed while it wrote, or between or after its two renames."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.saving-*"):
        shutil.rmtree(part, ignore_errors=True)
    kept = previous(target)
    if kept.exists():
        if target.exists():
            shutil.rmtree(kept, ignore_errors=True)
        else:
            kept.rename(target)


def _write_and_swap(target: Path, contents: Mapping[str, Content], last: tuple[str, Callable[[Path], bytes]]) -> None:
    kept = previous(target)
    new = target.with_name(f".{target.name}.saving-{secrets.token_hex(4)}")
    try:
        new.mkdir()
        for name, content in contents.items():
            _write(new / name, content)
        _write(new / last[0], last[1](new))
        _sync(new)
        _swap(new, target, kept)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(kept, ignore_errors=True)


def _swap(new: Path, target: Path, kept: Path) -> None:
    if target.exists():
        target.rename(kept)
    try:
        new.rename(target)
    except BaseException:
        if kept.exists():
            kept.rename(target)
        raise
    _sync(target.parent)


def _write(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: Path, needed: int, last: str) -> str:
    try:
        kept = "; the model saved there before is untouched" if (target / last).exists() else ""
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

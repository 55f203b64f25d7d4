"""Files that are there as a whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write to; what is there moves to `path` if all goes well, else it is deleted.

    Parameters
    ----------
    path
        The file; one that is there stays until the new one is complete.
    sync
        Wait until the disk has it, so that it outlives a power cut.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield part
        if sync:
            with part.open("rb") as handle:
                os.fsync(handle.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

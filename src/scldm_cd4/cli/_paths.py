"""What commands write: files, never over others unasked, and words."""

import sys
from pathlib import Path
from typing import Any

from scldm_cd4._errors import DataError
from scldm_cd4._whole import whole_file


def check_free(path: Path, overwrite: bool, endings: tuple[str, ...] = ()) -> None:
    """Refuse an output before the work begins.

    Raises
    ------
    DataError
        It exists and may not be replaced, is a folder, or has another ending.
    """
    if endings and path.suffix not in endings:
        raise DataError(f"--out {path} must end in {', '.join(endings)}")
    if path.is_dir():
        raise DataError(f"--out {path} is a folder; give a file")
    if path.exists() and not overwrite:
        raise DataError(f"--out {path} exists; give another file, or --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise DataError(f"--out {path}: there is no folder {path.absolute().parent}")


def write_table(table: Any, out: Path | None, *, index: bool = False) -> str:
    """Write a table as CSV to a file, or return it for stdout."""
    if out is None:
        return str(table.to_csv(index=index))
    with whole_file(out) as part:
        table.to_csv(part, index=index)
    return ""


def say(text: str) -> None:
    """Tell on stderr what is being done."""
    sys.stderr.write(f"{text}\n")

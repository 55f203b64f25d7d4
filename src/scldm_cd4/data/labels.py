"""Label columns of any dtype as strings."""

import datetime
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.registry import suggestion


def as_label(value: Any) -> str:
    """Return the string that stands for a label.

    Strings stay as they are (also ``"1.0"``); truth values give ``"True"`` and ``"False"``; whole numbers, floats among
    them, give their digits (``1`` and ``1.0`` give ``"1"``); other floats their shortest exact decimal (``"0.5"``);
    bytes are decoded as UTF-8; dates give ``"2024-05-01"``, with the time of day where there is one
    (``"2024-05-01 12:30:00"``); anything else gives ``str(value)``.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, float | np.floating):
        return np.format_float_positional(value, unique=True, trim="-")
    if isinstance(value, datetime.date | np.datetime64):
        import pandas as pd

        return str(pd.Timestamp(value)).removesuffix(" 00:00:00")
    if isinstance(value, datetime.timedelta | np.timedelta64):
        import pandas as pd

        return str(pd.Timedelta(value))
    return str(value)


def label_kind(column: Any) -> str:
    """Return what a label column holds, one of `scldm_cd4.registry.KINDS`; the dtype may be object or categorical."""
    import pandas as pd

    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    found = pd.api.types.infer_dtype(values, skipna=True)
    return {"integer": "int", "floating": "float", "boolean": "bool"}.get(found, "string")


def get_column(table: Any, key: Any, what: str, *, table_name: str = "obs") -> Any:
    """Return one column of ``obs`` or ``var``.

    Parameters
    ----------
    table
        The DataFrame.
    key
        The name of the column.
    what
        What the column is for, in messages.
    table_name
        What the table is called in messages.

    Raises
    ------
    DataError
        The key is not one string, or there is no such column, or several.
    """
    if not isinstance(key, str):
        raise DataError(f"{what} must be the name of one {table_name} column (a string), got {key!r}")
    number = int((table.columns == key).sum())
    if number == 0:
        hint = suggestion(key, [str(c) for c in table.columns], f"columns of {table_name} are")
        raise DataError(f"{what}={key!r} is not a column of {table_name}.{hint}")
    if number > 1:
        raise DataError(f"{table_name} has {number} columns named {key!r} ({what}); rename all but one")
    return table[key]


def read_labels(obs: Any, key: Any, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a label column.

    Parameters
    ----------
    obs
        The table of cells.
    key
        The column.
    what
        What the column is for, in messages.

    Returns
    -------
    Codes, int64, shape (number of cells,), and the levels they point to: those that occur, as strings (`as_label`),
    sorted. The order and the unused levels of a categorical play no part.

    Raises
    ------
    DataError
        The column is missing or holds missing, empty (also nothing but blanks) or unusable labels.
    """
    import pandas as pd

    column = get_column(obs, key, what)
    try:
        codes, values = pd.factorize(column)
        names = [as_label(value) for value in np.asarray(values)]
        if pd.api.types.infer_dtype(column, skipna=True).startswith("mixed"):
            _refuse_truth_among_numbers(column, f"obs[{key!r}] ({what})")
    except (TypeError, UnicodeDecodeError) as error:
        raise DataError(f"obs[{key!r}] ({what}) holds values that cannot be labels: {error}") from error
    is_empty = np.array([*(not name.strip() for name in names), True])  # the last one is for code -1: missing
    if n_missing := int(is_empty[codes].sum()):
        raise DataError(
            f"obs[{key!r}] ({what}) is missing or empty in {n_missing} of {len(codes)} cells. Drop them, "
            f"adata = adata[adata.obs[{key!r}].notna()].copy(), or fill in a label: "
            f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(object).fillna('unknown')"
        )
    levels = tuple(sorted(set(names)))
    position = {level: code for code, level in enumerate(levels)}
    return np.array([position[name] for name in names], dtype=np.int64)[codes], levels


def _refuse_truth_among_numbers(column: Any, where: str) -> None:
    """Raise DataError where a column holds both True and 1, or False and 0, which count as equal."""
    truth = {value for value in column if isinstance(value, bool | np.bool_)}
    numbers = {value for value in column if isinstance(value, int | float | np.number) and not isinstance(value, bool)}
    if clash := sorted(truth & numbers):
        raise DataError(
            f"{where} holds both {bool(clash[0])} and {int(clash[0])}, which count as equal: use one of them throughout"
        )

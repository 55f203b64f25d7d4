"""What a user asks for, as a list of conditions with labels that the model knows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from itertools import product
from typing import Any, TypeVar, cast

import numpy as np

from scldm_cd4._errors import DataError, UnknownCategoryError
from scldm_cd4.config import ROLES
from scldm_cd4.data.labels import as_label
from scldm_cd4.registry import Attribute, Registry, suggestion

DEFAULT_N_CELLS = 100
N_CELLS = "n_cells"
Row = tuple[tuple[str | None, ...], int]
"""Labels and number of cells."""
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Request:
    """Some cells of one condition."""

    labels: tuple[str | None, ...]
    """In the order of `scldm_cd4.config.ROLES`; None where the output does not depend on the label."""
    n_cells: int
    first: int = 0
    """Number of the first cell among all that could be drawn of the condition."""


def told_by_role(method: F) -> F:
    """Let a method of a model say which argument takes the labels of a column that is given as a keyword."""
    known = signature(method).parameters

    @wraps(method)
    def called(self: Any, *args: Any, **keywords: Any) -> Any:
        for attribute in self._state.registry.attributes:
            takes = known.keys() & {attribute.role, f"{attribute.role}s"}
            if takes and attribute.column in keywords.keys() - known.keys():
                raise DataError(
                    f"{attribute.column}= is no argument of {method.__name__}: obs[{attribute.column!r}] was declared "
                    f"as the {attribute.role}, so its labels go to {takes.pop()}="
                )
        return method(self, *args, **keywords)

    return cast("F", called)


def resolve_requests(
    registry: Registry,
    *,
    perturbation: Any = None,
    donor: Any = None,
    timepoint: Any = None,
    n_cells: Any = None,
    conditions: Any = None,
    used: Iterable[str] = ROLES,
) -> list[Request]:
    """Return the conditions asked for.

    Parameters
    ----------
    registry
        What the model knows.
    perturbation, donor, timepoint
        A label, several, or None for all levels with training cells. Several make a cross product, in the order
        donor (slowest), time point, perturbation.
    n_cells
        Cells per condition; None is 100.
    conditions
        Table with one condition per row, in place of the labels: columns by the user's names or by role, and optionally
        ``n_cells``. A column may be left out where there is a single level.
    used
        Roles on which the output depends; labels of other roles are checked and become None.

    Notes
    -----
    A condition that occurs more than once goes on where its earlier cells ended, so that no cell is given twice.

    Raises
    ------
    UnknownCategoryError
        A label is unknown, or has no training cell.
    DataError
        A number of cells is not a whole number of at least 1, a column is unknown or missing, nothing is asked for, or
        labels are given in both ways.
    """
    given = dict(zip(ROLES, (donor, timepoint, perturbation), strict=True))
    used = frozenset(used)
    if conditions is None:
        n = DEFAULT_N_CELLS if n_cells is None else as_n_cells(n_cells)
        levels = [_levels(registry, a, given[a.role], a.role in used) for a in registry.attributes]
        rows: list[Row] = [(labels, n) for labels in product(*levels)]
    else:
        if named := [role for role, value in given.items() if value is not None]:
            raise DataError(f"give either conditions= or labels, not both: {', '.join(named)}")
        rows = _from_table(registry, conditions, n_cells)
    return _number(
        [(tuple(x if r in used else None for r, x in zip(ROLES, labels, strict=True)), n) for labels, n in rows]
    )


def as_n_cells(value: Any, where: str = "") -> int:
    """Return a number of cells.

    Raises
    ------
    DataError
        It is not a whole number of at least 1.
    """
    try:
        whole = not isinstance(value, bool | np.bool_ | str) and int(value) == value and value >= 1
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise DataError(f"n_cells must be a whole number of at least 1, got {value!r}{where}")
    return int(value)


def known_label(registry: Registry, attribute: Attribute, value: Any) -> str:
    """Return a label as the model spells it.

    Raises
    ------
    UnknownCategoryError
        It is unknown or has no training cell.
    """
    return _known(registry, attribute, [value])[0]


def requested_levels(registry: Registry, role: str, value: Any) -> list[str]:
    """Return the labels of one role: one, several, or for None all that were trained.

    Raises
    ------
    UnknownCategoryError
        One is unknown or has no training cell.
    DataError
        The list is empty, or cells or a table are given in place of labels.
    """
    attribute = getattr(registry, role)
    return [level for level in _levels(registry, attribute, value, used=True) if level is not None]


def _levels(registry: Registry, attribute: Attribute, value: Any, used: bool) -> list[str | None]:
    if value is None:
        untrained = registry.untrained(attribute.role) if registry.train_counts else ()
        return [x for x in attribute.levels if x not in untrained] if used else [None]
    if hasattr(value, "obs") or hasattr(value, "columns"):
        raise DataError(
            f"{attribute.role} takes labels, got {type(value).__name__}: cells to give under other labels are for "
            "cells=, a table of conditions for conditions="
        )
    if isinstance(value, str | bytes) or np.ndim(value) == 0:
        value = [value]
    values = list(value)
    if not values:
        raise DataError(f"{attribute.role} is an empty list; leave it out for all levels")
    return list(_known(registry, attribute, values))


def _known(registry: Registry, attribute: Attribute, values: list[Any]) -> list[str]:
    labels = [as_label(value) for value in values]
    attribute.encode(labels)
    untrained = set(registry.untrained(attribute.role)) if registry.train_counts else set()
    if lost := [label for label in labels if label in untrained]:
        raise UnknownCategoryError(
            f"{lost[0]!r} is a {attribute.role} level without any training cell (all were held out), so the model has "
            "not learned it and cannot generate it"
        )
    return labels


def _from_table(registry: Registry, table: Any, n_cells: Any) -> list[Row]:
    if not hasattr(table, "columns"):
        raise DataError(f"conditions must be a DataFrame with one condition per row, got {type(table).__name__}")
    if not len(table):
        raise DataError("conditions has no rows")
    if not table.columns.is_unique:
        raise DataError(f"conditions has a column twice: {list(table.columns)}")
    columns = _columns(registry, table)
    labels = []
    for attribute in registry.attributes:
        if attribute.role in columns:
            values = table[columns[attribute.role]]
            if n_missing := int(values.isna().sum()):
                raise DataError(f"conditions has {n_missing} rows without a label in {values.name!r}")
            labels.append(_known(registry, attribute, list(values)))
        elif len(attribute) == 1:
            labels.append([attribute.levels[0]] * len(table))
        else:
            raise DataError(f"conditions needs a column {attribute.column!r}: the model has {len(attribute)} levels")
    if N_CELLS in table.columns and N_CELLS not in columns.values():
        if n_cells is not None:
            raise DataError("n_cells is given twice: as an argument and as a column of conditions")
        numbers = [as_n_cells(value, f" in row {i} of conditions") for i, value in enumerate(table[N_CELLS])]
    else:
        numbers = [DEFAULT_N_CELLS if n_cells is None else as_n_cells(n_cells)] * len(table)
    return list(zip(zip(*labels, strict=True), numbers, strict=True))


def _columns(registry: Registry, table: Any) -> dict[str, Any]:
    """Return the column of the table for each role that has one."""
    names: Mapping[Any, str] = {role: role for role in ROLES} | {
        a.column: a.role for a in registry.attributes if a.column is not None
    }
    found: dict[str, Any] = {}
    for column in table.columns:
        if column not in names:
            if column == N_CELLS:
                continue
            hint = suggestion(column, [*names, N_CELLS], "columns are")
            raise DataError(f"conditions has an unknown column {column!r}.{hint}")
        if names[column] in found:
            raise DataError(f"conditions gives the {names[column]} twice: {found[names[column]]!r} and {column!r}")
        found[names[column]] = column
    return found


def _number(rows: list[Row]) -> list[Request]:
    drawn: dict[tuple[str | None, ...], int] = {}
    out: list[Request] = []
    for labels, n in rows:
        first = drawn.get(labels, 0)
        drawn[labels] = first + n
        previous = out[-1] if out else None
        if previous is not None and previous.labels == labels:
            out[-1] = replace(previous, n_cells=previous.n_cells + n)
        else:
            out.append(Request(labels, n, first))
    return out

"""Which cells train, which stop the training, and which are held out."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4.config import ROLES
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.labels import as_label, get_column, read_labels
from scldm_cd4.registry import Registry, suggestion

PARTS = ("train", "validation", "test")
VALIDATION = 0.1
"""Share of cells for validation where nothing else is asked."""


@dataclass(frozen=True)
class Split:
    """Which cells are in which part; every cell is in exactly one.

    Attributes
    ----------
    train
        Numbers of the cells that train, int64, ascending.
    validation
        Of those that stop the training, likewise.
    test
        Of those that are held out, likewise.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    spec: dict[str, Any]
    """How the parts came about, as plain values. ``kind``, what was asked, ``seed``, under ``cells`` which these are
    (`CellData.identity`), cells per part under ``n_cells``, and under ``untrained`` the levels by role that have cells
    but none in training."""

    @classmethod
    def of(cls, parts: np.ndarray, spec: dict[str, Any]) -> "Split":
        """Build from the part of each cell, its place in `PARTS` (n,)."""
        train, validation, test = (np.flatnonzero(parts == code) for code in range(len(PARTS)))
        return cls(train, validation, test, spec)

    @property
    def parts(self) -> np.ndarray:
        """The part of each cell, its place in `PARTS`, uint8 (n,)."""
        out = np.zeros(len(self.train) + len(self.validation) + len(self.test), dtype=np.uint8)
        out[self.validation], out[self.test] = PARTS.index("validation"), PARTS.index("test")
        return out

    @classmethod
    def saved(cls, parts: np.ndarray, spec: Any) -> "Split":
        """Build from what a model keeps, `parts` and `spec`.

        Raises
        ------
        CheckpointError
            They do not fit.
        """
        try:
            found = np.bincount(parts, minlength=len(PARTS)).tolist()
            if found != [spec["n_cells"][part] for part in PARTS]:
                raise ValueError(f"it has {found} cells in {PARTS}")
            return cls.of(parts, spec)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"what the model keeps of its split is damaged: {error!r}") from error


def make_split(
    cells: CellData,
    split: Any = None,
    *,
    validation: float = VALIDATION,
    seed: int,
) -> Split:
    """Split cells into training, validation and test.

    Parameters
    ----------
    cells
        Cells with labels.
    split
        - None: a random share `validation` of the cells of every condition; a condition with too few cells for one
          stays in training.
        - A number: the same with this share in place of `validation`.
        - A dict with any of ``"validation"`` and ``"test"`` (random shares of every condition, the latter of all its
          cells), ``"hold_out"`` (``{role or obs column: labels}``) and ``"conditions"`` (a DataFrame, or a list of
          dicts, with roles or obs columns as names). Cells that carry ANY label of ``"hold_out"``, and cells that agree
          in all given columns with a row of ``"conditions"``, are test cells; shares are drawn from the others.
        - The name of an ``obs`` column, or one value per cell: ``"train"``, ``"validation"`` or ``"test"``.
    validation
        Share of the cells for validation, for None and a dict without it.
    seed
        Of the random shares.

    Returns
    -------
    The split.

    Raises
    ------
    DataError
        No training cell would be left, nothing can be held out for validation, a hold-out has no cells, or `split` is
        not understood.
    UnknownCategoryError
        A label to hold out is not known.

    Notes
    -----
    Warns when a level keeps no training cell: it then has no trained embedding and cannot be generated.
    """
    if cells.labels is None:
        raise DataError("a split by condition needs labels: build the cells with labels=True")
    if isinstance(split, Mapping):
        parts, spec = _from_dict(cells, split, validation, seed)
    elif split is None or (isinstance(split, int | float) and not isinstance(split, bool)):
        parts, spec = _from_dict(cells, {}, validation if split is None else split, seed)
    else:
        parts, spec = _from_labels(cells, split)
    n_train, n_held, n_test = np.bincount(parts, minlength=len(PARTS)).tolist()
    if not n_train:
        raise DataError(
            f"no cell is left for training: {n_held} are for validation and {n_test} for test of {cells.n_cells}"
        )
    spec["cells"] = cells.identity
    spec["n_cells"] = {"train": n_train, "validation": n_held, "test": n_test}
    spec["untrained"] = _untrained(cells.registry, cells.labels, np.flatnonzero(parts == PARTS.index("train")))
    return Split.of(parts, spec)


def warn_of_seen(before: Split, now: Split) -> None:
    """Warn where cells that were trained on before are held out now."""
    seen = np.isin(np.concatenate([now.validation, now.test]), before.train).sum()
    if seen:
        warnings.warn(
            f"{seen} of the cells that are held out now trained the autoencoder: scores on them will be better than on "
            "new cells; leave out split= to keep the split of the autoencoder",
            stacklevel=3,
        )


def _from_dict(
    cells: CellData, split: Mapping[str, Any], validation: float, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    known = ("validation", "test", "hold_out", "conditions")
    for name in split:
        if name not in known:
            raise DataError(f"unknown name {name!r} in split.{suggestion(name, known, 'names are')}")
    shares = {"test": _share(split.get("test", 0.0), "test")}
    shares["validation"] = _share(split.get("validation", validation), "validation")
    spec: dict[str, Any] = {"kind": "random", **shares, "seed": seed}
    parts = np.zeros(cells.n_cells, dtype=np.int8)
    for name, hold_out in (("hold_out", _held_levels), ("conditions", _held_conditions)):
        if split.get(name) is not None:
            held, spec[name] = hold_out(cells, split[name])
            parts[held] = PARTS.index("test")
            spec["kind"] = "hold_out"
    generator = np.random.default_rng(seed)
    for name in ("test", "validation"):
        # a share of all cells of a condition, so that validation does not depend on how many were taken for test
        rate = shares[name] / (1 - shares["test"]) if name == "validation" else shares[name]
        if rate >= 1:
            raise DataError(f"the shares of test and validation leave nothing for training: {shares}")
        if rate and (parts == 0).any():
            free = np.flatnonzero(parts == 0)
            parts[free[_stratified(_conditions(cells)[free], rate, generator, name)]] = PARTS.index(name)
    return parts, spec


def _conditions(cells: CellData) -> np.ndarray:
    """Return a number for the condition of each cell, in the order of their codes; of few bytes for many cells."""
    sizes = cells.registry.vocabulary
    numbers: np.ndarray = np.zeros(cells.n_cells, dtype=np.int32 if np.prod(sizes, dtype=float) < 2**31 else np.int64)
    for codes, size in zip(_labels(cells).T, sizes, strict=True):
        numbers *= size
        numbers += codes.astype(numbers.dtype)
    return numbers


def _stratified(conditions: np.ndarray, share: float, generator: np.random.Generator, name: str) -> np.ndarray:
    """Return which cells are drawn: ``floor(share * n)`` of every condition, but at least one cell if share > 0."""
    n = len(conditions)
    order = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    generator.shuffle(order)
    order = order[np.argsort(conditions[order], kind="stable")]  # conditions in turn, random within
    starts = np.concatenate([[0], np.flatnonzero(np.diff(conditions[order])) + 1])
    sizes = np.diff(starts, append=n)
    take = np.minimum(np.floor(share * sizes + 1e-9), sizes - 1).astype(np.int64)  # 1e-9: 0.1 * 10 cells are one cell
    if taken := take.sum():
        return order[np.arange(taken) + np.repeat(starts - np.cumsum(take) + take, take)]
    if sizes.max() < 2:
        raise DataError(
            f"no condition has two cells or more, so none can be spared for {name}: give more cells per condition, or "
            f"set {name} to 0 to train on all {n} cells"
        )
    wanted = max(1, int(share * n))  # all conditions are small: one cell each of some of the larger ones
    first = order[starts[sizes >= 2]]
    return generator.permutation(first)[:wanted]


def _held_levels(cells: CellData, hold_out: Any) -> tuple[np.ndarray, dict[str, list[str]]]:
    if not isinstance(hold_out, Mapping):
        raise DataError("hold_out takes a dict of labels by role, such as {'perturbation': ['GATA3']}")
    held, spec = np.zeros(cells.n_cells, dtype=bool), {}
    for name, values in hold_out.items():
        position = _position(cells.registry, name)
        attribute = cells.registry.attributes[position]
        labels = [as_label(v) for v in (np.atleast_1d(np.asarray(values, dtype=object)))]
        for label, code in zip(labels, attribute.encode(labels), strict=True):
            found = _labels(cells)[:, position] == code
            if not found.any():
                raise DataError(f"hold_out: the data have no cell with {attribute.role} {label!r}")
            held |= found
        spec[attribute.role] = labels
    return held, spec


def _held_conditions(cells: CellData, conditions: Any) -> tuple[np.ndarray, list[dict[str, str]]]:
    rows = conditions.to_dict("records") if hasattr(conditions, "to_dict") else list(conditions)
    held, spec = np.zeros(cells.n_cells, dtype=bool), []
    for row in rows:
        if not isinstance(row, Mapping) or not row:
            raise DataError("every row of conditions is a dict of labels by role or obs column")
        found, labels = np.ones(cells.n_cells, dtype=bool), {}
        for name, value in row.items():
            position = _position(cells.registry, name)
            attribute = cells.registry.attributes[position]
            labels[attribute.role] = as_label(value)
            found &= _labels(cells)[:, position] == attribute.encode(labels[attribute.role])
        if not found.any():
            raise DataError(f"conditions: the data have no cell with {labels}")
        held |= found
        spec.append(labels)
    return held, spec


def _from_labels(cells: CellData, split: Any) -> tuple[np.ndarray, dict[str, Any]]:
    import pandas as pd

    if isinstance(split, str):
        get_column(cells.obs, split, "split")
        table, key, spec = cells.obs, split, {"kind": "column", "column": split}
    else:
        if isinstance(split, pd.Series) and not split.index.equals(cells.obs_names):
            raise DataError(
                "the index of the split differs from the names of the cells: reindex it, or pass its values"
            )
        values = np.asarray(split, dtype=object)
        if values.shape != (cells.n_cells,):
            raise DataError(f"a split needs one value for each of the {cells.n_cells} cells, got shape {values.shape}")
        table, key, spec = pd.DataFrame({"split": values}), "split", {"kind": "array"}
    codes, levels = read_labels(table, key, "split")
    if unknown := [level for level in levels if level not in PARTS]:
        raise DataError(f"split values must be among {PARTS}, found {unknown[:5]}")
    return np.array([PARTS.index(level) for level in levels], dtype=np.int8)[codes], spec


def _untrained(registry: Registry, labels: np.ndarray, train: np.ndarray) -> dict[str, list[str]]:
    out = {}
    for position, attribute in enumerate(registry.attributes):
        n_cells = np.bincount(labels[:, position], minlength=len(attribute))
        lost = np.flatnonzero((n_cells > 0) & (np.bincount(labels[train, position], minlength=len(attribute)) == 0))
        if len(lost):
            out[attribute.role] = attribute.decode(lost).tolist()
            warnings.warn(
                f"no training cell is left for the {attribute.role} levels {out[attribute.role]}: they get no trained "
                "embedding and cannot be generated",
                UserWarning,
                stacklevel=3,
            )
    return out


def _position(registry: Registry, name: str) -> int:
    """Return the place of a role, given by its name or its obs column, in `ROLES`."""
    columns = [attribute.column for attribute in registry.attributes]
    if name in columns:
        return columns.index(name)
    if name in ROLES:
        return ROLES.index(name)
    names = [*ROLES, *(c for c in columns if c is not None)]
    raise DataError(f"{name!r} is neither a role nor the column of one.{suggestion(name, names, 'names are')}")


def _labels(cells: CellData) -> np.ndarray:
    assert cells.labels is not None
    return cells.labels


def _share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise DataError(f"the share for {name} must be at least 0 and below 1, got {value!r}")
    return float(value)

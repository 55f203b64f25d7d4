"""What a model knows of its data: genes, condition labels, library sizes and training cells; to and from JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any
from weakref import ref

import numpy as np

from scldm_cd4._errors import CheckpointError, DataError, UnknownCategoryError
from scldm_cd4.config import ROLES
from scldm_cd4.size_factors import SizeFactors

LISTED = 12
"""Vocabularies up to this size are written out in error messages."""
KINDS: dict[str, Callable[[str], Any]] = {
    "string": str,
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
}
"""Kinds of values that a label column can hold, and how a label is read as one."""


def near_matches(name: object, known: Iterable[str]) -> list[str]:
    """Return up to three of `known` that are spelt like `name`, letter case aside, best first."""
    folded: dict[str, list[str]] = {}
    for level in known:
        folded.setdefault(level.casefold(), []).append(level)
    close = get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.6)
    return [level for key in close for level in folded[key]][:3]


def suggestion(name: object, known: Iterable[str], kind: str) -> str:
    """Return a sentence that names near matches, and all of `known` where they are few."""
    known = list(known)
    close = near_matches(name, known)
    sentence = f" Near matches: {', '.join(map(repr, close))}." if close else ""
    if len(known) <= LISTED:
        return f"{sentence} The {kind}: {', '.join(map(repr, known)) or 'none'}."
    return sentence


@dataclass(frozen=True)
class Attribute:
    """One condition attribute of the cells and its levels.

    The code of a level is its position; the code ``len(levels)`` is kept for a dropped label.
    """

    role: str
    """One of `scldm_cd4.config.ROLES`."""
    column: str | None
    """The column of ``obs``; None when the data have no such column, then ``all`` is the single level."""
    levels: tuple[str, ...]
    kind: str = "string"
    """What the column holds, one of `KINDS`; generated cells have values of this kind."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"unknown role {self.role!r}; roles: {ROLES}")
        _check_names(self.levels, f"the {self.role} levels")
        if self.kind not in KINDS:
            raise DataError(f"unknown kind {self.kind!r} of the {self.role} labels; kinds: {', '.join(KINDS)}")
        try:
            distinct = len(set(self.values(self.levels)))
        except (KeyError, ValueError) as error:
            raise DataError(f"the {self.role} levels are not all of kind {self.kind!r}: {error}") from error
        if distinct < len(self):
            raise DataError(f"the {self.role} levels are not unique as values of kind {self.kind!r}")

    def __len__(self) -> int:
        return len(self.levels)

    def encode(self, labels: str | Iterable[str]) -> np.ndarray:
        """Return the codes of labels.

        Parameters
        ----------
        labels
            One label or many; a single one gives an array of length 1.

        Returns
        -------
        Codes, int64, shape (number of labels,).

        Raises
        ------
        UnknownCategoryError
            A label is not among the levels; names it, the column and near matches.
        """
        labels = [labels] if isinstance(labels, str) else list(labels)
        position = {level: code for code, level in enumerate(self.levels)}
        for label in labels:
            if label not in position:
                raise UnknownCategoryError(self._unknown(label))
        return np.fromiter((position[label] for label in labels), dtype=np.int64, count=len(labels))

    def decode(self, codes: Iterable[int]) -> np.ndarray:
        """Return the labels of codes, as an object array of strings.

        Raises
        ------
        UnknownCategoryError
            A code is not that of a level (the code of a dropped label included).
        """
        index = np.asarray(codes, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self.levels):
            raise UnknownCategoryError(
                f"{self.role} codes are 0..{len(self.levels) - 1}, got {index.min()}..{index.max()}"
            )
        return np.array(self.levels, dtype=object)[index]

    def values(self, labels: Iterable[str]) -> list[Any]:
        """Return labels as the values that stand in the user's column."""
        return [KINDS[self.kind](label) for label in labels]

    def _unknown(self, label: object) -> str:
        if self.column is None and len(self) == 1:
            return (
                f"no {self.role} was declared, so {label!r} cannot be asked for: leave it out, or name its column with "
                f"setup_anndata(..., {self.role}_key=...) before training"
            )
        where = f" (column {self.column!r})"
        hint = suggestion(label, self.levels, f"{self.role} levels are")
        return f"{label!r} is not among the {len(self.levels)} {self.role} levels that the model knows{where}.{hint}"


class Registration:
    """The cells that a model has, and how they were declared when it took them; a copy of it knows no cells."""

    def __init__(self, adata: Any = None, keys: Mapping[str, str | None] | None = None) -> None:
        self._adata = None if adata is None else ref(adata)
        self.keys = dict(keys or {})

    def holds(self, adata: Any) -> bool:
        """Return whether these are the cells, or a view of them."""
        own = None if self._adata is None else self._adata()
        return own is not None and (adata is own or (adata.is_view and adata._adata_ref is own))

    def __reduce__(self) -> tuple[Any, ...]:
        return Registration, ()


@dataclass(frozen=True)
class Registry:
    """Genes, vocabularies and training evidence of a model; all that generation needs beside the weights."""

    genes: tuple[str, ...]
    """Gene identifiers in the model's order; gene ``g`` has the index ``g + 1`` in the networks."""
    donor: Attribute
    timepoint: Attribute
    perturbation: Attribute
    control: str | None = None
    """The level of `perturbation` that means unperturbed."""
    var: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """String columns of ``var`` by name, for example gene symbols."""
    gene_id_key: str | None = None
    layer: str | None = None
    size_factor_key: str | None = None
    size_factors: SizeFactors | None = None
    """Library sizes of the training cells; None before training."""
    train_counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Training cells: perturbation -> donor -> time point -> number; absent means none."""
    extended: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Levels by role that were added to the trained model, see `scldm_cd4.extension`; they may lack cells."""
    own: Registration = field(default_factory=Registration, compare=False, repr=False)
    """The model's cells, which keep their declaration; not saved."""

    def __post_init__(self) -> None:
        _check_names(self.genes, "the genes")
        for role, attribute in zip(ROLES, self.attributes, strict=True):
            if attribute.role != role:
                raise DataError(f"the attribute {role!r} has the role {attribute.role!r}")
        if self.control is not None and self.control not in self.perturbation.levels:
            raise DataError(f"the control {self.control!r} is not a perturbation level")
        for name, values in self.var.items():
            if len(values) != len(self.genes):
                raise DataError(f"var column {name!r} has {len(values)} values for {len(self.genes)} genes")

    @property
    def n_genes(self) -> int:
        """The number of genes."""
        return len(self.genes)

    @property
    def attributes(self) -> tuple[Attribute, Attribute, Attribute]:
        """The attributes in the order of `scldm_cd4.config.ROLES`."""
        return (self.donor, self.timepoint, self.perturbation)

    @property
    def vocabulary(self) -> tuple[int, int, int]:
        """The numbers of levels in the order of `scldm_cd4.config.ROLES`; also the codes of dropped labels."""
        return (len(self.donor), len(self.timepoint), len(self.perturbation))

    def encode(self, donor: Sequence[str], timepoint: Sequence[str], perturbation: Sequence[str]) -> np.ndarray:
        """Return label codes, int64, shape (n, 3), in the order of `scldm_cd4.config.ROLES`.

        Raises
        ------
        UnknownCategoryError
            A label is not known.
        """
        given = (donor, timepoint, perturbation)
        columns = [attribute.encode(labels) for attribute, labels in zip(self.attributes, given, strict=True)]
        return np.stack(columns, axis=1)

    def n_train(self, perturbation: str, donor: str, timepoint: str) -> int:
        """Return the number of training cells of a condition; 0 for a condition that training never saw."""
        return self.train_counts.get(perturbation, {}).get(donor, {}).get(timepoint, 0)

    def n_train_contexts(self, perturbation: str) -> int:
        """Return the number of contexts (donor x time point) in which training saw a perturbation."""
        return sum(n > 0 for by_time in self.train_counts.get(perturbation, {}).values() for n in by_time.values())

    def untrained(self, role: str) -> tuple[str, ...]:
        """Return the levels of a role without any training cell, whose embeddings were neither trained nor fitted."""
        seen = set(self.extended.get(role, ())) | {
            {"perturbation": perturbation, "donor": donor, "timepoint": timepoint}[role]
            for perturbation, by_donor in self.train_counts.items()
            for donor, by_time in by_donor.items()
            for timepoint, n in by_time.items()
            if n > 0
        }
        return tuple(level for level in getattr(self, role).levels if level not in seen)

    def with_training(self, labels: np.ndarray, library: np.ndarray, *, min_cells: int = 30) -> "Registry":
        """Return a copy that knows the training cells.

        Parameters
        ----------
        labels
            Codes of the training cells, shape (n, 3).
        library
            Their library sizes (counts), shape (n,).
        min_cells
            Contexts with fewer cells take the library sizes of their time point.
        """
        size_factors = self._size_factors(labels, library, min_cells=min_cells)
        return replace(self, size_factors=size_factors, train_counts=self._counts(labels))

    def _size_factors(self, labels: np.ndarray, library: np.ndarray, **options: Any) -> SizeFactors:
        donor, timepoint, perturbation = labels.T
        return SizeFactors.fit(
            np.log(library),
            donor,
            timepoint,
            donors=self.donor.levels,
            timepoints=self.timepoint.levels,
            perturbation=perturbation,
            perturbations=self.perturbation.levels,
            **options,
        )

    def _counts(self, labels: np.ndarray) -> dict[str, dict[str, dict[str, int]]]:
        keys, numbers = np.unique(np.ravel_multi_index(tuple(labels.T), self.vocabulary), return_counts=True)
        codes = np.stack(np.unravel_index(keys, self.vocabulary), axis=1)
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for (donor, timepoint, perturbation), n in zip(codes.tolist(), numbers.tolist(), strict=True):
            by_donor = counts.setdefault(self.perturbation.levels[perturbation], {})
            by_donor.setdefault(self.donor.levels[donor], {})[self.timepoint.levels[timepoint]] = n
        return counts

    def with_levels(self, levels: Mapping[str, Sequence[str]]) -> "Registry":
        """Return a copy with further levels by role, after those known; one that is known keeps its place.

        Raises
        ------
        DataError
            A label is not of the kind of its column.
        """
        changed: dict[str, Any] = {}
        for role, labels in levels.items():
            old: Attribute = getattr(self, role)
            changed[role] = replace(old, levels=(*old.levels, *(x for x in labels if x not in old.levels)))
        extended = {r: (*self.extended.get(r, ()), *levels.get(r, ())) for r in (*self.extended, *levels)}
        return replace(self, **changed, extended=extended)

    def with_further_cells(self, labels: np.ndarray, library: np.ndarray) -> "Registry":
        """Return a copy that also knows the cells of further contexts; what it knew of others stays as it is.

        Where the numbers of training cells are not known, as in an imported checkpoint, they stay so.

        Parameters
        ----------
        labels, library
            As for `with_training`.
        """
        counts = {p: {d: dict(by_time) for d, by_time in by_donor.items()} for p, by_donor in self.train_counts.items()}
        for perturbation, by_donor in self._counts(labels).items():
            for donor, by_time in by_donor.items():
                counts.setdefault(perturbation, {}).setdefault(donor, {}).update(by_time)
        known = self.size_factors
        if known is not None:
            known = known.with_contexts(self._size_factors(labels, library, shifts=known.perturbations))
        return replace(self, size_factors=known, train_counts=counts if self.train_counts else {})

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values that JSON can hold; labels are keys of their own, never joined."""
        out: dict[str, Any] = {"genes": list(self.genes)}
        for attribute in self.attributes:
            out[attribute.role] = {"column": attribute.column, "levels": list(attribute.levels), "kind": attribute.kind}
        out["control"] = self.control
        out["var"] = {name: list(values) for name, values in self.var.items()}
        out |= {name: getattr(self, name) for name in ("gene_id_key", "layer", "size_factor_key")}
        out["size_factors"] = None if self.size_factors is None else self.size_factors.to_dict()
        out["train_counts"] = {p: {d: dict(t) for d, t in donors.items()} for p, donors in self.train_counts.items()}
        if self.extended:  # models that were not extended stay readable by version 0.1
            out["extended"] = {role: list(levels) for role, levels in self.extended.items()}
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Registry":
        """Build from `to_dict`.

        Raises
        ------
        CheckpointError
            A name is unknown or missing, or a value is of the wrong kind.
        """
        try:
            return cls(**_parse(cls, values))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"the registry is damaged: {error}") from error


def _parse(cls: type[Registry], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)} - {"own"}
    if set(values) | {"extended"} != names:
        raise ValueError(f"missing {sorted(names - set(values))}, unknown {sorted(set(values) - names)}")
    out = dict(values)
    out["genes"] = _strings(values["genes"], "genes")
    for role in ROLES:
        part = values[role]
        if set(part) - {"kind"} != {"column", "levels"}:  # early models have no kind
            raise ValueError(f"{role!r} needs 'column', 'levels' and 'kind', has {sorted(part)}")
        column, levels = _optional(part["column"], role), _strings(part["levels"], role)
        out[role] = Attribute(role, column, levels, part.get("kind", "string"))
    for name in ("control", "gene_id_key", "layer", "size_factor_key"):
        out[name] = _optional(values[name], name)
    out["var"] = {name: _strings(column, name) for name, column in values["var"].items()}
    if values["size_factors"] is not None:
        out["size_factors"] = SizeFactors.from_dict(values["size_factors"])
    out["train_counts"] = {
        p: {d: {t: _whole(n) for t, n in times.items()} for d, times in donors.items()}
        for p, donors in values["train_counts"].items()
    }
    out["extended"] = {role: _strings(levels, "extended") for role, levels in values.get("extended", {}).items()}
    if not set(out["extended"]) <= set(ROLES):
        raise ValueError(f"'extended' has unknown roles: {sorted(out['extended'])}")
    return out


def _check_names(names: tuple[str, ...], what: str) -> None:
    if not names:
        raise DataError(f"{what} are empty")
    if len(set(names)) != len(names):
        raise DataError(f"{what} are not unique")


def _strings(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name!r} is not a list of strings")
    return tuple(values)


def _optional(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name!r} is not a string")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number of cells")
    return value

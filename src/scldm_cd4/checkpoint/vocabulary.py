"""What a reference checkpoint lacks: gene names, condition labels and library sizes.

Genes and labels come from the training AnnData (``var_names`` and the order of the categories, which the codes follow)
or from JSON; library sizes from JSON or from the reference's pickled dicts, which are read without being unpickled.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4.config import ROLES
from scldm_cd4.registry import Attribute, Registry, suggestion
from scldm_cd4.size_factors import LibraryStats, SizeFactors

MAX_BYTES = 256 * 2**20
FILE = "vocabulary.json"
"""Genes and labels, where somebody put them beside a checkpoint."""
FACTORS = "size_factors.json"
"""Library sizes beside an exported checkpoint: ``{"mean": {key: ...}, "sd": {key: ...}}`` of natural logarithms."""
PICKLES = ("log_size_factor_mu.pkl", "log_size_factor_sd.pkl")
"""How the reference calls its files of library sizes."""


@dataclass(frozen=True)
class Vocabulary:
    """Genes and condition labels in the order of a checkpoint's codes."""

    genes: tuple[str, ...]
    levels: dict[str, tuple[str, ...]]
    """Labels by role."""
    columns: dict[str, str | None]
    """The user's column by role."""
    kinds: dict[str, str]
    """What each column holds, one of `scldm_cd4.registry.KINDS`."""
    control: str | None = None

    @classmethod
    def of(cls, registry: Registry) -> "Vocabulary":
        """Take what a model knows of its data."""
        attributes = registry.attributes
        return cls(
            registry.genes,
            {a.role: a.levels for a in attributes},
            {a.role: a.column for a in attributes},
            {a.role: a.kind for a in attributes},
            registry.control,
        )

    def registry(self, size_factors: SizeFactors | None = None) -> Registry:
        """Return what a model knows of its data."""
        donor, timepoint, perturbation = (
            Attribute(role, self.columns[role], self.levels[role], self.kinds[role]) for role in ROLES
        )
        return Registry(self.genes, donor, timepoint, perturbation, self.control, size_factors=size_factors)


def read_vocabulary(source: Any, columns: Mapping[str, str | None]) -> Vocabulary:
    """Take genes and labels from where they are.

    Parameters
    ----------
    source
        The training AnnData, or JSON (a file, or its values): ``genes`` and one list of labels for each class name, and
        optionally ``control``; or the registry of a saved model.
    columns
        What the checkpoint calls each attribute, by role; None for one that it does not know, which has the level
        ``all``. A declaration by `setup_anndata` goes before these names.

    Raises
    ------
    CheckpointError
        The file or a part is missing or damaged.
    DataError
        The AnnData has no such column, or labels that cannot be used.
    """
    if isinstance(source, Mapping):
        return _from_values(dict(source), columns, "vocabulary")
    if isinstance(source, str | Path):
        return _from_values(read_json(Path(source).expanduser()), columns, str(source))
    return _from_adata(source, columns)


def is_registry(values: Mapping[str, Any]) -> bool:
    """Whether JSON values are the registry of a saved model."""
    return all(isinstance(values.get(role), Mapping) and "levels" in values[role] for role in ROLES)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of names and values.

    Raises
    ------
    CheckpointError
        It is missing, too large or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_BYTES} that such a file may have")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no table of names and values")
    return values


def _from_adata(adata: Any, columns: Mapping[str, str | None]) -> Vocabulary:
    import pandas as pd

    from scldm_cd4.data.labels import as_label, get_column, label_kind, read_labels
    from scldm_cd4.data.setup import SETUP_KEY, gene_ids, read_declaration, require_anndata

    require_anndata(adata)
    declared = read_declaration(adata) if SETUP_KEY in adata.uns else {}
    names = {role: declared.get(f"{role}_key") or columns[role] for role in ROLES}
    levels: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, str] = {}
    for role, name in names.items():
        if name is None:
            levels[role], kinds[role] = ("all",), "string"
            continue
        column = get_column(adata.obs, name, f"the {role} of the checkpoint")
        if isinstance(column.dtype, pd.CategoricalDtype):  # unused categories have codes, too
            levels[role] = tuple(as_label(value) for value in column.cat.categories)
        else:
            levels[role] = read_labels(adata.obs, name, role)[1]
        kinds[role] = label_kind(column)
    genes = tuple(gene_ids(adata, declared.get("gene_id_key")))
    return Vocabulary(genes, levels, names, kinds, declared.get("control"))


def _from_values(values: dict[str, Any], columns: Mapping[str, str | None], where: str) -> Vocabulary:
    if is_registry(values):
        return Vocabulary.of(Registry.from_dict(values))
    levels = {}
    for role in ROLES:
        name = columns[role]
        key = next((k for k in (name, role) if k is not None and k in values), None)
        if key is not None:
            levels[role] = _names(values[key], key, where)
        elif name is None:
            levels[role] = ("all",)
        else:
            hint = suggestion(name, values, "names there are")
            raise CheckpointError(f"{where} has no labels for {name!r} (the {role} of the checkpoint).{hint}")
    if "genes" not in values:
        raise CheckpointError(f"{where} has no 'genes'")
    control = values.get("control")
    if control is not None and not isinstance(control, str):
        raise CheckpointError(f"{where}: 'control' is no label")
    genes = _names(values["genes"], "genes", where)
    return Vocabulary(genes, levels, dict(columns), dict.fromkeys(ROLES, "string"), control)


def _names(values: Any, key: str, where: str) -> tuple[str, ...]:
    if isinstance(values, Mapping):  # label -> code, as encoders keep it
        if sorted(values.values(), key=str) != sorted(range(len(values)), key=str):
            raise CheckpointError(f"{where}: {key!r} maps labels to numbers that are not 0, 1, 2, ...")
        values = sorted(values, key=lambda name: values[name])
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise CheckpointError(f"{where}: {key!r} is not a list of names")
    if len(set(values)) < len(values):
        raise CheckpointError(f"{where}: {key!r} names something twice")
    return tuple(values)


def find_size_factors(folder: Path) -> Path | None:
    """Return the JSON of library sizes in a folder, if there is one; pickles are read only where they are named."""
    return path if (path := folder / FACTORS).is_file() else None


def read_size_factors(source: Any, vocabulary: Vocabulary) -> SizeFactors:
    """Take library sizes from files.

    Parameters
    ----------
    source
        A JSON file ``{"mean": {...}, "sd": {...}}`` or its values; or a folder with the reference's two pickled dicts,
        or the paths of both (mean, sd). Values are natural logarithms of the counts per cell on the panel.
    vocabulary
        The labels by which the keys are taken apart: ``{timepoint}_{donor}``, or in the other layout of the reference
        ``{"<class names>": {"{donor}_{perturbation}_{timepoint}": ...}}``, of which contexts are equal mixtures.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or a key fits no or several contexts.
    """
    where = "size_factors"
    if isinstance(source, str | Path):
        where = str(source)
        path = Path(source).expanduser()
        if path.is_dir():
            source = find_size_factors(path) or tuple(path / name for name in PICKLES)
    if isinstance(source, str | Path):
        source = read_json(Path(source).expanduser())
    if isinstance(source, tuple | list):
        from scldm_cd4.checkpoint.inert import read_numbers

        if len(source) != 2:
            raise CheckpointError(f"{where}: give two files of library sizes, means and standard deviations")
        mean, sd = (read_numbers(Path(path).expanduser()) for path in source)
    else:
        mean, sd = _two_tables(source, where)
    try:
        return _joined(mean, sd, vocabulary)
    except (DataError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _two_tables(source: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(source, Mapping):
        raise CheckpointError(f"{where} is no file, folder or table of library sizes: {type(source).__name__}")
    tables = [source.get(a, source.get(b)) for a, b in (("mean", "mu"), ("sd", "std"))]
    if not all(isinstance(table, Mapping) for table in tables):
        raise CheckpointError(f"{where} needs 'mean' and 'sd', each a table of numbers by context")
    return tables[0], tables[1]


def _joined(mean: Mapping[str, Any], sd: Mapping[str, Any], vocabulary: Vocabulary) -> SizeFactors:
    donors, timepoints = vocabulary.levels["donor"], vocabulary.levels["timepoint"]
    if not any(isinstance(value, Mapping) for value in mean.values()):
        return SizeFactors.from_reference(mean, sd, donors=donors, timepoints=timepoints)
    means, sds = _only_group(mean), _only_group(sd)
    if set(means) != set(sds):
        raise DataError("the keys of the means and of the standard deviations differ")
    owners = _owners(vocabulary, means)
    found: dict[str, dict[str, list[LibraryStats]]] = {}
    for key, value in means.items():
        contexts = owners.get(key, set())
        if len(contexts) != 1:
            raise DataError(f"{key!r} fits {len(contexts)} contexts; keys are 'donor_perturbation_timepoint'")
        timepoint, donor = next(iter(contexts))
        stats = LibraryStats(float(value), float(sds[key]), None)
        found.setdefault(timepoint, {}).setdefault(donor, []).append(stats)
    return SizeFactors.of_contexts(
        {t: {d: LibraryStats.mixture(parts) for d, parts in by_donor.items()} for t, by_donor in found.items()}
    )


def _only_group(table: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = next(iter(table.values()))
    if len(table) != 1 or not isinstance(inner, Mapping):
        raise DataError("the nested layout of library sizes holds one group, named by the classes of its keys")
    return inner


def _owners(vocabulary: Vocabulary, keys: Iterable[str]) -> dict[str, set[tuple[str, str]]]:
    """Contexts (time point, donor) that each joined key can mean."""
    perturbations = set(vocabulary.levels["perturbation"])
    out: dict[str, set[tuple[str, str]]] = {}
    pairs = list(product(vocabulary.levels["donor"], vocabulary.levels["timepoint"]))
    for key in keys:
        for donor, timepoint in pairs:
            first, last = f"{donor}_", f"_{timepoint}"
            if key.startswith(first) and key.endswith(last) and key[len(first) : -len(last)] in perturbations:
                out.setdefault(key, set()).add((timepoint, donor))
    return out

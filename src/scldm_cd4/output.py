"""How generated cells are described: labels, evidence, genes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scldm_cd4._errors import GeneMismatchError
from scldm_cd4.conditions import Request
from scldm_cd4.config import ROLES
from scldm_cd4.registry import Registry, suggestion
from scldm_cd4.sampling import role_columns

UNCONDITIONAL = "unconditional"
"""The label in ``obs`` of an attribute that played no part."""
UNITS = {
    "counts": "counts (whole numbers)",
    "mean": "expected counts at the cell's library size",
    "lognorm": "log1p(1e4 counts / counts of the cell)",
    "latent": "latent of the autoencoder",
}


def gene_positions(registry: Registry, genes: Any) -> NDArray[np.int64] | None:
    """Return the positions of genes, or None for all.

    Raises
    ------
    GeneMismatchError
        A gene is not one of the model's, occurs twice, or there are none.
    """
    if genes is None:
        return None
    names = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
    position = {gene: i for i, gene in enumerate(registry.genes)}
    if unknown := [gene for gene in names if gene not in position]:
        hint = suggestion(unknown[0], registry.genes, "genes are")
        raise GeneMismatchError(f"{len(unknown)} of {len(names)} genes are unknown, first {unknown[0]!r}.{hint}")
    if not names or len(set(names)) < len(names):
        raise GeneMismatchError("genes must be a list of different genes with at least one")
    return np.array([position[gene] for gene in names], dtype=np.int64)


def describe_genes(registry: Registry, genes: NDArray[np.int64] | None) -> pd.DataFrame:
    """Return ``var``: identifiers and the string columns that the model keeps."""
    var = pd.DataFrame({name: list(values) for name, values in registry.var.items()}, index=pd.Index(registry.genes))
    return var if genes is None else var.iloc[genes]


def describe_latents(n: int) -> pd.DataFrame:
    """Return ``var`` of flat latents."""
    return pd.DataFrame(index=pd.Index([f"latent_{i}" for i in range(n)]))


def describe_cells(registry: Registry, requests: Sequence[Request], library: NDArray[np.float64]) -> pd.DataFrame:
    """Return ``obs`` of requested cells: labels, library size and evidence."""
    numbers = np.array([request.n_cells for request in requests])
    obs: dict[str, Any] = {
        "is_generated": np.ones(int(numbers.sum()), dtype=bool),
        "size_factor": library,
    }
    obs |= _evidence(registry, [request.labels for request in requests], numbers)
    obs |= label_columns(registry, [request.labels for request in requests], numbers)
    names = [f"{_name(registry, r.labels)}:{i}" for r in requests for i in range(r.first, r.first + r.n_cells)]
    return pd.DataFrame(obs, index=pd.Index(names, dtype=object))


def describe_counterfactuals(
    registry: Registry,
    names: pd.Index,
    source: NDArray[np.int64],
    target: NDArray[np.int64],
    dropped: Sequence[str],
    library: NDArray[np.float64],
) -> pd.DataFrame:
    """Return ``obs`` of counterfactual cells: their own names, new labels, and old labels as ``source_<column>``."""
    conditions, inverse = np.unique(target, axis=0, return_inverse=True)
    labels = [_decode(registry, codes, dropped) for codes in conditions]
    index = inverse.ravel()
    ones = np.ones(len(labels), dtype=np.int64)
    obs: dict[str, Any] = {"is_generated": np.ones(len(target), dtype=bool), "size_factor": library}
    obs |= {name: values[index] for name, values in _evidence(registry, labels, ones).items()}
    obs |= {name: values[index] for name, values in label_columns(registry, labels, ones).items()}
    conditions, inverse = np.unique(source, axis=0, return_inverse=True)
    before = label_columns(registry, [_decode(registry, c) for c in conditions], np.ones(len(conditions), dtype=int))
    obs |= {f"source_{name}": values[inverse.ravel()] for name, values in before.items()}
    return pd.DataFrame(obs, index=pd.Index(names.astype(str), dtype=object))


def _decode(registry: Registry, codes: NDArray[np.int64], dropped: Sequence[str] = ()) -> tuple[str | None, ...]:
    return tuple(
        None if a.role in dropped else a.levels[code] for a, code in zip(registry.attributes, codes, strict=True)
    )


def label_columns(
    registry: Registry, labels: Sequence[tuple[str | None, ...]], numbers: NDArray[np.int64]
) -> dict[str, pd.Categorical]:
    """Return the user's columns as categoricals, with the levels that occur in the model's order.

    The categories are of the kind of the user's column, so that `anndata.concat` with the user's cells can be written;
    a column with `UNCONDITIONAL` has strings.
    """
    out = {}
    columns = role_columns(registry)
    for position, attribute in enumerate(registry.attributes):
        if attribute.role not in columns:
            continue
        values = [UNCONDITIONAL if (x := each[position]) is None else x for each in labels]
        order = [*attribute.levels, *([UNCONDITIONAL] if UNCONDITIONAL not in attribute.levels else [])]
        present = set(values)
        levels = [level for level in order if level in present]
        code = {level: i for i, level in enumerate(levels)}
        codes = np.repeat(np.array([code[v] for v in values], dtype=np.int64), numbers)
        categories = levels if None in {each[position] for each in labels} else attribute.values(levels)
        out[columns[attribute.role]] = pd.Categorical.from_codes(codes, categories)
    return out


def evidence(registry: Registry, labels: tuple[str | None, ...]) -> tuple[int, int]:
    """Return the training cells, and the contexts with training cells, that agree with labels (None: any)."""
    donor, timepoint, perturbation = labels
    n = 0
    trained = registry.train_counts
    chosen = trained.values() if perturbation is None else [trained.get(perturbation, {})]
    seen = set()
    for by_donor in chosen:
        for d, by_time in by_donor.items():
            for t, count in by_time.items():
                if count > 0:
                    seen.add((d, t))
                    n += count * (donor in (None, d) and timepoint in (None, t))
    return n, len(seen)


def _evidence(
    registry: Registry, labels: Sequence[tuple[str | None, ...]], numbers: NDArray[np.int64]
) -> dict[str, Any]:
    if not registry.train_counts:
        return {}
    found = np.array([evidence(registry, x) for x in labels], dtype=np.int64)
    return {
        "n_train_cells": np.repeat(found[:, 0], numbers),
        "n_train_contexts": np.repeat(found[:, 1], numbers),
    }


def _name(registry: Registry, labels: tuple[str | None, ...]) -> str:
    """Labels joined so that different labels never give the same name."""
    columns = role_columns(registry)
    shown = [
        (UNCONDITIONAL if x is None else x).replace("\\", "\\\\").replace(":", "\\:")
        for role, x in zip(ROLES, labels, strict=True)
        if role in columns
    ]
    return ":".join(reversed(shown))

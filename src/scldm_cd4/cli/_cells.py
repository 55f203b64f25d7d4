"""Cells as the summary compares them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from scldm_cd4 import metrics
from scldm_cd4.registry import Registry


@dataclass(frozen=True)
class Cells:
    """Counts with the codes of their conditions."""

    counts: sparse.csr_matrix
    """Cells x genes, in the model's order."""
    values: sparse.csr_matrix
    """The same, log-normalised."""
    perturbation: np.ndarray
    """Code of each cell's perturbation, int64."""
    context: np.ndarray
    """Code of each cell's donor and time point, int64."""

    @classmethod
    def of(cls, counts: Any, labels: np.ndarray, registry: Registry) -> "Cells":
        """Take counts in the model's gene order and label codes, shape (cells, 3), in the order of ``ROLES``."""
        counts = sparse.csr_matrix(counts)
        context = labels[:, 0] * len(registry.timepoint) + labels[:, 1]
        return cls(counts, metrics.log_normalize(counts), labels[:, 2], context)

    @classmethod
    def generated(cls, adata: Any, registry: Registry) -> "Cells":
        """Take the output of ``CD4Model.generate``."""
        codes = [
            np.zeros(adata.n_obs, dtype=np.int64)  # the single level
            if attribute.column is None
            else attribute.encode(adata.obs[attribute.column].astype(str))
            for attribute in registry.attributes
        ]
        return cls.of(adata.X, np.column_stack(codes), registry)

    def __len__(self) -> int:
        return len(self.perturbation)

    def __getitem__(self, rows: np.ndarray) -> "Cells":
        return Cells(self.counts[rows], self.values[rows], self.perturbation[rows], self.context[rows])

    def of_perturbation(self, code: int) -> "Cells":
        """Return the cells of one perturbation."""
        return self[np.flatnonzero(self.perturbation == code)]

    def draw(self, contexts: np.ndarray, rng: np.random.Generator) -> "Cells | None":
        """Draw as many cells of each context as `contexts` has, without repeats; None where there are too few."""
        rows = []
        for context, n in zip(*np.unique(contexts, return_counts=True), strict=True):
            pool = np.flatnonzero(self.context == context)
            if len(pool) < n:
                return None
            rows.append(rng.choice(pool, n, replace=False))
        return self[np.concatenate(rows)]


def halve(cells: Cells, rng: np.random.Generator) -> tuple[Cells, Cells]:
    """Split cells at random into two halves of every context."""
    order = rng.permutation(len(cells))
    order = order[np.argsort(cells.context[order], kind="stable")]
    return cells[order[::2]], cells[order[1::2]]


def stack(parts: Sequence[Cells]) -> Cells:
    """Put cells together."""
    return Cells(
        sparse.vstack([part.counts for part in parts], format="csr"),
        sparse.vstack([part.values for part in parts], format="csr"),
        np.concatenate([part.perturbation for part in parts]),
        np.concatenate([part.context for part in parts]),
    )

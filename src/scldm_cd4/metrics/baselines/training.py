"""What baselines know: count profiles of the training cells by condition, and the shifts between them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import TARGET_SUM, Key, group_means
from scldm_cd4.metrics.cells.samples import Sample


@dataclass(frozen=True)
class Training:
    """Training cells with the profile of every condition.

    Attributes
    ----------
    sample
        Training cells with counts.
    control
        Label of the control.
    """

    sample: Sample
    control: str

    def __post_init__(self) -> None:
        if self.sample.counts is None:
            raise DataError("baselines emit counts, so they need training cells with raw counts")

    @cached_property
    def position(self) -> dict[Key, int]:
        """Row of every condition."""
        return {key: row for row, key in enumerate(self.sample.keys)}

    @cached_property
    def share(self) -> np.ndarray:
        """Share of each gene in the summed counts of a condition, (conditions, genes)."""
        means, sizes = group_means(self.sample.counts, self.sample.codes, len(self.sample.keys))
        totals = means.sum(axis=1, keepdims=True)
        return np.divide(means, totals, out=np.zeros_like(means), where=(totals > 0) & (sizes[:, None] > 0))

    @cached_property
    def profile(self) -> np.ndarray:
        """log(1 + 1e4 share), the space in which shifts add up, (conditions, genes)."""
        return np.asarray(np.log1p(TARGET_SUM * self.share))

    @cached_property
    def controls(self) -> dict[Key, int]:
        """Row of the control of every context that has one."""
        return {key[:-1]: row for key, row in self.position.items() if key[-1] == self.control}

    @cached_property
    def perturbed(self) -> np.ndarray:
        """Rows of the perturbed conditions whose context has a control, (T,)."""
        rows = [row for key, row in self.position.items() if key[-1] != self.control and key[:-1] in self.controls]
        return np.array(rows, dtype=np.int64)

    @cached_property
    def perturbed_keys(self) -> list[Key]:
        """Their labels."""
        return [self.sample.keys[row] for row in self.perturbed]

    @cached_property
    def shifts(self) -> np.ndarray:
        """Profile minus that of the control of the same context, (T, genes)."""
        controls = np.array([self.controls[key[:-1]] for key in self.perturbed_keys], dtype=np.int64)
        return np.asarray(self.profile[self.perturbed] - self.profile[controls])

    @cached_property
    def contexts(self) -> dict[str, list[Key]]:
        """Contexts with a control in which each perturbation has training cells."""
        found: dict[str, list[Key]] = {}
        for key in self.perturbed_keys:
            found.setdefault(key[-1], []).append(key[:-1])
        return found

    @cached_property
    def labels(self) -> dict[Key, list[str]]:
        """Perturbations with training cells in each context."""
        found: dict[Key, list[str]] = {}
        for key in self.position:
            if key[-1] != self.control:
                found.setdefault(key[:-1], []).append(key[-1])
        return found

    def nearest(self, context: Key, candidates: list[Key]) -> Key | None:
        """Choose the other context whose control profile is nearest (Euclidean); None without any."""
        others = [other for other in candidates if other != context]
        if not others or context not in self.controls:
            return None
        own = self.profile[self.controls[context]]
        rows = [self.controls[other] for other in others]
        return others[int(np.square(self.profile[rows] - own).sum(axis=1).argmin())]

    def target_share(self, context: Key, shift: np.ndarray) -> np.ndarray:
        """Share of each gene after a shift of the control profile of a context, (genes,); adds up to 1."""
        share = np.maximum(np.expm1(self.profile[self.controls[context]] + shift), 0.0)
        return np.asarray(share / share.sum())

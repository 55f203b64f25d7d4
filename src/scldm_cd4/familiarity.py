"""How near given cells lie to the training cells, beside held-out cells of the same data.

A model keeps latents of some training cells, and of held-out cells how far they lie from these and how likely their
counts are. Query cells are set against the held-out ones: percentiles say how many of them are as unusual.
"""

import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4._errors import CheckpointError
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.splits import Split
from scldm_cd4.embedding import latents, reconstruction_error
from scldm_cd4.nn import VAE
from scldm_cd4.train.rng import key_seed

MAX_KEPT, MAX_HELD_OUT = 2000, 1000
"""Training cells whose latents are kept, and held-out cells that are looked at."""
NEIGHBOURS = 10
FAR = 0.99
"""A cell beyond this quantile of the held-out cells, in either measure, counts as far."""
FAR_SHARE = 0.05
"""Share of far cells above which a warning is given; three held-out cells are added, for chance where they are few."""
MAX_CHECKED = 500
"""Cells that a check in passing looks at."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Familiarity:
    """Training cells, and held-out cells beside them."""

    kept: NDArray[np.float32]
    """Latents of training cells (m, S L)."""
    distance: Array
    """Mean distance of each held-out cell to its nearest kept ones (h,)."""
    nll: Array
    """Negative log-likelihood of each held-out cell, nats (h,)."""
    library: Array
    """Counts of each held-out cell (h,)."""
    held_out: bool
    """False where no cell was held out, so that training cells stand in."""

    @classmethod
    def fit(cls, vae: VAE, cells: CellData, split: Split, seed: int) -> "Familiarity":
        """Look at training and held-out cells of a split, a seeded sample of each."""
        generator = np.random.default_rng(key_seed(seed, 50))
        train, held = split.train, split.validation
        if not len(held):
            mixed = generator.permutation(train)
            n = max(1, min(len(train) // 5, MAX_HELD_OUT))
            train, held = (mixed[n:], mixed[:n]) if len(train) > 1 else (train, train)
        kept, compared = (
            np.sort(generator.choice(rows, n, replace=False)) if len(rows) > n else rows
            for rows, n in ((train, MAX_KEPT), (held, MAX_HELD_OUT))
        )
        known = latents(vae, cells, kept)
        found = measure(vae, cells, compared, known)
        return cls(known, *found, held_out=bool(len(split.validation)))

    def compare(self, vae: VAE, cells: CellData, rows: NDArray[np.int64]) -> pd.DataFrame:
        """Return the table of `CD4Model.query_distance` for some cells."""
        distance, nll, library = measure(vae, cells, rows, self.kept)
        slope, level = self._trend()
        own, others = (np.log(x) - slope * np.log(n) - level for x, n in ((nll, library), (self.nll, self.library)))
        table = pd.DataFrame({"latent_distance": distance}, index=cells.obs_names[rows])
        table["latent_percentile"] = _percentile(distance, self.distance)
        table["nll"] = nll
        table["nll_percentile"] = _percentile(own, others)
        table["is_far"] = (distance > np.quantile(self.distance, FAR)) | (own > np.quantile(others, FAR))
        table.attrs = {"n_held_out": len(self.distance), "held_out": self.held_out, "neighbours": self.neighbours}
        return table

    @property
    def neighbours(self) -> int:
        """The number of nearest training cells that a distance is the mean over."""
        return min(NEIGHBOURS, len(self.kept))

    def _trend(self) -> tuple[float, float]:
        """Slope and level of the log negative log-likelihood over the log library size: more counts cost more."""
        x, y = np.log(self.library), np.log(self.nll)
        if len(x) < NEIGHBOURS or x.std() == 0:
            return 0.0, float(y.mean())
        slope, level = np.polyfit(x, y, 1)
        return float(slope), float(level)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors, for a file."""
        measures = np.stack([self.distance, self.nll, self.library])
        return {
            "kept": torch.from_numpy(self.kept),
            "measures": torch.from_numpy(measures),
            "held_out": torch.tensor([int(self.held_out)]),
        }

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor], width: int) -> "Familiarity":
        """Build from `tensors`; `width` is that of a flat latent.

        Raises
        ------
        CheckpointError
            They do not fit.
        """
        try:
            kept, measures = values["kept"].numpy(), values["measures"].numpy()
            if kept.ndim != 2 or kept.shape[1] != width or len(measures) != 3 or not np.isfinite(measures).all():
                raise ValueError(f"shapes {kept.shape} and {measures.shape} for latents of width {width}")
            distance, nll, library = measures
            return cls(kept, distance, nll, library, held_out=bool(values["held_out"][0]))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"what the model keeps of its training cells is damaged: {error}") from error


def measure(
    vae: VAE, cells: CellData, rows: NDArray[np.int64], known: NDArray[np.float32]
) -> tuple[Array, Array, Array]:
    """Return mean distance to the nearest known latents, negative log-likelihood and library size of cells (n,) each.

    Labels play no part, so that cells of unknown donors can be looked at.
    """
    plain = copy(cells)
    plain.labels = None
    z = torch.from_numpy(latents(vae, plain, rows))
    k = min(NEIGHBOURS, len(known))
    nearest = [
        torch.cdist(part, torch.from_numpy(known)).topk(k, largest=False).values.mean(1) for part in z.split(512)
    ]
    nll = reconstruction_error(vae, plain, rows)
    library = np.asarray(cells.counts(rows).sum(axis=1), dtype=np.float64).ravel()
    return torch.cat(nearest).double().numpy(), nll, library


def warn_of_far_cells(known: Familiarity | None, vae: VAE, cells: CellData, *, stacklevel: int) -> None:
    """Warn where many of the cells, of which at most `MAX_CHECKED` are looked at, lie far from the training cells."""
    if known is None:
        return
    rows = np.unique(np.linspace(0, cells.n_cells - 1, min(cells.n_cells, MAX_CHECKED)).astype(np.int64))
    far = float(known.compare(vae, cells, rows)["is_far"].mean())
    if far > FAR_SHARE + 3 / len(known.distance):
        who = "held-out" if known.held_out else "other training"
        warnings.warn(
            f"{far:.0%} of the given cells lie farther from the training cells, or are less likely, than 99 % of {who} "
            "cells: predictions for such cells extrapolate. query_distance(adata) tells which they are",
            UserWarning,
            stacklevel=stacklevel,
        )


def _percentile(values: Array, reference: Array) -> Array:
    """Return the share of reference values below, in percent."""
    return 100.0 * np.searchsorted(np.sort(reference), values) / len(reference)

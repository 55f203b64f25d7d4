"""Random numbers of generated cells, keyed by what they are for.

Every stream is a counter-based generator (Philox) whose key is a hash of the seed, the labels, the number of the
replicate block and the purpose. It depends on nothing else: not on other conditions, on batches or on who draws.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Cells of a condition that share one stream per purpose; the first k rows of a block do not depend on the rest."""


def stream(seed: int, labels: Sequence[str | None], block: int | str, purpose: str) -> np.random.Generator:
    """Return the generator of one purpose.

    Parameters
    ----------
    seed
        Any whole number.
    labels
        Labels of the condition; None for one that plays no part. They are hashed as JSON, so that ``"A_B", "C"`` and
        ``"A", "B_C"`` differ.
    block
        Number of the replicate block, or another name for the cells.
    purpose
        What the numbers are for.
    """
    key = hashlib.sha256(json.dumps([seed, list(labels), block, purpose]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def library_uniforms(seed: int, labels: Sequence[str | None], block: int, start: int, stop: int) -> NDArray[np.float64]:
    """Return one number in (0, 1) per cell, for the rows `start` to `stop` of a block."""
    draws = stream(seed, labels, block, "library").random(stop)[start:]
    return np.maximum(draws, 2.0**-54)


def latent_normals(
    seed: int, labels: Sequence[str | None], block: int, start: int, stop: int, width: int
) -> NDArray[np.float32]:
    """Return standard normal numbers (stop - start, width), for the rows `start` to `stop` of a block."""
    return stream(seed, labels, block, "latent").standard_normal((stop, width), dtype=np.float32)[start:]


def count_uniforms(
    seed: int, labels: Sequence[str | None], block: int, start: int, stop: int, n_genes: int
) -> NDArray[np.float64]:
    """Return one number in [0, 1) per cell and gene, for the rows `start` to `stop` of a block."""
    return stream(seed, labels, block, "counts").random((stop, n_genes))[start:]

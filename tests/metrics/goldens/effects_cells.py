"""Small counts for the effect goldens, the same in every version of numpy."""

import numpy as np

CONTROL = "non-targeting"
N_GENES = 120
SIZES = {"real": (160, 60, 45, 52, 38, 70, 41, 55, 48), "pred": (120, 50, 45, 60, 42, 58, 37, 55, 66)}
SIZES["flat"] = SIZES["pred"]
"""Cells of the control and of eight perturbations."""
GENES = [f"g{i:03d}" for i in range(N_GENES)]
PERTURBATIONS = [CONTROL, *GENES[:8]]


def effect_cells(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Give counts (cells, genes) and perturbation labels; ``flat`` is a prediction without effects."""
    rng = np.random.Generator(np.random.PCG64(11))
    base = 2.0 + 12.0 * rng.random(N_GENES) ** 3
    effect = (3.0 * rng.random((9, N_GENES)) - 1.5) * (rng.random((9, N_GENES)) < 0.25)
    effect[0] = 0.0
    effect[np.arange(1, 9), np.arange(8)] = -2.0  # the target of a knock-down
    noise = (2.0 * rng.random((9, N_GENES)) - 1.0) * (rng.random((9, N_GENES)) < 0.15)
    noise[0] = 0.0
    rng = np.random.Generator(np.random.PCG64({"real": 12, "pred": 13, "flat": 14}[side]))
    labels = np.repeat(np.arange(9), SIZES[side])
    # the prediction has the effects weaker, mixed with those of the next perturbation, and with errors
    mixed = np.concatenate([effect[:1], 0.35 * effect[1:] + 0.35 * np.roll(effect[1:], 1, axis=0)]) + noise
    change = {"real": effect, "pred": mixed, "flat": 0.0 * effect}[side]
    depth = 0.5 + rng.random(len(labels))
    mean = depth[:, None] * (base * np.exp(change))[labels]
    # geometric counts by inversion: only the stream of uniform numbers must stay the same
    counts = np.floor(np.log1p(-rng.random(mean.shape)) / np.log(mean / (1.0 + mean)))
    return counts, np.array(PERTURBATIONS)[labels]

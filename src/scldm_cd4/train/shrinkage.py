"""Adaptive shrinkage of many noisy effects toward zero."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
VARIANCES = np.concatenate([[0.0], np.geomspace(1e-4, 4.0, 12)])
"""Of the normal distributions that the prior is mixed of."""
NULL_COUNT = 10.0
"""Effects without any signal that are added to the estimates: few effects do not make a prior."""
MAX_EFFECTS = 20_000
"""Effects that the prior is estimated from."""
N_ITERATIONS = 50
"""Of expectation and maximisation."""


def adaptive_shrink(effects: FloatArray, noise: FloatArray, generator: np.random.Generator) -> FloatArray:
    r"""Return the posterior means of effects under a mixture of normal distributions around zero.

    With :math:`y \sim N(b, v)` and :math:`b \sim \sum_k \pi_k N(0, \tau_k^2)`, the weights :math:`\pi_k` are those of
    the highest likelihood over all effects, and
    :math:`E[b] = y \sum_k w_k \tau_k^2 / (\tau_k^2 + v)` with :math:`w_k` the posterior weights (Stephens 2017,
    *Biostatistics* 18, 275). Where most effects are nothing they become nothing, and few large ones among them stay.

    Parameters
    ----------
    effects, noise
        Estimates and their variances (levels, genes).
    generator
        Draws `MAX_EFFECTS` of more effects for the weights.
    """
    y, v = effects.ravel(), noise.ravel()
    if len(y) > MAX_EFFECTS:
        some = generator.choice(len(y), MAX_EFFECTS, replace=False)
        y, v = y[some], v[some]
    density, pi = _density(y, v), np.full(len(VARIANCES), 1 / len(VARIANCES))
    null = NULL_COUNT * (VARIANCES == 0)
    for _ in range(N_ITERATIONS):
        weights = density * pi
        pi = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0) + null
        pi /= pi.sum()
    out = np.empty_like(effects)
    for i, (y, v) in enumerate(zip(effects, noise, strict=True)):
        weights = _density(y, v) * pi
        kept = (weights * (VARIANCES / (VARIANCES + v[:, None]))).sum(axis=1)
        out[i] = y * kept / weights.sum(axis=1)
    return out


def _density(y: FloatArray, v: FloatArray) -> FloatArray:
    """Densities of effects (n,) under each part of the prior (n, parts), up to a factor for each effect."""
    variance = VARIANCES + v[:, None]
    log = -0.5 * (np.log(variance) + np.square(y)[:, None] / variance)
    density: FloatArray = np.exp(log - log.max(axis=1, keepdims=True))
    return density

"""Guidance: conditional and less conditional velocities combined.

Every rule here is a sum of velocities with coefficients that add up to one, each velocity with some of its labels
dropped. Terms with coefficient 0 are never computed; what remains goes through the network as one batch.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from scldm_cd4.config import ROLES, Dropout
from scldm_cd4.flow.path import Velocity

Guidance = float | Mapping[str, float]

EVERYWHERE = (0.0, 1.0)
ROUNDING = 1e-6
"""Of a time in single precision."""
CONTEXT = frozenset(("donor", "timepoint"))
PARTS: dict[str, tuple[str, ...]] = {
    "joint": ROLES,
    "mutually_exclusive": ROLES,
    "independent": ("context", "perturbation"),
}
"""The names under which each strategy takes one weight per part of the condition."""


def guided(
    velocity: Velocity,
    *,
    strategy: Dropout,
    guidance: Guidance,
    unconditional: Tensor,
    interval: tuple[float, float] = EVERYWHERE,
) -> Velocity:
    """Return the guided velocity, itself a velocity.

    With v the velocity under all labels, v0 with all dropped, v_c with only attribute c kept, v_ctx with only the
    perturbation dropped:

    - ``joint``: v0 + w (v - v0). One pass of B rows for w = 0 (unconditional) and w = 1 (conditional), else of 2B.
    - ``mutually_exclusive``: v0 + sum_c w_c (v_c - v0), at most one pass of 4B rows.
    - ``independent``: v0 + w_ctx (v_ctx - v0) + w_pert (v - v_ctx), at most one pass of 3B rows: the perturbation is
      guided relative to its own context.

    Parameters
    ----------
    velocity
        Callable of x (B, ...), t (B,) and labels (B, 3).
    strategy
        The label dropout that the network was trained with.
    guidance
        One weight, or a weight for each of `PARTS` of the strategy; a part left out has weight 1.
    unconditional
        Index of the unconditional row of each attribute (3,).
    interval
        Times from noise (0) to data (1) between which, both included, the weights hold; elsewhere all are 1
        (Kynkaanniemi et al. 2024, arXiv:2404.07724). The times of a batch are then equal.

    Returns
    -------
    Callable of x, t and labels, as `velocity`.

    Raises
    ------
    ValueError
        A weight is negative or not finite, a part is unknown, the weights differ under ``joint``, or the interval is
        not one within 0 and 1.

    Examples
    --------
    >>> import torch
    >>> from scldm_cd4.flow import guided
    >>> rows = torch.tensor([2, 2, 5])  # the unconditional rows of donor, time point and perturbation
    >>> field = guided(lambda x, t, labels: x, strategy="joint", guidance=1.5, unconditional=rows)
    >>> field(torch.ones(2, 4), torch.zeros(2), torch.zeros(2, 3, dtype=torch.long)).shape
    torch.Size([2, 4])
    """
    low, high = _interval(interval)
    inside, outside = (
        _sum_of(velocity, _terms(strategy, _weights(strategy, w)), unconditional) for w in (guidance, 1.0)
    )
    if (low, high) == EVERYWHERE:
        return inside

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return (inside if low - ROUNDING <= float(t[0]) <= high + ROUNDING else outside)(x, t, labels)

    return field


def _sum_of(velocity: Velocity, terms: Mapping[frozenset[str], float], unconditional: Tensor) -> Velocity:
    """Return the sum of velocities with some labels kept, times their coefficients."""
    keep = torch.tensor([[role in kept for role in ROLES] for kept in terms])  # (K, 3)
    coefficients = tuple(terms.values())

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        n, k = len(x), len(coefficients)
        rows = torch.where(keep.to(labels.device)[:, None], labels[None], unconditional.to(labels))  # (K, B, 3)
        if k == 1:
            return velocity(x, t, rows[0])
        v = velocity(x.repeat(k, *[1] * (x.ndim - 1)), t.repeat(k), rows.flatten(0, 1))
        v = v.view(k, n, *v.shape[1:])
        # base + sum of weighted differences: rounds like the formulas of the docstring
        return v[0] + sum(c * (part - v[0]) for c, part in zip(coefficients[1:], v[1:], strict=True))

    return field


def conditioned_on(strategy: Dropout, guidance: Guidance, interval: tuple[float, float] = EVERYWHERE) -> frozenset[str]:
    """Return the attributes on which the guided velocity depends; none for unconditional generation.

    Raises
    ------
    ValueError
        As for `guided`.
    """
    weights = [guidance] if _interval(interval) == EVERYWHERE else [guidance, 1.0]
    return frozenset[str]().union(*(kept for w in weights for kept in _terms(strategy, _weights(strategy, w))))


def _interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the guidance interval is two times from noise (0) to data (1), got {interval!r}")
    return low, high


def _weights(strategy: str, guidance: Guidance) -> dict[str, float]:
    if strategy not in PARTS:
        raise ValueError(f"unknown guidance strategy {strategy!r}; known: {sorted(PARTS)}")
    parts = PARTS[strategy]
    if isinstance(guidance, Mapping):
        if unknown := sorted(set(guidance) - set(parts)):
            raise ValueError(f"no guidance weight is called {unknown}; a {strategy!r} model takes {list(parts)}")
        weights = {part: _weight(guidance.get(part, 1.0)) for part in parts}
    else:
        weights = dict.fromkeys(parts, _weight(guidance))
    for part, w in weights.items():
        if not math.isfinite(w) or w < 0:
            raise ValueError(
                f"the guidance weight of {part!r} is {w}; use a finite number of at least 0 "
                "(0 is unconditional, 1 the plain conditional flow)"
            )
    if strategy == "joint" and len(set(weights.values())) > 1:
        raise ValueError(
            f"this model was trained with all labels dropped together ('joint'), so it has one guidance weight; "
            f"got {weights} (parts left out count as 1). Give one number, or train with "
            "label_dropout='independent' or 'mutually_exclusive'"
        )
    return weights


def _weight(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(
            f"guidance takes a number (1 is the plain conditional flow, 0 unconditional) or a dict of numbers by part "
            f"of the condition, got {value!r}"
        ) from None


def _terms(strategy: str, weights: dict[str, float]) -> dict[frozenset[str], float]:
    """Coefficient of the velocity for each set of kept labels, without those that are 0; they add up to 1."""
    none, everything = frozenset[str](), frozenset(ROLES)
    if strategy == "joint":
        w = weights["donor"]
        terms = {none: 1.0 - w, everything: w}
    elif strategy == "mutually_exclusive":
        terms = {none: 1.0 - sum(weights.values())} | {frozenset((role,)): w for role, w in weights.items()}
    else:
        context, perturbation = weights["context"], weights["perturbation"]
        terms = {none: 1.0 - context, CONTEXT: context - perturbation, everything: perturbation}
    return {kept: c for kept, c in terms.items() if c != 0.0}

"""The linear path between noise and data (Lipman et al. 2023, arXiv:2210.02747; sigma = 0)."""

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a state (B, ...), times (B,) and labels (B, 3)."""


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the path and its velocity: x_t = t x1 + (1 - t) x0, u = x1 - x0.

    Parameters
    ----------
    x0, x1
        Noise and data (B, ...).
    t
        Times (B,) in [0, 1].

    Returns
    -------
    x_t and u, both (B, ...).
    """
    t = t.view(-1, *[1] * (x1.ndim - 1)).to(x1.dtype)
    return t * x1 + (1 - t) * x0, x1 - x0


def flow_loss(v: Tensor, u: Tensor) -> Tensor:
    """Squared error of a velocity (B, ...) against the target, mean over all but the cells (B,)."""
    return (v.float() - u.float()).square().flatten(1).mean(1)

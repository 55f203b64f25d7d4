"""Solvers of dx/dt = v(x, t, labels) between noise (t = 0) and data (t = 1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from scldm_cd4.flow.path import Velocity

Field = Callable[[float, Tensor], Tensor]
"""Velocity at a time and a state, the labels being fixed."""


def _euler(f: Field, t: float, h: float, x: Tensor) -> Tensor:
    return x + h * f(t, x)


def _midpoint(f: Field, t: float, h: float, x: Tensor) -> Tensor:
    return x + h * f(t + h / 2, x + (h / 2) * f(t, x))


def _heun(f: Field, t: float, h: float, x: Tensor) -> Tensor:
    k1 = f(t, x)
    return x + (h / 2) * (k1 + f(t + h, x + h * k1))


def _rk4(f: Field, t: float, h: float, x: Tensor) -> Tensor:
    """Kutta's 3/8 rule, the fourth-order rule that torchdiffeq calls rk4."""
    k1 = f(t, x)
    k2 = f(t + h / 3, x + (h / 3) * k1)
    k3 = f(t + 2 * h / 3, x + h * (k2 - k1 / 3))
    k4 = f(t + h, x + h * (k1 - k2 + k3))
    return x + (h / 8) * (k1 + 3 * (k2 + k3) + k4)


STEPS: dict[str, tuple[Callable[[Field, float, float, Tensor], Tensor], int]] = {
    "euler": (_euler, 1),
    "midpoint": (_midpoint, 2),
    "heun": (_heun, 2),
    "rk4": (_rk4, 4),
}
"""Step functions and their velocity evaluations per step."""

SOLVERS = (*STEPS, "ab2", "dopri5")


def evaluations(solver: str, n_steps: int) -> int | None:
    """Return how often a solver evaluates the velocity; None for ``dopri5``, which decides as it goes."""
    if solver == "dopri5":
        return None
    return n_steps * (STEPS[solver][1] if solver in STEPS else 1)


def time_grid(n_steps: int, shift: float = 1.0) -> list[float]:
    """Return the times 0 = t_0 < ... < t_n = 1 of a grid.

    t = u / (u + shift (1 - u)) for even u: 1 is an even grid, larger values put more steps near the noise.

    Raises
    ------
    ValueError
        There is no step, or the shift is not a positive number.
    """
    if isinstance(n_steps, bool) or n_steps != int(n_steps) or n_steps < 1:
        raise ValueError(f"the solver needs a whole number of at least one step, got n_steps={n_steps}")
    if not 0.0 < shift < float("inf"):
        raise ValueError(f"the time shift must be a positive number (1 is an even grid), got {shift}")
    n = int(n_steps)
    return [(i / n) / (i / n + shift * (1 - i / n)) for i in range(n + 1)]


def solve(
    velocity: Velocity,
    x: Tensor,
    labels: Tensor,
    *,
    solver: str = "midpoint",
    n_steps: int = 10,
    shift: float = 1.0,
    reverse: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> Tensor:
    """Carry states from noise to data, or back.

    Parameters
    ----------
    velocity
        Callable of x (B, ...), t (B,) and labels (B, 3).
    x
        States (B, ...) at t = 0, or at t = 1 if `reverse`.
    labels
        (B, 3).
    solver
        One of `SOLVERS`. ``ab2`` evaluates the velocity once per step, and its error falls with the square of the step.
        On a grid each cell is solved on its own; ``dopri5`` adapts its steps to the whole batch, so
        that a cell's end point depends on its company, and needs the extra ``ode``.
    n_steps, shift
        Grid of the fixed-step solvers, see `time_grid`; not used by ``dopri5``.
    reverse
        Start at the data and end at the noise.
    rtol, atol
        Tolerances of ``dopri5``; the defaults are those of the released sampler.

    Returns
    -------
    States (B, ...) at the other end.

    Raises
    ------
    ValueError
        The solver is unknown or its grid impossible.
    ImportError
        ``dopri5`` without torchdiffeq.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32

    def f(t: float | Tensor, state: Tensor) -> Tensor:
        v = velocity(state, torch.full((len(state),), float(t), dtype=dtype, device=state.device), labels)
        return v.to(state.dtype)  # steps add up in the precision of the state, also where the network is in bf16

    if solver == "dopri5":
        return _dopri5(f, x, reverse, rtol, atol)
    grid = time_grid(n_steps, shift)
    if reverse:
        grid.reverse()
    if solver == "ab2":
        return _adams_bashforth(f, grid, x)
    step = STEPS[solver][0]
    for start, end in zip(grid[:-1], grid[1:], strict=True):
        x = step(f, start, end - start, x)
    return x


def _adams_bashforth(f: Field, grid: list[float], x: Tensor) -> Tensor:
    """Two-step Adams-Bashforth on an uneven grid (Hairer, Norsett & Wanner 1993, III.5), one evaluation per step.

    The velocity is continued as a line through its last two values; the first step is Euler's.
    """
    before, last = None, 1.0
    for start, end in zip(grid[:-1], grid[1:], strict=True):
        h = end - start
        v = f(start, x)
        x = x + h * (v if before is None else v + (h / (2 * last)) * (v - before))
        before, last = v, h
    return x


def _dopri5(f: Field, x: Tensor, reverse: bool, rtol: float, atol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "solver='dopri5' needs torchdiffeq: pip install 'scldm_cd4[ode]', or use solver='midpoint'"
        ) from error
    times = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0], dtype=torch.float64, device=x.device)
    return odeint(f, x, times, rtol=rtol, atol=atol, method="dopri5")[-1]

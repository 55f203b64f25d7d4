"""`torch.compile`, for passes of one shape, where it works."""

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that compiles itself at its first call, and again for further shapes."""
    return torch.compile(function, dynamic=False)


@cache
def compiler_error(device: str) -> str | None:
    """Return why `torch.compile` cannot work here, such as a missing C++ compiler; None where it can."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda v: (2 * v + 1).sum(), dynamic=False)(x).backward()
    except (RuntimeError, OSError, ImportError) as error:
        return str(error).strip().partition("\n")[0]
    return None

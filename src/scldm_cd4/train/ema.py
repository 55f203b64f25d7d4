"""Exponential moving average of a module's parameters."""

from typing import Any

import torch
from torch import nn

POWER = 2.0 / 3.0
"""Exponent of the rise of the decay after the start."""


class EMA:
    """Running average of the parameters of a module, by the rule of the released training.

    Calls are counted from 0 and only every `every`-th acts. Up to call `after` it copies; from then on
    ``ema = d ema + (1 - d) online`` with ``d = min(decay, 1 - (1 + k)^(-2/3))`` and k the calls since.

    Parameters
    ----------
    module
        The network to follow.
    decay
        Upper bound of the decay.
    every
        Calls between two updates.
    after
        Call up to which the average is a copy.
    """

    def __init__(self, module: nn.Module, *, decay: float = 0.9999, every: int = 10, after: int = 10_000) -> None:
        self.decay, self.every, self.after = decay, every, after
        self.step = 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present parameters of `module`; call it once after every training batch."""
        step = self.step
        self.step += 1
        if step % self.every:
            return
        online = [p.detach() for p in module.parameters()]
        average = list(self.values.values())
        if step <= self.after:
            torch._foreach_copy_(average, online)
        else:
            torch._foreach_lerp_(average, online, 1.0 - self._decay_now())

    def _decay_now(self) -> float:
        k = self.step - self.after - 1
        return min(self.decay, 1.0 - (1.0 + k) ** -POWER) if k > 0 else 0.0

    def to(self, device: torch.device) -> "EMA":
        """Move the averages to a device."""
        self.values = {name: value.to(device) for name, value in self.values.items()}
        return self

    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into `module`."""
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(self.values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the number of calls and the averages by parameter name."""
        return {"step": self.step, "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`.

        Raises
        ------
        KeyError
            A parameter of the module is not in the state.
        """
        self.step = int(state["step"])
        for name, value in self.values.items():
            value.copy_(state["values"][name])

"""Learning-rate schedules as pure functions of the step."""

import math
from typing import Literal


def wsd_schedule(
    step: int,
    *,
    n_steps: int,
    n_warmup: int,
    final_factor: float = 0.1,
    init_divisor: float = 100.0,
    decay_fraction: float = 1.0,
    kind: Literal["cosine", "sqrt"] = "cosine",
) -> float:
    """Factor on the learning rate: warm-up, stable, decay, in the form of the released recipe.

    A linear rise from ``1 / init_divisor`` over `n_warmup` steps, 1 until the last ``decay_fraction * n_steps`` steps,
    then a fall to `final_factor`, which stays. With ``kind="cosine"`` the fall is timed from the end of the warm-up, so
    that with a `decay_fraction` below 1 it begins with a jump, as in the released code; with 1 it is warm-up plus
    cosine.

    Parameters
    ----------
    step
        Optimiser steps made so far.
    n_steps, n_warmup
        Length of the whole run and of the rise, in optimiser steps.
    """
    n_decay = int(decay_fraction * n_steps)
    if step < n_warmup:
        share = step / n_warmup
        return share + (1.0 - share) / init_divisor
    if step < n_steps - n_decay:
        return 1.0
    if step < n_steps:
        if kind == "cosine":
            angle = math.pi * (step - n_warmup) / (n_steps - n_warmup)
            return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(angle))
        return final_factor + (1.0 - final_factor) * (1.0 - math.sqrt((step - (n_steps - n_decay)) / n_decay))
    return final_factor

"""Label dropout in training, which gives the network the flows that guidance combines."""

import torch
from torch import Tensor

from scldm_cd4.config import Dropout


def drop_labels(
    labels: Tensor, unconditional: Tensor, *, strategy: Dropout, p: float, generator: torch.Generator
) -> Tensor:
    """Replace labels by those of the unconditional rows, at random.

    Parameters
    ----------
    labels
        (B, 3).
    unconditional
        Index of the unconditional row of each attribute (3,).
    strategy
        ``joint``: with probability `p` a cell loses its three labels together. ``mutually_exclusive``: one attribute is
        drawn for the whole batch, the others are dropped, and that one is dropped per cell with probability `p`.
        ``independent``: each label of each cell is dropped on its own with probability `p`.
    p
        Probability of a drop.
    generator
        Source of all random numbers, drawn on its own device, so that a CPU generator gives the same on every device.

    Returns
    -------
    (B, 3), a new tensor.

    Raises
    ------
    ValueError
        `p` is not a probability, or the strategy is unknown.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the probability of dropping a label must be between 0 and 1, got p={p}")
    n, k = labels.shape
    columns = k if strategy == "independent" else 1
    drop = torch.rand((n, columns), generator=generator, device=generator.device) < p
    if strategy == "mutually_exclusive":
        kept = torch.randint(k, (1,), generator=generator, device=generator.device)
        drop = drop | (torch.arange(k, device=generator.device) != kept)
    elif strategy not in ("joint", "independent"):
        raise ValueError(f"unknown label dropout {strategy!r}; known: joint, mutually_exclusive, independent")
    return torch.where(drop.to(labels.device), unconditional.to(labels), labels)

"""Which noise goes with which cell in training."""

import torch
from torch import Tensor


def pair(x0: Tensor, x1: Tensor, labels: Tensor, method: str = "independent") -> Tensor:
    """Return the noise in the order in which it is paired with the cells.

    Parameters
    ----------
    x0, x1
        Noise and data (B, ...).
    labels
        Labels of the cells (B, 3), before any is dropped.
    method
        ``independent`` leaves the order. ``ot`` pairs by exact optimal transport on squared distances (minibatch OT,
        Tong et al. 2024, arXiv:2302.00482), only among cells of equal condition: across conditions it would tie the
        noise to the condition, which sampling does not do.

    Raises
    ------
    ValueError
        The method is unknown.
    """
    if method == "independent":
        return x0
    if method != "ot":
        raise ValueError(f"unknown coupling {method!r}; known: independent, ot")
    import ot

    order = torch.arange(len(x0))
    cost = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().cpu()  # (B noise, B cells)
    condition = torch.unique(labels, dim=0, return_inverse=True)[1].cpu()
    for c in range(int(condition.max()) + 1 if len(condition) else 0):
        members = torch.nonzero(condition == c)[:, 0]
        if len(members) > 1:
            plan = torch.from_numpy(ot.emd([], [], cost[members][:, members].numpy()))  # a permutation / n
            order[members] = members[plan.argmax(0)]
    return x0[order.to(x0.device)]

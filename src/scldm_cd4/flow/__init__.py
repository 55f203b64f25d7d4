"""Flow matching in latent space: path, label dropout, coupling, guidance and solvers.

A velocity is any callable ``(x (B, ...), t (B,), labels (B, 3)) -> (B, ...)``; nothing here knows the network
behind it. Time runs from noise (t = 0) to data (t = 1). Labels are in the order of `config.ROLES`.
"""

from scldm_cd4.flow.coupling import pair
from scldm_cd4.flow.dropout import drop_labels
from scldm_cd4.flow.guidance import conditioned_on, guided
from scldm_cd4.flow.path import Velocity, flow_loss, interpolate
from scldm_cd4.flow.solvers import SOLVERS, solve

__all__ = [
    "SOLVERS",
    "Velocity",
    "conditioned_on",
    "drop_labels",
    "flow_loss",
    "guided",
    "interpolate",
    "pair",
    "solve",
]

"""The networks: torch modules only.

Parameter names are those of the released scLDM.CD4 modules, so that its weights load without a translation table.
"""

from scldm_cd4.nn.dit import DiT
from scldm_cd4.nn.vae import VAE

__all__ = ["VAE", "DiT"]

"""Does the decoder use the latent? Likelihoods beside those of models that cannot."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4._passes import chunks
from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.train.latents import encode, inference_batch_size
from scldm_cd4.train.loaders import CountBatches
from scldm_cd4.train.theta import fit_theta, sample_rows

MIN_GAIN = 0.01
MIN_GAIN_SPLIT = 0.002
"""Where the encoder did not see the counts asked for, the decoder cannot repeat them: honest gains are small."""


@dataclass(frozen=True)
class Profile:
    """The model in which every cell has the mean profile: shares (G,) of the counts and dispersions (G,)."""

    share: Tensor
    theta: Tensor

    @classmethod
    def fit(cls, cells: CellData, rows: NDArray[np.int64], generator: np.random.Generator) -> "Profile":
        """Fit on a sample of training cells; half a count is added to each gene."""
        x = torch.from_numpy(cells.counts(sample_rows(rows, cells.n_genes, generator)).toarray())
        share = x.sum(0, dtype=torch.float64) + 0.5
        share = (share / share.sum()).float()
        return cls(share, fit_theta(x, share * x.sum(1, keepdim=True)))

    def nll(self, vae: VAE, data: CountBatches) -> float:
        """Mean negative log-likelihood of the targets per cell, in nats, with the count distribution of `vae`."""
        total = 0.0
        for index in chunks(len(data), inference_batch_size(vae.n_genes)):
            x = data[index]["target"]
            total -= float(vae.log_prob(x, self.share * x.sum(1, keepdim=True), self.theta).double().sum())
        return total / len(data)


@dataclass(frozen=True)
class LatentUse:
    """Negative log-likelihoods per cell, in nats, on the same cells."""

    nll: float
    swapped: float
    """Each cell decoded from the latent of another."""
    mean_profile: float
    min_gain: float = MIN_GAIN

    @property
    def ignored(self) -> bool:
        """The gain over the mean profile, or over foreign latents, is below `min_gain` of the loss."""
        return min(self.mean_profile, self.swapped) - self.nll < self.min_gain * abs(self.nll)

    def warning(self) -> str:
        """Say what is wrong and what to do."""
        return (
            f"The decoder makes little use of the latent: the loss per cell is {self.nll:.1f}, with the latents of "
            f"other cells {self.swapped:.1f}, with the mean profile alone {self.mean_profile:.1f} "
            f"(a gain below {self.min_gain:.1%}). "
            "Generated cells would resemble the average cell. Use fewer genes (600 to 1,500 highly variable ones) or "
            "train longer (max_epochs={'vae': ...})."
        )


@torch.no_grad()
def latent_use(vae: VAE, data: CountBatches, mean_profile: float) -> LatentUse:
    """Compare the likelihood of cells from their own latents with that from the latents of other cells."""
    size = inference_batch_size(vae.n_genes)
    z = encode(vae, data, batch_size=size)
    other = z.roll(len(z) // 2, 0)
    device = next(vae.parameters()).device
    genes = torch.arange(1, vae.n_genes + 1, device=device)
    totals = [0.0, 0.0]
    for index in chunks(len(data), size):
        x = data[index]["target"].to(device)
        for i, latent in enumerate((z, other)):
            mu, theta = vae.decode(latent[torch.from_numpy(index)].to(device), genes, x.sum(1, keepdim=True))
            totals[i] -= float(vae.log_prob(x, mu, theta).double().sum())
    min_gain = MIN_GAIN if data.shown is None else MIN_GAIN_SPLIT
    return LatentUse(totals[0] / len(data), totals[1] / len(data), mean_profile, min_gain)

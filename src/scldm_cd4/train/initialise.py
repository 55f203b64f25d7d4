"""Starting values from the statistics of the training cells."""

import numpy as np
import torch
from numpy.typing import NDArray

from scldm_cd4.data.cells import CellData
from scldm_cd4.nn import VAE
from scldm_cd4.train.theta import moment_theta, sample_rows, set_theta


def initialise_from_data(vae: VAE, cells: CellData, rows: NDArray[np.int64], generator: np.random.Generator) -> None:
    """Set the dispersions by moments around the mean profile of a sample of the training cells.

    Parameters
    ----------
    vae
        The fresh network, changed in place.
    cells, rows
        Training cells are these rows of `cells`.
    generator
        Draws the sample.
    """
    x = torch.from_numpy(cells.counts(sample_rows(rows, vae.n_genes, generator)).toarray())
    profile = x.sum(0) / x.sum()
    set_theta(vae, moment_theta(x, profile * x.sum(1, keepdim=True)))

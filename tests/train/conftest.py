"""Small cells and networks for the training tests."""

from collections.abc import Callable
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scldm_cd4.config import FlowConfig, ModelConfig, StageConfig, VAEConfig
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.setup import setup_anndata
from scldm_cd4.data.splits import Split, make_split
from scldm_cd4.nn import VAE, DiT

CONFIG = ModelConfig(
    vae=VAEConfig(
        width=16,
        n_tokens=4,
        n_channels=4,
        n_layers=1,
        n_heads=2,
        n_cross_heads=2,
        norm_eps=1e-6,
        log_counts=True,
        mask_padding=True,
        encode="expressed",
    ),
    flow=FlowConfig(width=16, n_layers=1, n_heads=2, norm_eps=1e-6),
    train_vae=StageConfig(lr=2e-3, batch_size=16, target_steps=12, genes_per_step=12, theta_lr=10.0),
    train_flow=StageConfig(lr=2e-3, batch_size=16, target_steps=12, ema_decay=0.9, ema_every=1),
)


def make_cells(n: int = 48, n_genes: int = 20, *, structured: bool = True, seed: int = 0) -> CellData:
    """Cells of two perturbations and two donors; the perturbations differ if structured."""
    rng = np.random.default_rng(seed)
    perturbation, donor = np.arange(n) % 2, np.arange(n) // 2 % 2
    profiles = rng.dirichlet(np.full(n_genes, 0.5), size=2)
    mean = profiles[perturbation if structured else np.zeros(n, int)] * 300.0
    counts = rng.poisson(mean) + (rng.random((n, n_genes)) < 0.02)
    counts[:, 0] += 1
    adata = ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"p": [f"P{i}" for i in perturbation], "d": [f"D{i}" for i in donor]}, index=[f"c{i}" for i in range(n)]
        ),
        var=pd.DataFrame(index=[f"G{i}" for i in range(n_genes)]),
    )
    setup_anndata(adata, perturbation_key="p", donor_key="d", control="P0")
    return CellData.from_adata(adata)


@dataclass
class Job:
    """The positional arguments of `fit`, and fresh networks of equal weights."""

    cells: CellData
    split: Split
    config: ModelConfig

    def vae(self) -> VAE:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return VAE(self.config.vae, self.cells.n_genes)

    def dit(self) -> DiT:
        vocabulary = tuple(len(attribute) for attribute in self.cells.registry.attributes)
        return DiT(self.config.flow, self.config.vae.n_tokens, self.config.vae.n_channels, vocabulary)


@pytest.fixture
def job() -> Job:
    cells = make_cells()
    return Job(cells, make_split(cells, validation=0.2, seed=0), CONFIG)


@pytest.fixture
def cells_of() -> Callable[..., CellData]:
    return make_cells

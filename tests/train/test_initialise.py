"""Starting values: what the first step already knows of the training cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scldm_cd4.config import PRESETS, VAEConfig
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.matrix import expressed_batch
from scldm_cd4.data.setup import setup_anndata
from scldm_cd4.nn import VAE
from scldm_cd4.train.initialise import initialise_from_data, principal_components

N_GENES = 60


@pytest.fixture(scope="module")
def two_programmes() -> CellData:
    """400 cells in which two blocks of ten genes go up and down together."""
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 1.0, N_GENES)
    scores = rng.standard_normal((400, 2))
    log_fold = np.zeros((400, N_GENES))
    log_fold[:, :10], log_fold[:, 10:20] = scores[:, :1], scores[:, 1:]
    counts = rng.poisson(base * np.exp(log_fold)).astype(np.float32)
    adata = ad.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame({"p": ["a", "b"] * 200}, index=[f"c{i}" for i in range(400)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]),
    )
    setup_anndata(adata, perturbation_key="p")
    return CellData.from_adata(adata)


def initialised(cells: CellData, config: VAEConfig, seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    vae = VAE(config, cells.n_genes, cells.registry.vocabulary).eval()
    initialise_from_data(vae, cells, np.arange(cells.n_cells), np.random.default_rng(seed))
    return vae


def test_the_leading_components_are_the_planted_programmes(two_programmes: CellData) -> None:
    counts = two_programmes.counts(np.arange(400)).toarray()
    components = principal_components(counts, 20, seed=0)
    assert components.vectors.shape == (N_GENES, 20)
    assert (components.vectors[:20, :2] ** 2).sum() > 0.85 * 2
    assert (np.diff(components.deviation) <= 0).all()
    values = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    scores = ((values - components.mean) / components.scale) @ components.vectors
    np.testing.assert_allclose(scores.std(0), components.deviation, rtol=0.05)


def test_the_fresh_decoder_gives_the_mean_profile_and_the_fresh_latent_tells_cells_apart(
    two_programmes: CellData,
) -> None:
    vae = initialised(two_programmes, PRESETS["tiny"].vae)
    csr = two_programmes.counts(np.arange(400))
    genes, counts = map(torch.from_numpy, expressed_batch(csr))
    x = torch.from_numpy(csr.toarray())
    with torch.no_grad():
        z = vae.encode(counts, genes)
        mu, _ = vae.decode(z, torch.arange(1, N_GENES + 1), x.sum(1, keepdim=True))
    profile = torch.log(x.sum(0) / x.sum())
    assert np.corrcoef(torch.log(mu / mu.sum(1, keepdim=True)).mean(0), profile)[0, 1] > 0.9
    # a linear read-out of the untrained latent finds both programmes
    block = torch.log1p(x[:, :10].sum(1)) - torch.log1p(x[:, :20].sum(1))
    design = torch.cat([z.flatten(1), torch.ones(400, 1)], 1)
    ridge = design[:300].T @ design[:300] + torch.eye(design.shape[1])
    held_out = design[300:] @ torch.linalg.solve(ridge, design[:300].T @ block[:300])
    assert np.corrcoef(held_out, block[300:])[0, 1] > 0.7


def test_cells_without_structure_and_networks_without_linear_path_are_fine(two_programmes: CellData) -> None:
    rng = np.random.default_rng(0)
    adata = ad.AnnData(
        sparse.csr_matrix(rng.poisson(1.0, (50, 30)).astype(np.float32)),
        obs=pd.DataFrame({"p": ["a"] * 50}, index=[f"c{i}" for i in range(50)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(30)]),
    )
    setup_anndata(adata, perturbation_key="p")
    vae = initialised(CellData.from_adata(adata), PRESETS["tiny"].vae)
    assert all(torch.isfinite(p).all() for p in vae.parameters())
    plain = initialised(two_programmes, VAEConfig(width=32, n_tokens=4, n_channels=4, n_layers=1))
    assert not hasattr(plain, "linear_path")
    assert len(plain.decoder_head.theta.weight[1:].unique()) > 10


def test_genes_without_counts_in_training_do_not_move_latents_of_a_small_panel() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (100, 20)).astype(np.float32)
    counts[:, :2] = 0.0
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame({"p": ["a"] * 100}, index=[*map(str, range(100))]))
    setup_anndata(adata, perturbation_key="p")
    path = initialised(CellData.from_adata(adata), PRESETS["tiny"].vae).linear_path
    x, genes = torch.from_numpy(counts), torch.arange(1, 21).expand(100, -1)
    seen = x + torch.eye(20)[:2].sum(0)  # one count of each gene that is new
    with torch.no_grad():
        latents, moved = path.encode(x, genes), path.encode(seen, genes)
    assert (moved - latents).std() < latents.std()

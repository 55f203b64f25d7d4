"""Mean effects of labels: what the latents leave untold, and nothing else."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scldm_cd4.config import VAEConfig
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.setup import setup_anndata
from scldm_cd4.nn import VAE
from scldm_cd4.train.effects import set_label_effects, untold_effects
from scldm_cd4.train.shrinkage import adaptive_shrink

N_GENES = 10


def labelled_cells(n: int, share_in_second: float) -> CellData:
    """Two donors, d1 with gene 0 doubled; perturbation b halves gene 1 and is more frequent in donor d1."""
    rng = np.random.default_rng(0)
    donor = rng.random(n) < 0.5
    perturbed = rng.random(n) < np.where(donor, share_in_second, 1 - share_in_second)
    mean = np.full((n, N_GENES), 20.0)
    mean[donor, 0] *= 2
    mean[perturbed, 1] /= 2
    adata = ad.AnnData(
        sparse.csr_matrix(rng.poisson(mean).astype(np.float32)),
        obs=pd.DataFrame(
            {"p": np.where(perturbed, "b", "a"), "d": np.where(donor, "d1", "d0")}, index=[f"c{i}" for i in range(n)]
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]),
    )
    setup_anndata(adata, perturbation_key="p", donor_key="d", control="a")
    return CellData.from_adata(adata)


def shuffled_labels(cells: CellData, rng: np.random.Generator) -> ad.AnnData:
    """The same counts with perturbation labels that mean nothing."""
    adata = ad.AnnData(
        cells.counts(np.arange(cells.n_cells)),
        obs=pd.DataFrame(
            {"p": rng.choice(["a", "b"], cells.n_cells), "d": np.asarray(cells.obs["d"])}, index=cells.obs.index
        ),
        var=pd.DataFrame(index=list(cells.registry.genes)),
    )
    setup_anndata(adata, perturbation_key="p", donor_key="d", control="a")
    return adata


def blind_vae(cells: CellData, label_rank: int = 8) -> VAE:
    """An autoencoder that gives every cell the same profile: the latents tell nothing."""
    torch.manual_seed(0)
    config = VAEConfig(width=32, n_tokens=4, n_channels=4, n_layers=1, label_rank=label_rank)
    vae = VAE(config, cells.n_genes, cells.registry.vocabulary).eval()
    with torch.no_grad():
        vae.decoder_head.params.weight.zero_()
    return vae


def test_effects_of_donor_and_perturbation_are_told_apart() -> None:
    cells = labelled_cells(4000, share_in_second=0.7)
    donor, timepoint, perturbation = untold_effects(blind_vae(cells), cells, np.arange(4000), np.random.default_rng(0))
    assert timepoint.shape == (1, N_GENES)
    log_fold = perturbation[1] - perturbation[0]
    assert log_fold[1] < -0.45
    assert abs(log_fold[0]) < 0.1  # the ratio of the means over all donors is ln(1.7 / 1.3) = 0.27
    assert (donor[1] - donor[0])[0] == pytest.approx(np.log(2), abs=0.15)


def test_noise_is_no_effect_and_a_level_without_cells_has_none() -> None:
    cells = labelled_cells(4000, 0.5)
    vae = blind_vae(cells)
    full = untold_effects(vae, cells, np.arange(4000), np.random.default_rng(0))[2]
    assert full[1, 1] - full[0, 1] < -0.55
    rng = np.random.default_rng(1)
    assert cells.labels is not None
    shuffled = CellData.from_adata(shuffled_labels(cells, rng))
    nothing = untold_effects(vae, shuffled, np.arange(4000), np.random.default_rng(0))[2]
    assert np.abs(nothing[1] - nothing[0]).max() < 0.05  # two groups of 40,000 counts a gene
    only_a = np.flatnonzero(cells.labels[:, 2] == 0)
    np.testing.assert_allclose(untold_effects(vae, cells, only_a, np.random.default_rng(0))[2][1], 0.0, atol=1e-6)


def test_a_donor_with_controls_alone_keeps_nothing_of_them() -> None:
    cells = labelled_cells(6000, 0.5)
    assert cells.labels is not None
    seen = np.flatnonzero(~((cells.labels[:, 0] == 1) & (cells.labels[:, 2] == 1)))
    donor, _, perturbation = untold_effects(blind_vae(cells), cells, seen, np.random.default_rng(0))
    assert perturbation[1, 1] - perturbation[0, 1] == pytest.approx(np.log(0.5), abs=0.1)
    assert abs(donor[1, 1] - donor[0, 1]) < 0.1
    assert donor[1, 0] - donor[0, 0] == pytest.approx(np.log(2), abs=0.15)


def test_shrinkage_leaves_few_large_effects_and_takes_noise_away() -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.01, 0.1, (20, 300))
    truth = np.where(rng.random(noise.shape) < 0.01, rng.choice([-1.5, 1.5], noise.shape), 0.0)
    estimates = truth + np.sqrt(noise) * rng.standard_normal(noise.shape)
    shrunk = adaptive_shrink(estimates, noise, rng)
    assert np.abs(shrunk[truth != 0]).mean() > 1.3
    assert np.sqrt(np.mean(shrunk[truth == 0] ** 2)) < 0.2 * np.sqrt(np.mean(estimates[truth == 0] ** 2))
    assert np.all(shrunk * estimates >= 0)
    assert np.all(np.abs(shrunk) <= np.abs(estimates))
    dense = rng.normal(0, 0.3, noise.shape)
    seen = dense + np.sqrt(noise) * rng.standard_normal(noise.shape)
    best = seen * 0.09 / (0.09 + noise)  # where the prior is known
    error = [np.mean((x - dense) ** 2) for x in (adaptive_shrink(seen, noise, rng), best, seen)]
    assert error[0] < 1.05 * error[1] < error[2]


def test_decoded_means_of_labels_are_the_observed_ones() -> None:
    cells = labelled_cells(3000, 0.5)
    vae = blind_vae(cells)
    set_label_effects(vae, cells, np.arange(3000), np.random.default_rng(0))
    labels, genes = torch.tensor([[0, 0, 0], [0, 0, 1], [2, 1, 2]]), torch.arange(1, N_GENES + 1)
    with torch.no_grad():
        z = torch.randn(1, 4, 4).expand(3, -1, -1)
        mu, _ = vae.decode(z, genes, torch.ones(3, 1), labels)
        without, _ = vae.decode(z[:1], genes, torch.ones(1, 1))
        each = vae.decode(z, genes.expand(3, -1), torch.ones(3, 1), labels)[0]
    log_fold = torch.log(mu[1] / mu[0])
    assert float(log_fold[1] - log_fold[2:].mean()) == pytest.approx(np.log(0.5), abs=0.1)
    torch.testing.assert_close(mu[2], without[0])  # dropped labels add nothing
    torch.testing.assert_close(each, mu)


def test_labels_in_the_decoder_need_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        VAE(VAEConfig(width=32, n_tokens=4, n_channels=4, n_layers=1, label_rank=8), 10)

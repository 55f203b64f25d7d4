import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from scldm_cd4.config import PRESETS
from scldm_cd4.data.splits import make_split
from scldm_cd4.nn import VAE
from scldm_cd4.train.latents import encode_rows
from scldm_cd4.train.loaders import CountBatches
from scldm_cd4.train.plateau import LatentUse, Profile, latent_use
from scldm_cd4.train.runner import fit


def test_a_decoder_that_ignores_the_latent_is_reported(cells_of, job):
    job.cells = cells_of(60, structured=False)
    job.split = make_split(job.cells, seed=0)
    with pytest.warns(UserWarning, match=r"little use of the latent.*fewer genes.*train longer"):
        result = fit(job.vae(), job.dit, job.cells, job.split, job.config, seed=0, stage="vae", accelerator="cpu")
    assert result.latent_use.ignored
    assert any("little use" in note for note in result.notes)


def test_a_trained_decoder_passes_without_a_word(cells_of, job):
    config = PRESETS["tiny"]
    config = replace(config, train_vae=replace(config.train_vae, target_steps=60, batch_size=32, epoch_limit=1000))
    cells = cells_of(96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(
            VAE(config.vae, cells.n_genes, cells.registry.vocabulary),
            job.dit,
            cells,
            make_split(cells, seed=0),
            config,
            seed=0,
            stage="vae",
        )
    use = result.latent_use
    assert use.nll < use.mean_profile
    assert use.nll < use.swapped
    assert result.history["vae"]["mean_profile_nll"].unique().tolist() == [use.mean_profile]


@pytest.mark.parametrize(
    ("nll", "swapped", "profile", "ignored"),
    [(100, 120, 120, False), (100, 100.5, 120, True), (100, 120, 100.5, True), (100, 120, 90, True)],
)
def test_one_percent_is_the_bar(nll, swapped, profile, ignored):
    assert LatentUse(nll, swapped, profile).ignored is ignored


def test_profile_is_the_mean_with_fitted_dispersion(cells_of, job):
    cells, rows = cells_of(400, structured=False), np.arange(400)
    profile = Profile.fit(cells, rows, np.random.default_rng(0))
    x = torch.from_numpy(cells.counts(rows).toarray())
    torch.testing.assert_close(profile.share, x.sum(0) / x.sum(), rtol=0.02, atol=1e-4)
    vae = job.vae()
    data = CountBatches(cells, rows, expressed=True)
    best = profile.nll(vae, data)
    assert replace(profile, theta=profile.theta / 100).nll(vae, data) > best
    assert latent_use(vae, data, best).mean_profile == best


def test_latents_are_those_of_single_cells(job):
    vae, rows = job.vae().eval(), np.array([5, 1, 30, 2])
    whole = encode_rows(vae, job.cells, rows)
    assert whole.shape == (4, 4, 4)
    assert whole.dtype == torch.float32
    for i in range(len(rows)):
        torch.testing.assert_close(encode_rows(vae, job.cells, rows[i : i + 1], batch_size=1)[0], whole[i])

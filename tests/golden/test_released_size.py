"""The preset of the released size against the list of released tensors, and what the fixtures do not catch."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from scldm_cd4.checkpoint.reference import from_reference, to_reference
from scldm_cd4.config import PRESETS
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.nn.likelihood import nb_log_prob, nb_quantile

N_GENES, VOCABULARY = 3699, (4, 3, 10571)


def listed(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    shapes = {r["key"]: () if r["shape"] == "scalar" else tuple(map(int, r["shape"].split("x"))) for r in rows}
    assert len(shapes) == len(rows) > 300
    return shapes


@pytest.fixture(scope="module")
def networks() -> tuple[VAE, DiT]:
    config = PRESETS["cd4"]
    with torch.device("meta"):
        vae = VAE(config.vae, N_GENES)
        return vae, DiT(config.flow, config.vae.latent_tokens, config.vae.n_channels, VOCABULARY)


def test_parameters_are_exactly_those_of_the_released_model(networks):
    vae, dit = networks
    assert sum(p.numel() for p in vae.parameters()) == 15_221_887
    assert sum(p.numel() for p in dit.parameters()) == 44_289_536
    assert sum(p.numel() for p in dit.parameters() if p.requires_grad) == 44_158_464


def test_tensors_map_one_to_one_to_the_released_ones(networks, shared_dir):
    vae, dit = networks
    ours = {key: tuple(t.shape) for key, t in to_reference(vae.state_dict(), dit.state_dict()).items()}
    flow, autoencoder = (listed(shared_dir / "spec" / f"state_dict_{name}.tsv") for name in ("fm", "vae"))
    assert ours == {k: s for k, s in flow.items() if k.startswith(("vae_model.", "diffusion_model.nnet."))}
    assert {k: s for k, s in ours.items() if k.startswith("vae_model.")} == {
        k: s for k, s in autoencoder.items() if k.startswith("vae_model.")
    }


@pytest.mark.parametrize("part", ["fm", "vae"])
def test_a_file_with_all_released_names_is_understood_without_further_arguments(shared_dir, part):
    shapes = listed(shared_dir / "spec" / f"state_dict_{part}.tsv")
    ref = from_reference({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert (ref.vae, ref.n_genes) == (PRESETS["cd4"].vae, N_GENES)
    if part == "fm":
        assert (ref.flow, ref.vocabulary, ref.weights) == (PRESETS["cd4"].flow, VOCABULARY, "ema")
    else:
        assert (ref.flow, ref.vocabulary, ref.weights, ref.dit_state) == (None, None, None, {})


def test_norms_divide_by_the_released_epsilon(networks):
    vae, dit = networks
    norms = [m for net in networks for m in net.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 16 * 2 + 2 * 3 + 2 + 8 * 2 + 1
    assert {m.eps for m in norms} == {1e-8}
    assert all(not m.elementwise_affine for m in dit.modules() if isinstance(m, nn.LayerNorm))

    small = VAE(PRESETS["cd4"].vae.__class__(width=8, n_tokens=2, n_channels=4, n_layers=1), 5)
    projection = small.encoder.encoder_latent_input
    with torch.no_grad():
        raw = projection[0](torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
        scaled = (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, correction=0, keepdim=True) * 1e-4  # variance 1e-8
        torch.testing.assert_close(
            projection[1](scaled).var(-1, correction=0), torch.full((64,), 0.5), rtol=1e-3, atol=0
        )


def test_padding_changes_nothing_and_a_cell_without_genes_is_finite():
    vae = VAE(PRESETS["tiny"].vae, 9, (2, 1, 3)).eval()
    genes = torch.tensor([[2, 5, 7], [4, 0, 0], [0, 0, 0]])
    counts = torch.tensor([[3.0, 1.0, 8.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    with torch.no_grad():
        z = vae.encode(counts, genes)
        wider = vae.encode(nn.functional.pad(counts, (0, 4)), nn.functional.pad(genes, (0, 4)))
        alone = vae.encode(counts[1:2, :1], genes[1:2, :1])
    assert torch.isfinite(z).all()
    torch.testing.assert_close(wider, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, z[1:2], rtol=1e-5, atol=1e-5)


def test_nb_likelihood_has_the_released_epsilon_where_it_matters():
    x, mu, theta = (torch.tensor([v], dtype=torch.float64) for v in (3.0, 0.0, 2.0))
    e = 1e-8
    expected = 2 * (np.log(2 + e) - np.log(2 + e)) + 3 * (np.log(e) - np.log(2 + e))
    expected += stats.nbinom.logpmf(3, 2, 0.5) - 2 * np.log(0.5) - 3 * np.log(0.5)  # the three lgamma terms
    assert nb_log_prob(x, mu, theta).item() == pytest.approx(expected, rel=1e-12)


def test_nb_likelihood_equals_scipy_away_from_zero():
    rng = np.random.default_rng(0)
    x, mu, theta = rng.integers(0, 60, 500), rng.gamma(2, 5, 500) + 0.01, rng.gamma(2, 2, 500) + 0.05
    ours = nb_log_prob(*(torch.tensor(v, dtype=torch.float64) for v in (x, mu, theta))).numpy()
    np.testing.assert_allclose(ours, stats.nbinom.logpmf(x, theta, theta / (theta + mu)), rtol=1e-5, atol=1e-6)


def assert_quantiles(u, mu, theta, counts):
    """The smallest count whose cumulative probability reaches u, up to rounding of the probabilities."""
    poisson = np.isinf(theta)
    p = np.where(poisson, 0.5, theta / (np.where(poisson, 1.0, theta) + mu))

    def cumulative(k):
        nb = stats.nbinom.cdf(k, np.where(poisson, 1.0, theta), p)
        return np.where(poisson, stats.poisson.cdf(k, mu), nb)

    assert (cumulative(counts) >= u - 1e-10).all()
    assert (cumulative(counts - 1) <= u + 1e-10).all()


def quantile(u, mu, theta):
    return nb_quantile(*map(torch.from_numpy, (u, mu, theta))).numpy()


@pytest.mark.parametrize("theta_of", ["gene", "cell", "poisson"])
def test_nb_sampling_inverts_the_cumulative_distribution(theta_of):
    rng = np.random.default_rng(1)
    mu = np.exp(rng.uniform(-8, 5, (40, 50)))
    theta = {"gene": np.exp(rng.normal(0, 2, (1, 50))), "cell": np.exp(rng.normal(0, 2, (40, 50)))}.get(
        theta_of, np.full((1, 1), np.inf)
    )
    u = rng.random(mu.shape)
    counts = quantile(u, mu, theta)
    assert counts.dtype == np.float32
    assert counts.shape == mu.shape
    assert_quantiles(u, mu, np.broadcast_to(theta, mu.shape), counts.astype(np.float64))


def test_nb_sampling_does_not_depend_on_how_many_probabilities_are_summed_at_once(monkeypatch):
    rng = np.random.default_rng(3)
    mu, theta = np.exp(rng.uniform(-4, 6, (30, 40))), np.exp(rng.normal(0, 2, (1, 40)))
    u = rng.random(mu.shape)
    counts = quantile(u, mu, theta)
    monkeypatch.setattr("scldm_cd4.nn.likelihood.MAX_SUMMED", 1)
    np.testing.assert_array_equal(quantile(u, mu, theta), counts)
    assert counts.max() > 200


def test_nb_sampling_at_the_edges():
    u = np.array([0.0, 0.0, 1 - 2**-53, 0.5, 0.3, 1 - 2**-53])
    mu = np.array([5.0, 0.0, 3.0, 20_000.0, 900.0, 0.0])
    theta = np.array([1.0, 1.0, 0.5, 500.0, np.inf, 2.0])
    counts = quantile(u[None], mu[None], theta[None])[0].astype(np.float64)
    assert np.isfinite(counts).all()
    assert (counts[0], counts[1], counts[5]) == (0.0, 0.0, 0.0)
    assert counts[3] == stats.nbinom.ppf(0.5, 500.0, 500.0 / 20_500.0)
    assert counts[4] == stats.poisson.ppf(0.3, 900.0)
    assert 40 < counts[2] < 1000


def test_nb_sampling_has_the_right_mean_and_variance():
    n, mu, theta = 200_000, 3.0, 0.7
    u = np.random.default_rng(2).random((n, 1))
    counts = quantile(u, np.full((n, 1), mu), np.array([[theta]])).astype(np.float64)
    variance = mu + mu**2 / theta
    assert abs(counts.mean() - mu) < 5 * np.sqrt(variance / n)
    assert counts.var() == pytest.approx(variance, rel=0.05)
    assert (counts == 0).mean() == pytest.approx((theta / (theta + mu)) ** theta, abs=0.005)

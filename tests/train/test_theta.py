import numpy as np
import pytest
import torch

from scldm_cd4.config import VAEConfig
from scldm_cd4.nn import VAE
from scldm_cd4.nn.likelihood import nb_log_prob
from scldm_cd4.train.latents import decode_means, encode_rows
from scldm_cd4.train.loaders import CountBatches
from scldm_cd4.train.theta import BOUNDS, fit_theta, moment_theta, refit_theta, set_theta


def draw(theta, n=4000, seed=0):
    rng = np.random.default_rng(seed)
    mu = rng.gamma(3.0, 1.0, size=(n, len(theta)))
    x = rng.poisson(rng.gamma(theta, mu / theta))
    return torch.from_numpy(x).float(), torch.from_numpy(mu).float()


def test_known_dispersions_are_recovered():
    truth = np.array([0.3, 1.0, 3.0, 10.0])
    fitted = fit_theta(*draw(truth))
    np.testing.assert_allclose(fitted, truth, rtol=0.15)
    np.testing.assert_allclose(moment_theta(*draw(truth)), truth, rtol=0.4)


def test_the_fit_is_the_maximum():
    x, mu = draw(np.array([0.5, 2.0, 20.0]), n=500)
    fitted = fit_theta(x, mu)

    def total(theta):
        return nb_log_prob(x.double(), mu.double(), theta.double()).sum(0)

    best = total(fitted)
    for factor in (0.95, 1.05):
        assert (total(fitted * factor) < best).all()


def test_genes_without_spread_or_counts_go_to_the_bound():
    mu = torch.full((200, 2), 5.0)
    x = mu.clone()
    x[:, 1] = 0
    assert fit_theta(x, mu).tolist() == pytest.approx([BOUNDS[1]] * 2, rel=0.01)


@pytest.mark.parametrize(("head", "table"), [("nb", True), ("decoupled", True), ("poisson", False)])
def test_dispersions_are_what_the_head_then_gives(head, table):
    config = VAEConfig(width=8, n_tokens=2, n_channels=4, n_layers=1, n_heads=1, n_cross_heads=1, head=head)
    vae, theta = VAE(config, 3), torch.tensor([0.01, 1.0, 50.0])
    assert set_theta(vae, theta) is table
    if table:
        given = vae.decode(torch.randn(2, 2, 4), torch.arange(1, 4), torch.ones(2, 1))[1]
        torch.testing.assert_close(given.expand(2, 3)[0], theta, rtol=1e-4, atol=1e-5)


def test_refit_raises_the_likelihood(job):
    vae, rows = job.vae(), job.split.train
    x = torch.from_numpy(job.cells.counts(rows).toarray())
    mu = decode_means(vae, encode_rows(vae, job.cells, rows), x.sum(1, keepdim=True))

    def likelihood():
        return nb_log_prob(x, mu, vae.decoder_head.theta.weight[1:, 0].exp()).sum()

    before = likelihood()
    assert refit_theta(vae, CountBatches(job.cells, rows, expressed=True), np.random.default_rng(0))
    assert likelihood() > before


def test_cells_not_trained_on_set_the_scale(job, monkeypatch):
    """Means that were learned by heart give dispersions of Poisson counts; other cells know better."""
    import scldm_cd4.train.theta as module

    vae = job.vae()
    counts, means = draw(np.full(job.cells.n_genes, 2.0), n=500)
    learned = counts + 1e-3  # as if the decoder knew the counts themselves
    sides = {"train": (counts, learned), "held out": (counts, means)}
    monkeypatch.setattr(module, "sample_rows", lambda rows, *_: rows)
    monkeypatch.setattr(module, "_targets_and_means", lambda _, data: sides[data.name])

    class Cells(list):
        def __init__(self, name):
            super().__init__(range(500))
            self.name = name

        def take(self, _):
            return self

    def typical():
        return float(vae.decoder_head.theta.weight.detach()[1:, 0].exp().median())

    assert refit_theta(vae, Cells("train"), np.random.default_rng(0))
    alone = typical()
    assert refit_theta(vae, Cells("train"), np.random.default_rng(0), Cells("held out"))
    assert alone > 200.0  # the counts were drawn with 2
    assert typical() < 0.06 * alone  # a factor exp(-3) at most in one fit
    settled = typical()
    spoilt = counts.clone()
    spoilt[0, 0] = 5000.0  # a cell of another kind, say
    sides["held out"] = (spoilt, means)
    assert refit_theta(vae, Cells("train"), np.random.default_rng(0), Cells("held out"))
    assert typical() == pytest.approx(settled, rel=0.1)

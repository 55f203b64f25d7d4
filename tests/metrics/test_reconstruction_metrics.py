"""Reconstruction metrics: conventions, draws, and equality with torchmetrics and scikit-learn."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError


@pytest.fixture(scope="module")
def cells():
    """Counts, their expected values and theta: (90, 30), (90, 30), (30,)."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(0.5, 5, 30)
    mean = rng.gamma(1.0, 2.0, (90, 30)) * rng.uniform(0.5, 2, 90)[:, None] + 0.05
    return rng.negative_binomial(theta, theta / (theta + mean)).astype(float), mean, theta


def test_pcc_equals_torchmetrics(cells):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional")
    counts, mean, _ = cells
    real, pred = (metrics.log_normalize(x).toarray() for x in (counts, mean))
    wanted = functional.pearson_corrcoef(torch.as_tensor(pred), torch.as_tensor(real))
    assert metrics.pcc(real, pred) == pytest.approx(float(wanted.nanmean()), abs=1e-9)
    fit = functional.r2_score(torch.as_tensor(pred.var(axis=0, ddof=1)), torch.as_tensor(real.var(axis=0, ddof=1)))
    assert metrics.r2_variance(real, pred) == pytest.approx(float(fit), abs=1e-6)


@pytest.mark.parametrize("axis", ["gene", "cell"])
def test_pieces_sparsity_and_type_do_not_matter(cells, axis, monkeypatch):
    counts, mean, _ = cells
    real, pred = metrics.log_normalize(counts), metrics.log_normalize(mean).toarray()
    wanted = metrics.pcc(real.toarray(), pred, axis=axis)
    assert metrics.pcc(real, sp.csc_matrix(pred), axis=axis) == pytest.approx(wanted, abs=1e-12)
    error, zeros = metrics.mse(real, pred), metrics.zeros_accuracy(real, pred)
    monkeypatch.setattr(
        "scldm_cd4.metrics.distribution.reconstruction._pieces",
        lambda m: (slice(i, i + 7) for i in range(0, m.shape[0], 7)),
    )
    assert metrics.pcc(real, pred, axis=axis) == pytest.approx(wanted, abs=1e-12)
    assert metrics.mse(real, pred) == pytest.approx(error, rel=1e-12)
    assert metrics.zeros_accuracy(real, pred) == zeros


def test_draws_have_the_moments_of_the_negative_binomial():
    mean, theta = np.tile([0.3, 2.0, 20.0], (40_000, 1)), np.array([0.5, 2.0, 8.0])
    drawn = metrics.sample_counts(mean, theta, seed=1).toarray()
    np.testing.assert_allclose(drawn.mean(axis=0), mean[0], rtol=0.03)
    np.testing.assert_allclose(drawn.var(axis=0), mean[0] + mean[0] ** 2 / theta, rtol=0.06)
    assert (drawn == drawn.round()).all()
    again = metrics.sample_counts(mean, np.tile(theta, (len(mean), 1)), seed=1).toarray()
    np.testing.assert_array_equal(again, drawn)
    assert (metrics.sample_counts(mean, theta, seed=2).toarray() != drawn).any()
    for bad_mean, bad_theta in ((-mean, theta), (mean, -theta), (mean * np.nan, theta)):
        with pytest.raises(DataError, match="must be"):
            metrics.sample_counts(bad_mean, bad_theta, seed=0)


def test_conventions_of_reconstruction(cells):
    counts, mean, theta = cells
    plain = metrics.reconstruction(counts, mean, theta)
    real, pred = metrics.log_normalize(counts), metrics.log_normalize(mean)
    assert plain["nb_error"] == metrics.nb_error(counts, mean, theta)
    assert metrics.nb_error(counts, mean, theta, per_gene=True) == pytest.approx(plain["nb_error"] / 30)
    assert plain["pcc"] == metrics.pcc(real, pred)
    assert plain["pcc_cell"] == metrics.pcc(real, pred, axis="cell")
    assert plain["mse"] == metrics.mse(real, pred)
    assert np.isnan(plain["zeros_accuracy"])
    drawn = metrics.reconstruction(counts, mean, theta, use="sample", seed=3)
    sampled = metrics.sample_counts(mean, theta, seed=3)
    assert drawn["pcc"] == metrics.pcc(real, metrics.log_normalize(sampled))
    assert drawn["zeros_accuracy"] == ((counts == 0) == (sampled.toarray() == 0)).mean()
    assert drawn["pcc"] < plain["pcc"]
    assert drawn["mse"] > plain["mse"]
    batched = metrics.reconstruction(counts, mean, theta, use="sample", batch_size=40, seed=3)
    parts = [metrics.pcc(real[i : i + 40], metrics.log_normalize(sampled)[i : i + 40]) for i in (0, 40, 80)]
    assert batched["pcc"] == pytest.approx(np.mean(parts), abs=1e-12)
    assert batched["mse"] == drawn["mse"]


def test_options_and_genes_by_name(cells):
    counts, mean, theta = cells
    with pytest.raises(DataError, match="'draw'"):
        metrics.reconstruction(counts, mean, theta, use="draw")
    with pytest.raises(DataError, match="batch_size=0"):
        metrics.reconstruction(counts, mean, theta, batch_size=0)
    names = [f"g{i}" for i in range(30)]
    real, pred = ad.AnnData(counts.astype(np.float32)), ad.AnnData(mean.astype(np.float32))
    real.var_names = pred.var_names = names
    wanted = metrics.reconstruction(real, pred, theta)
    found = metrics.reconstruction(real, pred[:, names[::-1]].copy(), theta)
    assert found == pytest.approx(wanted, nan_ok=True, rel=1e-9)


def test_the_truth_beats_a_fit_of_the_library_size_alone(cells):
    counts, mean, theta = cells
    share, fitted = metrics.intercept_nb(counts)
    floor = counts.sum(axis=1)[:, None] * share
    assert metrics.nb_error(counts, mean, theta) < metrics.nb_error(counts, floor, fitted)
    # the library size is divided out, so nothing is left that could correlate
    assert np.isnan(metrics.reconstruction(counts, floor, fitted)["pcc"])
    with pytest.raises(DataError, match="at least one cell"):
        metrics.reconstruction(counts[:0], mean[:0], theta)

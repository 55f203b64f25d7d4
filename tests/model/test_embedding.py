"""What the trained autoencoder says about given cells."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import DataError, GeneMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:The decoder makes little use")


def test_latent_forms(trained: Any, simulated: Any) -> None:
    flat, tokens = trained.get_latent(), trained.get_latent(flatten=False)
    assert flat.shape == (simulated.n_obs, 16)
    assert flat.dtype == np.float32
    assert np.array_equal(tokens.reshape(len(tokens), -1), flat)
    assert np.array_equal(trained.get_latent_representation(give_mean=True, mc_samples=10), flat)


def test_key_added(trained: Any, simulated: Any) -> None:
    copy = simulated.copy()
    z = trained.get_latent(copy, key_added="X_scldm_cd4")
    assert np.array_equal(copy.obsm["X_scldm_cd4"], z)
    assert "X_scldm_cd4" not in simulated.obsm
    with pytest.raises(DataError, match="all cells"):
        trained.get_latent(copy, key_added="X", indices=[0])


@pytest.mark.parametrize("indices", [[3, 1], np.array([3, 1]), slice(None)], ids=["list", "array", "slice"])
def test_indices(trained: Any, simulated: Any, indices: Any) -> None:
    if isinstance(indices, slice):
        mask = np.zeros(simulated.n_obs, dtype=bool)
        mask[[1, 3]] = True
        assert trained.get_latent(indices=mask).shape == (2, 16)
        assert trained.get_latent(indices=simulated.obs_names[[1, 3]]).shape == (2, 16)
    else:
        np.testing.assert_allclose(trained.get_latent(indices=indices), trained.get_latent()[[3, 1]], atol=1e-5)


@pytest.mark.parametrize("indices", [[], [-1], [10**6], ["no such cell"], [0.5], [[1]]])
def test_bad_indices(trained: Any, indices: Any) -> None:
    with pytest.raises(DataError, match="indices"):
        trained.get_latent(indices=indices)


def test_what_a_point_cannot_give(trained: Any) -> None:
    with pytest.raises(DataError, match="give_mean"):
        trained.get_latent(give_mean=False)
    with pytest.raises(DataError, match="return_dist"):
        trained.get_latent_representation(return_dist=True)


def test_normalized_expression(trained: Any, simulated: Any) -> None:
    table = trained.get_normalized_expression()
    assert table.index.equals(simulated.obs_names)
    assert list(table.columns) == list(simulated.var_names)
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-4)
    genes = [table.columns[5], table.columns[1]]
    pd.testing.assert_frame_equal(trained.get_normalized_expression(gene_list=genes), table[genes])
    own = trained.get_normalized_expression(library_size="latent", return_numpy=True)
    np.testing.assert_allclose(own.sum(axis=1), np.asarray(simulated.X.sum(1)).ravel(), rtol=1e-4)
    for bad in (0, -1, "mean", float("nan")):
        with pytest.raises(DataError, match="library_size"):
            trained.get_normalized_expression(library_size=bad)


def test_reconstruction_error_is_the_negative_log_likelihood(trained: Any, simulated: Any) -> None:
    from scipy.stats import nbinom

    error = trained.get_reconstruction_error(indices=[0, 1])
    mean = trained.get_normalized_expression(indices=[0, 1], library_size="latent", return_numpy=True).astype(float)
    theta = np.exp(trained._state.vae.decoder_head.theta.weight.detach().numpy()[1:, 0].astype(float))
    expected = -nbinom.logpmf(simulated.X[:2].toarray(), theta, theta / (theta + mean)).sum(1)
    np.testing.assert_allclose(error, expected, rtol=1e-3)


def test_missing_genes(trained: Any, simulated: Any) -> None:
    few = simulated[:10, :40].copy()
    with pytest.raises(GeneMismatchError, match="10 missing"):
        trained.get_latent(few)
    with pytest.warns(UserWarning, match=r"20\.0%"):
        assert np.isfinite(trained.get_latent(few, allow_missing=True)).all()
    with pytest.raises(GeneMismatchError):
        trained.get_latent(simulated[:10, :20].copy(), allow_missing=True)


def test_bad_counts_are_refused(trained: Any, simulated: Any) -> None:
    bad = simulated[:10].copy()
    bad.X = bad.X.toarray()
    bad.X[3, 4] = np.nan
    with pytest.raises(DataError, match="row 3|sim_"):
        trained.get_latent(bad)


def test_decoder_that_takes_labels_gets_those_of_the_cells(simulated: Any, quick: Any) -> None:
    from scldm_cd4 import CD4Model

    model = CD4Model(simulated, "tiny", **quick | {"vae": quick["vae"] | {"label_rank": 4}})
    model.train(seed=0, max_epochs=2)
    own = model.get_normalized_expression(indices=[0], return_numpy=True)
    other = simulated[:1].copy()
    other.obs["timepoint"] = [t for t in model.timepoints if t != other.obs["timepoint"].iloc[0]]
    assert np.array_equal(model.get_latent(other), model.get_latent(indices=[0]))
    assert not np.allclose(model.get_normalized_expression(other, return_numpy=True), own)
    assert model.generate("NTC", n_cells=1, seed=0).n_obs == 4

"""Given cells under other labels."""

from typing import Any

import numpy as np
import pytest

from scldm_cd4 import DataError, GeneMismatchError, UnknownCategoryError


@pytest.fixture(scope="module")
def some(simulated: Any) -> Any:
    return simulated[:30].copy()


def test_same_labels_give_latents_and_means_back(trained: Any, simulated: Any) -> None:
    rest = simulated[(simulated.obs["perturbation"] == "NTC") & (simulated.obs["timepoint"] == "Rest")].copy()
    back = trained.generate(cells=rest, perturbation="NTC", output="latent", seed=0)
    error = np.sqrt(np.mean((back.X - trained.get_latent(rest)) ** 2))
    assert error <= 1e-2
    mean = trained.generate(cells=rest, perturbation="NTC", output="mean", seed=0).X
    own = trained.get_normalized_expression(rest, library_size="latent", return_numpy=True)
    assert np.corrcoef(mean.ravel(), own.ravel())[0, 1] >= 0.999


def test_new_labels_move_cells(trained: Any, some: Any) -> None:
    moved = trained.generate(cells=some, timepoint="Stim8hr", seed=0, output="latent")
    stays = (some.obs["timepoint"] == "Stim8hr").to_numpy()
    distance = np.sqrt(((moved.X - trained.get_latent(some)) ** 2).mean(1))
    assert distance[stays].max() < distance[~stays].min()


def test_contents(trained: Any, some: Any) -> None:
    cells = trained.generate(cells=some, perturbation="NTC", seed=0)
    assert cells.obs_names.equals(some.obs_names)
    assert set(cells.obs["perturbation"]) == {"NTC"}
    assert list(cells.obs["donor_id"]) == list(some.obs["donor_id"])
    assert list(cells.obs["source_perturbation"]) == list(some.obs["perturbation"])
    np.testing.assert_allclose(cells.obs["size_factor"], np.asarray(some.X.sum(1)).ravel())
    assert cells.uns["scldm_cd4"]["counterfactual"]
    assert np.array_equal(cells.X.data, np.round(cells.X.data))


def test_order_and_subset_do_not_matter(trained: Any, some: Any) -> None:
    all_cells = trained.generate(cells=some, perturbation="NTC", seed=0, output="latent")
    chosen = [7, 3, 21]
    few = trained.generate(cells=some[chosen].copy(), perturbation="NTC", seed=0, output="latent")
    np.testing.assert_allclose(few.X, all_cells.X[chosen], atol=1e-5)
    assert list(few.obs_names) == list(some.obs_names[chosen])


def test_counterfactuals_of_a_cell_share_their_noise(trained: Any, some: Any) -> None:
    one = trained.generate(cells=some, donor="CE0008162", seed=0)
    two = trained.generate(cells=some, donor="CE0008162", seed=0)
    other = trained.generate(cells=some, donor="CE0008162", seed=1)
    assert (one.X != two.X).nnz == 0
    assert (one.X != other.X).nnz > 0


def test_size_factors_and_file(trained: Any, some: Any, tmp_path: Any) -> None:
    cells = trained.generate(cells=some, donor="CE0008162", seed=0, size_factors=300.0, out=tmp_path / "x.h5ad")
    assert cells.isbacked
    assert (cells.obs["size_factor"] == 300).all()
    cells.file.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, DataError, "what to change"),
        ({"perturbation": ["NTC", "NTC"]}, DataError, "one perturbation"),
        ({"perturbation": "NOTAGENE"}, UnknownCategoryError, "NOTAGENE"),
        ({"perturbation": "NTC", "n_cells": 3}, DataError, "n_cells"),
        ({"perturbation": "NTC", "size_factors": [1.0]}, DataError, "30 cells"),
    ],
)
def test_refused(trained: Any, some: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        trained.generate(cells=some, **options)


def test_cells_without_a_gene_of_the_model_are_refused(trained: Any, some: Any) -> None:
    with pytest.raises(
        GeneMismatchError, match="where a method takes it, as get_latent does; all others need all genes"
    ):
        trained.generate(cells=some[:, 5:].copy(), perturbation="NTC")


def test_unknown_donor_of_the_cells_is_refused(trained: Any, some: Any) -> None:
    foreign = some.copy()
    foreign.obs["donor_id"] = "D9"
    with pytest.raises(UnknownCategoryError, match="D9"):
        trained.generate(cells=foreign, perturbation="NTC")
    assert trained.get_latent(foreign).shape == (30, 16)

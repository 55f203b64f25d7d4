"""The cells of a model: how they were declared stays, and which of them it has seen is not mistaken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scldm_cd4 import CD4Model, DataError, open_cells

KEYS = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint", "control": "NTC"}
QUICK = {"profile": "minimal", "n_repeats": 1, "min_cells": 4}


@pytest.fixture
def saved(trained: CD4Model, tmp_path: Path) -> Path:
    trained.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cells(simulated: Any) -> Any:
    out = simulated.copy()
    out.layers["denoised"] = (out.X * 3).tocsr()
    out.obs["site"] = out.obs["donor_id"].to_numpy()[::-1]
    return out


def declare_otherwise(cells: Any) -> None:
    CD4Model.setup_anndata(cells, **KEYS | {"donor_key": "site"}, layer="denoised")


def results(model: CD4Model) -> list[Any]:
    target = {"up": list(model.adata.var_names[:6]), "down": list(model.adata.var_names[6:12])}
    scores = model.evaluate(seed=1, **QUICK)
    ranked = model.rank_perturbations(target, effects="observed", n_cells=20, seed=0)
    return [scores["value"], ranked["score"], model.get_latent(), model.test_indices]


def test_a_later_declaration_changes_no_model_that_has_the_cells(saved: Path, cells: Any) -> None:
    model = CD4Model.load(saved, cells)
    before = results(model)
    declare_otherwise(cells)
    for found, expected in zip(results(model), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(model.get_latent(cells[model.test_indices]), before[2][model.test_indices])
    assert CD4Model(cells, "tiny").view_anndata_setup().loc["counts", "key"] == "denoised"


@pytest.mark.filterwarnings("ignore:no cells of the new donor")
def test_an_extended_model_has_the_declaration_of_the_first(saved: Path, cells: Any) -> None:
    model = CD4Model.load(saved, cells)
    expected = model.get_latent()
    declare_otherwise(cells)
    np.testing.assert_array_equal(model.extend(donor="D5", seed=0).get_latent(), expected)


def test_a_model_trains_by_the_declaration_that_it_was_built_with(cells: Any, quick: Any) -> None:
    first, second = CD4Model(cells, "tiny", **quick), CD4Model(cells.copy(), "tiny", **quick)
    declare_otherwise(cells)
    for model in (first, second):
        model.train(stage="vae", max_epochs=1, seed=0)
    np.testing.assert_array_equal(first.get_latent(), second.get_latent())
    assert first.registry == second.registry


def test_other_cells_are_read_as_they_declare(saved: Path, cells: Any) -> None:
    model = CD4Model.load(saved, cells)
    other = cells.copy()
    declare_otherwise(other)
    tripled = ad.AnnData(other.layers["denoised"], obs=other.obs, var=other.var)
    np.testing.assert_array_equal(model.get_latent(other), model.get_latent(tripled))


@pytest.mark.parametrize("backed", [False, True])
def test_cells_in_files_keep_their_declaration(saved: Path, cells: Any, tmp_path: Path, backed: bool) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    path = tmp_path / "cells.h5ad"
    found = ad.read_h5ad(path, backed="r") if backed else open_cells(path)
    CD4Model.setup_anndata(found, **KEYS)
    model = CD4Model.load(saved, found)
    expected, test = model.get_latent(), model.test_indices
    assert test is not None
    declare_otherwise(found)
    np.testing.assert_array_equal(model.get_latent(), expected)
    np.testing.assert_array_equal(model.test_indices, test)


def test_mudata_keeps_its_declaration_and_rows_are_those_of_the_cells(saved: Path, cells: Any) -> None:
    mudata = pytest.importorskip("mudata")
    guides = ad.AnnData(np.ones((20, 1)), obs=cells.obs.iloc[-20:, :0])
    with mudata.set_options(pull_on_update=False):
        both = mudata.MuData({"guides": guides, "rna": cells})
    where = dict.fromkeys(["layer", "perturbation_key", "donor_key", "timepoint_key"], "rna")
    CD4Model.setup_mudata(both, modalities=where, **KEYS)
    model = CD4Model.load(saved, both)
    expected, test = model.get_latent(), model.adata[model.test_indices].obs
    assert set(zip(test["perturbation"], test["donor_id"], strict=True)) == {(model.perturbations[0], "CE0008162")}
    CD4Model.setup_mudata(both, modalities=where, layer="denoised", **KEYS)
    np.testing.assert_array_equal(model.get_latent(), expected)


def filtered(cells: Any) -> None:
    cells._inplace_subset_obs(np.arange(cells.n_obs) != 7)  # as scanpy.pp.filter_cells does


def sorted_(cells: Any) -> None:
    cells._inplace_subset_obs(np.arange(cells.n_obs)[::-1])


def relabelled(cells: Any) -> None:
    cells.obs["donor_id"] = cells.obs["site"].to_numpy()


def renamed(cells: Any) -> None:
    cells.obs_names = [f"other{i}" for i in range(cells.n_obs)]


@pytest.mark.parametrize("change", [filtered, sorted_, relabelled, renamed])
def test_cells_changed_in_place_are_not_taken_for_held_out(
    saved: Path, cells: Any, change: Callable[[Any], None]
) -> None:
    model, known = CD4Model.load(saved, cells), cells.copy()
    rows = model.test_indices, model.train_indices
    change(cells)
    for part in ("train_indices", "validation_indices", "test_indices"):
        with pytest.raises(DataError, match="in place since training.*CD4Model.load"):
            getattr(model, part)
    with pytest.raises(DataError, match="in place since training"):
        model.evaluate(seed=0)
    with pytest.raises(DataError, match="in place since training"):
        model.train(stage="flow", max_epochs=1)
    assert model.evaluate(known[rows[0]], train=known[rows[1]], seed=1, **QUICK)["value"].notna().any()
    assert CD4Model.load(saved, cells).test_indices is None
    assert model.get_latent().shape[0] == cells.n_obs


def test_other_changes_of_the_cells_are_allowed(saved: Path, cells: Any) -> None:
    model = CD4Model.load(saved, cells)
    rows = model.test_indices
    cells.obs["leiden"] = "0"
    cells.obs["donor_id"] = cells.obs["donor_id"].astype(str)
    cells._inplace_subset_var(cells.var_names[::-1])
    np.testing.assert_array_equal(model.test_indices, rows)


def test_generated_time_points_are_in_the_order_of_the_cells(cells: Any, quick: Any) -> None:
    order = sorted(cells.obs["timepoint"].unique(), reverse=True)
    cells.obs["timepoint"] = cells.obs["timepoint"].cat.reorder_categories(order, ordered=True)
    CD4Model.setup_anndata(cells, **KEYS)
    model = CD4Model(cells, "tiny", **quick)
    model.train(max_epochs=1, seed=0)
    assert model.timepoints == tuple(order)
    made = model.generate("NTC", donor=model.donors[0], n_cells=2, seed=0)
    assert list(made.obs["timepoint"].cat.categories) == order
    assert made.obs["n_train_cells"].tolist() == [
        model.registry["train_counts"]["NTC"][model.donors[0]][t] for t in made.obs["timepoint"]
    ]

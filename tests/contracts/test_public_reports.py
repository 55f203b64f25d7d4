"""Reports by users of related tools, and edge inputs, through the public face; each test names its row.

Rows 4b-1 to 4b-24 are covered as listed in ``test_reference_defects``; here are those that need the whole model.
"""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scldm_cd4 import CD4Model
from scldm_cd4._errors import DataError, GeneMismatchError, UnknownCategoryError
from scldm_cd4.data.labels import as_label

KEYS = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint", "control": "NTC"}
UNTRAINED_ENOUGH = pytest.mark.filterwarnings("ignore:The decoder makes little use of the latent")


def undeclared(adata: Any) -> Any:
    out = adata.copy()
    del out.uns["_scldm_cd4"]
    return out


def test_part_of_the_genes_missing_says_what_to_pass(trained: Any, simulated: Any) -> None:
    """4b-2: the remedy fits the case, also when the names are of the right kind."""
    with pytest.raises(GeneMismatchError, match=r"40 of the model's 50 genes found.*allow_missing=True"):
        trained.get_latent(simulated[:, :40])


def test_one_gene_in_common_is_refused(trained: Any, simulated: Any) -> None:
    """Edge list: 1-gene overlap."""
    with pytest.raises(GeneMismatchError, match=r"1 of the model's 50 genes found.*At most 50%"):
        trained.get_latent(simulated[simulated.X[:, 0].toarray().ravel() > 0, :1], allow_missing=True)


def test_cells_of_a_new_donor_can_be_embedded_but_not_generated(trained: Any, simulated: Any) -> None:
    """4b-4: an embedding needs no label, so old and new data concatenate; generating a new donor is refused."""
    new = undeclared(simulated)
    new.obs["donor_id"] = "someone else"
    new.obs_names = "new" + new.obs_names
    both = ad.concat([simulated, new])
    z = trained.get_latent(both)
    np.testing.assert_allclose(z[: simulated.n_obs], z[simulated.n_obs :], atol=1e-5)
    with pytest.raises(UnknownCategoryError, match="someone else.*donor_id.*CE0008162"):
        trained.generate("NTC", "someone else")
    with pytest.raises(UnknownCategoryError, match="someone else"):
        trained.generate("NTC", cells=new[:3])


@UNTRAINED_ENOUGH
@pytest.mark.parametrize("dtype", ["int64", "float64", "bool", "string", "category"])
def test_labels_of_any_dtype_go_round(simulated: Any, quick: Any, dtype: str) -> None:
    """4b-5: a label is asked for as it stands in the data, or by its string, with the same cells."""
    adata = undeclared(simulated)
    adata.obs["batch"] = pd.Series((adata.obs["donor_id"] == "CE0008162").astype(int)).astype(dtype)
    CD4Model.setup_anndata(adata, perturbation_key="perturbation", donor_key="batch", control="NTC")
    model = CD4Model(adata, "tiny", **quick)
    model.train(seed=0, max_epochs=1)
    value = adata.obs["batch"].iloc[0]
    cells = model.generate("NTC", value, n_cells=2, seed=0)
    same = model.generate("NTC", as_label(value), n_cells=2, seed=0)
    assert (cells.X != same.X).nnz == 0
    assert np.isfinite(model.get_reconstruction_error(ad.concat([adata, cells], index_unique="-"))).all()


def test_predict_takes_conditions_and_never_the_labels_of_cells(trained: Any, simulated: Any) -> None:
    """4b-13: what is generated was asked for, and the output says what it was."""
    with pytest.raises(DataError, match="DataFrame.*AnnData"):
        trained.predict(simulated)
    asked = pd.DataFrame({"perturbation": ["NTC"], "donor_id": ["CE0008162"], "timepoint": ["Rest"], "n_cells": [2]})
    cells = trained.predict(asked, seed=0)
    pd.testing.assert_frame_equal(
        cells.obs[["perturbation", "donor_id", "timepoint"]].astype(object).reset_index(drop=True),
        asked.drop(columns="n_cells").loc[[0, 0]].reset_index(drop=True),
        check_dtype=False,
    )


@UNTRAINED_ENOUGH
@pytest.mark.parametrize("labels", [["NTC"], ["NTC", "GATA3"]])
def test_one_or_two_perturbations_train(simulated: Any, quick: Any, labels: list[str]) -> None:
    """4b-19: few perturbations split by cell; holding out the only one is refused in words."""
    adata = undeclared(simulated)
    adata.obs["perturbation"] = np.resize(labels, adata.n_obs)
    CD4Model.setup_anndata(adata, **KEYS)
    model = CD4Model(adata, "tiny", **quick)
    model.train(seed=0, max_epochs=1)
    assert set(model.generate(n_cells=1, seed=0).obs["perturbation"]) == set(labels)
    with pytest.raises(DataError, match="no cell is left for training"):
        model.train(seed=0, max_epochs=1, split={"hold_out": {"perturbation": labels}})


def test_odd_column_names_survive_a_file(trained: Any, simulated: Any, tmp_path: Any) -> None:
    """4b-21: obs and var share the name of a column, real and generated cells are joined, written and read."""
    real = undeclared(simulated)
    real.var["perturbation"] = pd.Categorical(["x"] * real.n_vars)
    real.obs["is_generated"] = False
    joined = ad.concat({"real": real, "generated": trained.generate("NTC", n_cells=3, seed=0)}, label="origin")
    assert joined.obs["is_generated"].dtype == bool
    assert joined.obs["perturbation"].dtype == "category"
    joined.write_h5ad(tmp_path / "with space.h5ad")
    again = ad.read_h5ad(tmp_path / "with space.h5ad")
    assert list(again.obs["perturbation"]) == list(joined.obs["perturbation"])
    assert np.array_equal(trained.get_latent(again), trained.get_latent(joined))


@UNTRAINED_ENOUGH
@pytest.mark.parametrize("own", [{"layer": "counts"}, {"size_factor_key": "depth"}, {"gene_id_key": "identifier"}])
def test_a_model_takes_its_own_cells(simulated: Any, quick: Any, own: dict[str, str]) -> None:
    """4b-13: generated cells go back into the model, whatever layer or column its training cells had."""
    adata = undeclared(simulated)
    adata.layers["counts"] = adata.X
    adata.X = adata.X * 0.5
    adata.obs["depth"] = 7.5
    adata.var["identifier"] = [f"id{i}" for i in range(adata.n_vars)]
    if "layer" not in own:
        adata.X = adata.layers.pop("counts")
    CD4Model.setup_anndata(adata, **KEYS, **own)
    model = CD4Model(adata, "tiny", **quick)
    model.train(seed=0, max_epochs=1)
    cells = model.generate("NTC", n_cells=2, seed=0)
    assert model.get_latent(cells).shape[0] == cells.n_obs
    assert np.isfinite(model.get_reconstruction_error(cells)).all()
    assert model.generate("NTC", donor="CE0008162", cells=cells, seed=0).n_obs == cells.n_obs
    if "layer" in own:
        cells.X = cells.X * 0.5
        with pytest.raises(DataError, match="raw counts"):
            model.get_latent(cells)


@pytest.mark.parametrize("thing", ["cells.h5ad", pd.DataFrame({"perturbation": ["NTC"]}), np.ones((3, 50))])
def test_what_is_no_anndata_is_named(trained: Any, thing: Any) -> None:
    """Edge list: a path, a table or an array in place of an AnnData."""
    for use in (
        lambda: CD4Model.setup_anndata(thing, perturbation_key="perturbation"),
        lambda: CD4Model(thing),
        lambda: trained.get_latent(thing),
    ):
        with pytest.raises(DataError, match=f"AnnData is needed, got {type(thing).__name__}"):
            use()


def test_a_single_cell_and_a_single_step(trained: Any, simulated: Any) -> None:
    """Edge list: single cell; 1 ODE step; n_cells=1."""
    assert trained.get_latent(simulated[:1]).shape == (1, trained.get_latent().shape[1])
    cells = trained.generate("NTC", "CE0008162", "Rest", n_cells=1, n_steps=1, seed=0)
    assert cells.n_obs == 1
    assert np.isfinite(cells.X.data).all()


def test_forms_of_the_query_change_nothing(trained: Any, simulated: Any, tmp_path: Any) -> None:
    """Edge list: view, CSC, dense, int64, float16, backed: the same latents."""
    want = trained.get_latent(simulated[:30])
    base = undeclared(simulated)[:30].copy()
    base.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert np.array_equal(trained.get_latent(backed), want)
    assert np.array_equal(trained.get_latent(backed[:, ::-1]), want)
    backed.file.close()
    dense = base.X.toarray()
    for x in (
        sparse.csc_matrix(dense),
        dense,
        dense.astype(np.int64),
        dense.astype(np.float16),
        sparse.csr_array(dense),
    ):
        query = base.copy()
        query.X = x
        assert np.array_equal(trained.get_latent(query), want)

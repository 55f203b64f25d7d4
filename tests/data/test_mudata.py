"""MuData: where counts and labels are found, what a model gives back, and what is refused."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import CD4Model, DataError, pp
from scldm_cd4.data.mudata import as_anndata

mudata = pytest.importorskip("mudata")
KEYS = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint", "control": "NTC"}
IN_RNA = dict.fromkeys(["layer", "perturbation_key", "donor_key", "timepoint_key"], "rna")


def mu(parts: dict[str, Any]) -> Any:
    with mudata.set_options(pull_on_update=False):
        return mudata.MuData(parts)


@pytest.fixture
def cells(simulated: Any) -> Any:
    out = simulated.copy()
    del out.uns["_scldm_cd4"]
    return out


@pytest.fixture
def mdata(cells: Any) -> Any:
    """Counts and two labels in one modality, guides in another with fewer cells in another order, one label above."""
    import anndata as ad

    rng = np.random.default_rng(0)
    guides = ad.AnnData(np.ones((cells.n_obs, 2), dtype=np.float32), obs=cells.obs[["perturbation"]].copy())
    guides = guides[rng.permutation(cells.n_obs)].copy()
    rna = cells.copy()
    del rna.obs["perturbation"]
    rna.layers["counts"], rna.X = rna.X.copy(), rna.X.log1p()
    out = mu({"rna": rna, "guides": guides})
    out.obs["site"] = cells.obs["timepoint"].reindex(out.obs_names)
    return out


def test_labels_come_from_where_they_are(mdata: Any, cells: Any) -> None:
    where = {"layer": "rna", "perturbation_key": "guides", "donor_key": "rna"}
    keys = KEYS | {"timepoint_key": "site", "layer": "counts"}
    before = set(mdata.mod["rna"].obs)
    CD4Model.setup_mudata(mdata, modalities=where, **keys)
    found = as_anndata(mdata)
    assert found.obs["perturbation"].astype(str).tolist() == cells.obs["perturbation"].astype(str).tolist()
    assert found.obs["site"].astype(str).tolist() == cells.obs["timepoint"].astype(str).tolist()
    assert found.layers["counts"] is mdata.mod["rna"].layers["counts"]  # nothing is copied
    assert set(mdata.mod["rna"].obs) == before
    assert "_scldm_cd4" not in mdata.mod["rna"].uns
    model = CD4Model(mdata, "tiny")
    assert model.mdata is mdata
    assert model.view_anndata_setup().loc["counts", "key"] == "counts"
    assert set(model.timepoints) == set(cells.obs["timepoint"])


def test_declaration_survives_a_file(mdata: Any, tmp_path: Any) -> None:
    where = {"layer": "rna", "perturbation_key": "guides", "donor_key": "rna"}
    CD4Model.setup_mudata(mdata, modalities=where, **(KEYS | {"timepoint_key": "site", "layer": "counts"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mudata, on its own ways
        mdata.write(tmp_path / "cells.h5mu")
        with mudata.set_options(pull_on_update=False):
            again = mudata.read_h5mu(tmp_path / "cells.h5mu")
    assert as_anndata(again).uns["_scldm_cd4"] == as_anndata(mdata).uns["_scldm_cd4"]


def test_model_of_mudata_equals_that_of_its_modality(cells: Any, trained: Any, tmp_path: Any) -> None:
    trained.save(tmp_path / "model")
    mdata = mu({"rna": cells.copy()})
    CD4Model.setup_mudata(mdata, modalities=IN_RNA, **KEYS)
    model = CD4Model.load(tmp_path / "model", mdata)
    latent = model.get_latent(key_added="X_scldm_cd4")
    np.testing.assert_array_equal(latent, trained.get_latent())
    np.testing.assert_array_equal(mdata.mod["rna"].obsm["X_scldm_cd4"], latent)
    np.testing.assert_array_equal(model.get_latent(mdata, indices=[1, 3]), latent[[1, 3]])
    moved = model.generate(cells=mdata, donor=model.donors[0], seed=0)
    assert moved.n_obs == cells.n_obs


def test_generated_cells_go_back_into_the_modality(mdata: Any, trained: Any, tmp_path: Any) -> None:
    where = {"layer": "rna", "perturbation_key": "guides", "donor_key": "rna", "timepoint_key": "rna"}
    CD4Model.setup_mudata(mdata, modalities=where, **(KEYS | {"layer": "counts"}))
    made = trained.generate(perturbation=trained.perturbations[:2], n_cells=3, seed=0)
    both = pp.concat_generated(mdata, made)
    n = mdata.mod["rna"].n_obs
    assert both.mod["rna"].n_obs == n + made.n_obs
    assert both.mod["guides"].n_obs == mdata.mod["guides"].n_obs
    assert both.mod["rna"].obs["origin"].value_counts().to_dict() == {"real": n, "generated": made.n_obs}
    np.testing.assert_array_equal(both.mod["rna"][:n].X.toarray(), mdata.mod["rna"].layers["counts"].toarray())
    assert both.obs["site"].notna().sum() == n
    assert mdata.mod["rna"].n_obs == n
    assert "_scldm_cd4" not in both.uns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.write(tmp_path / "both.h5mu")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (None, "which modality holds the counts"),
        ({"layer": "prot"}, "'prot' is no modality"),
        ({"layer": "rna", "batch_key": "rna"}, "as keys, got 'batch_key'"),
        ({"layer": "rna"}, r"of the modality 'rna'.*modalities="),
        ({"layer": "rna", "gene_id_key": "guides"}, "gene_id_key is a column of the modality"),
        ({"layer": "rna", "perturbation_key": "rna"}, "is not a column of obs of 'rna'|not a column of obs"),
    ],
)
def test_refusals(mdata: Any, where: Any, message: str) -> None:
    keys = KEYS | {"perturbation_key": "donor_id", "donor_key": None, "timepoint_key": None, "control": None}
    if where == {"layer": "rna", "perturbation_key": "rna"}:
        keys["perturbation_key"] = "perturbation"
    with pytest.raises(DataError, match=message):
        CD4Model.setup_mudata(mdata, modalities=where, layer="counts", **keys)
    assert "_scldm_cd4" not in mdata.uns


def test_cells_without_a_label_are_counted(mdata: Any) -> None:
    few = mu({"rna": mdata.mod["rna"].copy(), "guides": mdata.mod["guides"][:-7].copy()})
    with pytest.raises(DataError, match="missing or empty in 7 of"):
        CD4Model.setup_mudata(
            few,
            perturbation_key="perturbation",
            layer="counts",
            modalities={"layer": "rna", "perturbation_key": "guides"},
        )


def test_undeclared_and_wrong_kinds(mdata: Any, cells: Any) -> None:
    with pytest.raises(DataError, match="call CD4Model.setup_mudata"):
        CD4Model(mdata)
    with pytest.raises(DataError, match="setup_mudata"):
        CD4Model.setup_anndata(mdata, **KEYS)
    with pytest.raises(DataError, match="use setup_anndata"):
        CD4Model.setup_mudata(cells, **KEYS)
    CD4Model.setup_mudata(
        mdata,
        perturbation_key="perturbation",
        layer="counts",
        modalities={"layer": "rna", "perturbation_key": "guides"},
    )
    lost = mu({"guides": mdata.mod["guides"].copy()})
    lost.uns["_scldm_cd4"] = mdata.uns["_scldm_cd4"]
    with pytest.raises(DataError, match="not in the MuData any more"):
        as_anndata(lost)


def test_labels_of_numbers_stay_numbers(cells: Any) -> None:
    cells.obs["donor_id"] = pd.Categorical(cells.obs["donor_id"].cat.codes.astype(int))
    mdata = mu({"rna": cells})
    CD4Model.setup_mudata(mdata, modalities=IN_RNA, **KEYS)
    assert CD4Model(mdata, "tiny").registry["donor"]["kind"] == "int"

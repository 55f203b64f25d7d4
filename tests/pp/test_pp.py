"""Panel, query report, joined cells, and the public Perturb-seq columns."""

import logging
import os
import subprocess
import sys
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import CD4Model, DataError, GeneMismatchError, open_cells, pp


@pytest.fixture
def cells(simulated: Any) -> Any:
    return simulated.copy()


def test_panel_keeps_perturbed_genes_in_order(cells: Any) -> None:
    pytest.importorskip("skmisc", reason="seurat_v3 needs scikit-misc")
    panel = pp.select_panel(cells, 10, perturbation_key="perturbation", control="NTC")
    targets = {level for level in cells.obs["perturbation"].unique() if level != "NTC"}
    assert targets <= set(panel)
    assert 10 <= len(panel) <= 10 + len(targets)
    assert list(panel) == [gene for gene in cells.var_names if gene in set(panel)]
    import scanpy as sc

    chosen = sc.pp.highly_variable_genes(cells, n_top_genes=10, flavor="seurat_v3", inplace=False)["highly_variable"]
    assert set(panel) == set(cells.var_names[chosen.to_numpy()]) | targets
    shuffled = cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()
    assert set(pp.select_panel(shuffled, 10, perturbation_key="perturbation", control="NTC")) == set(panel)


def test_panel_says_which_perturbed_genes_are_absent(cells: Any) -> None:
    target = next(level for level in cells.obs["perturbation"].unique() if level != "NTC")
    with pytest.warns(UserWarning, match=f"1 of 3 perturbed genes are not in var_names.*{target}"):
        panel = pp.select_panel(
            cells[:, cells.var_names != target].copy(), 10**6, perturbation_key="perturbation", control="NTC"
        )
    assert len(panel) == cells.n_vars - 1
    with pytest.raises(DataError, match="gene_key="):
        pp.select_panel(cells, 10, perturbation_key="donor_id")
    with pytest.raises(DataError, match=r"got Index: names of genes.*adata\[:, panel\]"):
        CD4Model.setup_anndata(panel, perturbation_key="perturbation")
    with pytest.raises(DataError, match="n_top_genes"):
        pp.select_panel(cells, 0)


def test_query_report(trained: Any, cells: Any, tmp_path: Any) -> None:
    query = cells[:80, ::-1].copy()
    del query.uns["_scldm_cd4"]
    query.var_names = ["OTHER", *query.var_names[1:]]
    query.obs["donor_id"] = np.where(np.arange(80) < 5, "CE000816", query.obs["donor_id"].astype(str))
    lost = cells.var_names[-1]
    aligned, report = pp.prepare_query_anndata(query, trained)
    assert report.missing == (lost,)
    assert report.extra == ("OTHER",)
    assert list(aligned.var_names) == list(cells.var_names[:-1]) == list(report.found)
    np.testing.assert_array_equal(aligned.X.toarray(), cells[:80, :-1].X.toarray())
    assert report.unseen["donor"] == {"CE000816": 5}
    assert "CE0008162" in report.near["CE000816"]
    assert report.density == pytest.approx((aligned.X.toarray() > 0).mean())
    assert report.counts_per_cell == np.median(aligned.X.toarray().sum(axis=1))
    assert f"{len(report.found)} of {report.n_model}" in str(report)
    table = report.to_frame().set_index("what")
    assert table.loc["genes missing", "note"] == lost
    assert table.loc["donors not seen", "value"] == "1"
    assert report.to_dict()["labels"]["donor"]["unseen"] == {"CE000816": 5}
    trained.save(tmp_path / "m")
    assert pp.prepare_query_anndata(query, tmp_path / "m")[1] == report
    assert CD4Model.prepare_query_anndata(query, trained)[1] == report


def test_query_report_escapes_labels(trained: Any, cells: Any) -> None:
    cells.obs["donor_id"] = "<script>"
    html = pp.prepare_query_anndata(cells, trained)[1]._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_query_refuses(trained: Any, cells: Any) -> None:
    other = cells.copy()
    other.var_names = [f"x{i}" for i in range(other.n_vars)]
    with pytest.raises(DataError, match=r"none of the model's 50 genes.*gene_id_key"):
        pp.prepare_query_anndata(other, trained)
    cells.X = cells.X.log1p()
    with pytest.raises(DataError, match="must hold raw counts"):
        pp.prepare_query_anndata(cells, trained)
    with pytest.raises(DataError, match="reference must be"):
        pp.prepare_query_anndata(cells, 3)


@pytest.fixture
def made(trained: Any) -> Any:
    return trained.generate(perturbation=trained.perturbations[:2], n_cells=4, seed=0)


def test_joined_cells_survive_a_file(cells: Any, made: Any, tmp_path: Any) -> None:
    cells.obs["passed"] = np.arange(cells.n_obs) % 2 == 0
    cells.obs["plate"] = np.arange(cells.n_obs) % 3
    cells.obs["note"] = pd.Categorical(["b", *["a"] * (cells.n_obs - 1)], categories=["b", "a"])
    cells.obs["free"] = "text"
    both = pp.concat_generated(cells[:, ::-1].copy(), made)
    n = cells.n_obs
    assert list(both.var_names) == list(made.var_names)
    np.testing.assert_array_equal(both.X[:n].toarray(), cells.X.toarray())
    np.testing.assert_array_equal(both.X[n:].toarray(), made.X.toarray())
    assert both.obs["is_generated"].sum() == made.n_obs
    assert both.obs["perturbation"].cat.categories.tolist() == cells.obs["perturbation"].cat.categories.tolist()
    assert both.obs["note"].cat.categories.tolist() == ["b", "a"]
    assert both.obs["note"].isna().sum() == made.n_obs
    assert "_scldm_cd4" not in both.uns
    both.write_h5ad(tmp_path / "both.h5ad")
    again = ad.read_h5ad(tmp_path / "both.h5ad")
    pd.testing.assert_frame_equal(again.obs, both.obs, check_dtype=False, check_categorical=False)
    assert again.uns["scldm_cd4"]["output"] == "counts"
    with pytest.raises(DataError, match="setup_anndata"):
        CD4Model(both, "tiny")


def test_joined_names_stay_unique(cells: Any, made: Any) -> None:
    made.obs_names = cells.obs_names[: made.n_obs]
    both = pp.concat_generated(cells, made, origin_key="kind")
    assert both.obs_names.is_unique
    assert both.obs_names[-1] == f"{cells.obs_names[made.n_obs - 1]}-generated"
    with pytest.raises(DataError, match="column 'kind' already"):
        pp.concat_generated(cells.copy(), both_as(made, "kind"), origin_key="kind")


def both_as(made: Any, column: str) -> Any:
    out = made.copy()
    out.obs[column] = 1
    return out


def test_join_refuses_what_does_not_fit(cells: Any, made: Any, trained: Any) -> None:
    normal = cells.copy()
    normal.X = normal.X.log1p()
    with pytest.raises(DataError, match=r"log-normalised values.*raw counts.*layer="):
        pp.concat_generated(normal, made)
    normal.layers["counts"] = cells.X
    assert pp.concat_generated(normal, made, layer="counts").n_obs == cells.n_obs + made.n_obs
    with pytest.raises(GeneMismatchError, match="1 of 50 generated genes"):
        pp.concat_generated(cells[:, 1:].copy(), made)
    with pytest.raises(DataError, match="output='latent'"):
        pp.concat_generated(cells, trained.generate(perturbation="NTC", n_cells=2, output="latent", seed=0))
    with pytest.raises(DataError, match="marked as generated"):
        pp.concat_generated(made, made, origin_key="x")
    cells.obs["donor_id"] = cells.obs["donor_id"].cat.codes.astype(int).astype("category")
    with pytest.raises(DataError, match="make both strings"):
        pp.concat_generated(cells, made)


GROUPS = (
    [("targeting single sgRNA", "targeting", "STAT6-1", "STAT6", False)] * 6
    + [("targeting single sgRNA", "targeting", "JAK2-1", "JAK2", True)] * 2
    + [("NTC single sgRNA", "non-targeting", "NTC-086", None, False)] * 4
    + [("no sgRNA (>= 3 UMIs)", None, None, None, False)] * 3
    + [("multi sgRNA", "targeting", "multi-guide", "STAT6", True)] * 5
)


@pytest.fixture
def public() -> Any:
    obs = pd.DataFrame(GROUPS, columns=["guide_group", "guide_type", "guide_id", "perturbed_gene_id", "low_quality"])
    obs.index = [f"cell{i}" for i in range(len(obs))]
    counts = np.random.default_rng(0).poisson(2.0, (len(obs), 6)).astype(np.float32)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(6)]))


def test_public_columns_are_counted_and_kept(public: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = public.obs.copy()
    with caplog.at_level(logging.INFO, "scldm_cd4"):
        read = pp.read_perturb_seq(public, donor="D1", timepoint="Rest")
    facts = read.uns["perturb_seq"]
    numbers = {k: facts[f"n_{k}"] for k in ("cells", "low_quality", "no_guide", "multi_guide", "control", "dropped")}
    assert numbers == {"cells": 20, "low_quality": 7, "no_guide": 3, "multi_guide": 5, "control": 4, "dropped": 0}
    assert "n_multi_guide 5" in caplog.text
    pd.testing.assert_frame_equal(read.obs[before.columns], before)
    pd.testing.assert_frame_equal(public.obs, before)
    assert facts["columns_added"] == ["donor_id", "culture_condition", "perturbation"]
    assert read.obs["perturbation"].isna().sum() == 8
    assert (read.obs["perturbation"] == "NTC").sum() == 4
    with pytest.raises(DataError, match="missing or empty in 8"):
        CD4Model.setup_anndata(read, perturbation_key="perturbation", control="NTC")


def test_public_file_is_read_and_cells_are_dropped(public: Any, tmp_path: Any) -> None:
    path = tmp_path / "D2_Stim8hr.assigned_guide.h5ad"
    public.write_h5ad(path)
    drop = {"drop_low_quality": True, "drop_no_guide": True, "drop_multi_guide": True}
    for backed in (False, True):
        read = pp.read_perturb_seq(path, **drop, backed=backed)
        assert read.isbacked == backed
        assert read.n_obs == read.uns["perturb_seq"]["n_kept"] == 10
        assert set(read.obs["donor_id"]) == {"D2"}
        assert set(read.obs["culture_condition"]) == {"Stim8hr"}
        assert read.obs["perturbation"].astype(str).value_counts().to_dict() == {"STAT6": 6, "NTC": 4}
    with pytest.raises(DataError, match="pass donor="):
        pp.read_perturb_seq(public)
    with pytest.raises(DataError, match="differs from donor="):
        pp.read_perturb_seq(pp.read_perturb_seq(path)[:, :].copy()[:, :3].copy(), donor="D9")
    public.obs["low_quality"] = "perhaps"
    with pytest.raises(DataError, match="truth values"):
        pp.read_perturb_seq(public, donor="D1", timepoint="Rest")
    del public.obs["guide_type"]
    with pytest.raises(DataError, match="'guide_type' is not a column"):
        pp.read_perturb_seq(public, donor="D1", timepoint="Rest")


def test_import_is_quick() -> None:
    code = (
        "import sys, scldm_cd4, scldm_cd4.pp, scldm_cd4.pl; "
        "heavy = {'torch', 'lightning', 'scanpy', 'matplotlib', 'umap', 'ot', 'mudata'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_panel_refuses_what_is_no_count_and_what_is_not_in_memory(cells: Any, tmp_path: Any) -> None:
    pytest.importorskip("skmisc", reason="seurat_v3 needs scikit-misc")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    store = open_cells(tmp_path / "cells.h5ad")
    for there in (store, ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")):
        with pytest.raises(DataError, match="to_memory"):
            pp.select_panel(there, 10)
    assert list(pp.select_panel(store.to_memory(), 10)) == list(pp.select_panel(cells, 10))
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    with pytest.raises(DataError, match=r"raw counts, but X holds other values.*layer='counts'"):
        pp.select_panel(cells, 10)


def test_cells_in_files_keep_their_names(trained: Any, cells: Any, made: Any, tmp_path: Any) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    store = open_cells(tmp_path / "cells.h5ad")
    query, report = pp.prepare_query_anndata(store, trained)
    assert query.obs_names.equals(cells.obs_names)
    assert report == pp.prepare_query_anndata(cells, trained)[1]
    both, expected = (pp.concat_generated(real, made) for real in (store, cells))
    assert both.obs_names.equals(expected.obs_names)
    np.testing.assert_array_equal(both.X.toarray(), expected.X.toarray())


def test_panel_leaves_the_threads_of_torch_alone() -> None:
    pytest.importorskip("skmisc", reason="seurat_v3 needs scikit-misc")
    code = (
        "import torch; from scldm_cd4 import datasets, pp;"
        "pp.select_panel(datasets.synthetic_cd4(200, 50, n_perturbations=3), 10); print(torch.get_num_threads())"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("NUMBA_NUM_THREADS", None)  # numba then takes all cores
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"

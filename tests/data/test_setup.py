"""What setup_anndata accepts, what it refuses and says, and what it writes."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.setup import fit_registry, setup_anndata
from scldm_cd4.registry import Registry

N, G = 24, 6
KEYS = {"perturbation_key": "guide", "donor_key": "donor", "timepoint_key": "time", "control": "NTC"}


@pytest.fixture
def adata() -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(2.0, (N, G)) + (np.arange(G) == 0)
    obs = pd.DataFrame(
        {"guide": ["NTC", "GATA3", "STAT5B"] * 8, "donor": ["d1", "d2"] * 12, "time": ["Rest"] * 12 + ["Stim"] * 12},
        index=[f"c{i}" for i in range(N)],
    )
    var = pd.DataFrame({"symbol": list("uvwxyz"), "n": range(G)}, index=[f"ENSG{i}" for i in range(G)])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def refused(adata: ad.AnnData, **changes: object) -> str:
    with pytest.raises(DataError) as error:
        setup_anndata(adata, **{**KEYS, **changes})
    assert "_scldm_cd4" not in adata.uns
    return str(error.value)


def test_only_one_plain_dict_is_written(adata):
    before = adata.copy()
    setup_anndata(adata, **KEYS)
    assert adata.uns == {"_scldm_cd4": {"schema_version": 1, **KEYS}}
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert (adata.X != before.X).nnz == 0
    assert list(adata.layers) == list(adata.obsm) == []


def test_keys_not_given_are_absent_and_give_one_level(adata):
    setup_anndata(adata, perturbation_key="guide")
    assert adata.uns["_scldm_cd4"] == {"schema_version": 1, "perturbation_key": "guide"}
    registry = fit_registry(adata)
    assert registry.vocabulary == (1, 1, 3)
    assert registry.donor.levels == registry.timepoint.levels == ("all",)
    assert registry.control is None


def test_registry(adata):
    setup_anndata(adata, **KEYS)
    registry = fit_registry(adata)
    assert registry.genes == tuple(adata.var_names)
    assert registry.perturbation.levels == ("GATA3", "NTC", "STAT5B")
    assert registry.donor.column == "donor"
    assert registry.control == "NTC"
    assert registry.var == {"symbol": tuple("uvwxyz")}


def test_declaration_survives_files_and_subsets_but_not_concat(adata, tmp_path):
    setup_anndata(adata, **KEYS)
    expected = fit_registry(adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert fit_registry(ad.read_h5ad(tmp_path / "a.h5ad")) == expected
    assert fit_registry(adata[:, ::-1]).genes == expected.genes[::-1]
    assert fit_registry(adata[adata.obs["donor"] == "d1"].copy()).donor.levels == ("d1",)
    other = adata.copy()
    other.obs_names = other.obs_names + "x"
    with pytest.raises(DataError, match="setup_anndata.*concat"):
        fit_registry(ad.concat([adata, other]))


def test_subset_without_the_control(adata):
    setup_anndata(adata, **KEYS)
    with pytest.raises(DataError, match="control 'NTC'.*any more"):
        fit_registry(adata[adata.obs["guide"] != "NTC"])


def test_newer_declaration(adata):
    setup_anndata(adata, **KEYS)
    adata.uns["_scldm_cd4"]["schema_version"] = 2
    with pytest.raises(DataError, match="schema version 2"):
        fit_registry(adata)


@pytest.mark.parametrize(
    ("labels", "levels"),
    [
        (np.array([0, 1] * 12), ("0", "1")),
        (np.array([0, 1] * 12, dtype=np.int8), ("0", "1")),
        (np.array([1.0, 2.0] * 12), ("1", "2")),
        (np.array([0.5, 2.0] * 12), ("0.5", "2")),
        (np.array([0.1, 2.0] * 12, dtype=np.float32), ("0.1", "2")),
        (np.array([True, False] * 12), ("False", "True")),
        (["1.0", "2.0"] * 12, ("1.0", "2.0")),
        ([1, "b"] * 12, ("1", "b")),
        ([b"a", b"\xc3\x9f"] * 12, ("a", "ß")),
        (pd.Categorical(["z", "a"] * 12, categories=["unused", "z", "a"]), ("a", "z")),
        (pd.Categorical([3, 1] * 12, categories=[5, 3, 1]), ("1", "3")),
        (pd.array([1, 2] * 12, dtype="Int64"), ("1", "2")),
        (pd.array([True, False] * 12, dtype="boolean"), ("False", "True")),
        (pd.array(["x y", "細胞_1"] * 12, dtype="string"), ("x y", "細胞_1")),
    ],
)
def test_labels_of_every_dtype_become_sorted_strings(adata, labels, levels):
    adata.obs["donor"] = labels
    setup_anndata(adata, **KEYS)
    assert fit_registry(adata).donor.levels == levels


def test_control_of_an_integer_column(adata):
    adata.obs["guide"] = [0, 1, 2] * 8
    setup_anndata(adata, **{**KEYS, "control": 0})
    assert fit_registry(adata).control == "0"


@pytest.mark.parametrize("key", ["donor", "guide", "time"])
@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, ""])
def test_missing_labels(adata, key, missing):
    adata.obs[key] = adata.obs[key].astype(object)
    adata.obs.iloc[[2, 5], adata.obs.columns.get_loc(key)] = missing
    message = refused(adata)
    assert f"'{key}'" in message
    assert "2 of 24 cells" in message
    assert "Drop" in message
    assert "fillna" in message


def test_missing_in_categorical_and_nullable(adata):
    adata.obs["donor"] = pd.Categorical([*(["a"] * 23), None])
    assert "1 of 24" in refused(adata)
    adata.obs["donor"] = pd.array([*([1] * 23), None], dtype="Int64")
    assert "1 of 24" in refused(adata)


def test_labels_that_are_no_labels(adata):
    adata.obs["donor"] = [["a"]] * N
    assert "cannot be labels" in refused(adata)


@pytest.mark.parametrize(("values", "said"), [((True, 1), "True and 1"), ((0.0, "a", False), "False and 0")])
def test_truth_values_among_numbers_are_not_one_level_in_silence(adata, values, said):
    adata.obs["donor"] = pd.Series([values[i % len(values)] for i in range(N)], index=adata.obs_names, dtype=object)
    assert said in refused(adata)
    adata.obs["donor"] = adata.obs["donor"].map(lambda value: value if isinstance(value, str) else str(value))
    setup_anndata(adata, **KEYS)
    assert len(fit_registry(adata).donor) == len(values)


@pytest.mark.parametrize("name", ["is_generated", "size_factor", "n_train_cells", "n_train_contexts"])
def test_label_columns_of_names_that_generated_cells_have_for_something_else(adata, name):
    adata.obs[name] = adata.obs["donor"]
    assert "rename it" in refused(adata, donor_key=name)


def test_columns(adata):
    assert "Near matches: 'donor'" in refused(adata, donor_key="donr")
    assert "one obs column (a string)" in refused(adata, donor_key=["donor"])
    assert "perturbation_key" in refused(adata, perturbation_key=None)
    assert "two roles" in refused(adata, donor_key="guide")
    adata.obs = pd.concat([adata.obs, adata.obs[["donor"]]], axis=1)
    assert "2 columns named 'donor'" in refused(adata)


def test_control_must_be_a_level(adata):
    message = refused(adata, control="ntc")
    assert "'ntc'" in message
    assert "Near matches: 'NTC'" in message


def test_layers(adata):
    adata.layers["counts"] = adata.X
    assert "Near matches: 'counts'" in refused(adata, layer="count")
    adata.X = adata.X.copy()
    adata.X.data = np.log1p(adata.X.data)
    assert "layer='counts'" in refused(adata)
    setup_anndata(adata, **KEYS, layer="counts")
    assert fit_registry(adata).layer == "counts"


def test_hints_at_x_and_raw(adata):
    raw = adata.copy()
    adata.layers["lognorm"] = adata.X.log1p()
    assert "layer=None" in refused(adata, layer="lognorm")
    del adata.layers["lognorm"]
    adata.raw = raw
    adata.X = adata.X.log1p()
    message = refused(adata)
    exec(re.search(r"set (.+) and name this layer with layer='counts'", message)[1], {"adata": adata})
    setup_anndata(adata, **KEYS, layer="counts")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 0.5, 1.00001])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_a_single_bad_value_is_found_with_its_position(adata, value, form):
    counts = adata.X.toarray().astype(np.float64)
    counts[17, 4] = value
    adata.X = form(counts)
    message = refused(adata)
    assert "'c17' (row 17)" in message
    assert "'ENSG4'" in message
    assert "raw counts" in message


def test_bad_value_late_in_a_stream(adata, monkeypatch):
    monkeypatch.setattr("scldm_cd4.data.matrix.CHUNK", 5 * G)
    counts = adata.X.toarray()
    counts[[21, 22], 3] = -2
    adata.X = counts
    assert "-2 at cell 'c21' (row 21), gene 'ENSG3'" in refused(adata)


def test_no_numbers(adata):
    adata.X = adata.X.toarray().astype(np.complex64)
    assert "complex64" in refused(adata)
    adata.X = None
    assert "layer=" in refused(adata)


def test_cells_without_counts(adata):
    counts = adata.X.toarray()
    counts[[3, 9]] = 0
    adata.X = counts
    message = refused(adata)
    assert "2 of 24 cells have no counts" in message
    assert "row 3" in message
    assert "filter_cells" in message


def test_cells_with_too_many_counts(adata):
    counts = adata.X.toarray().astype(np.int64)
    counts[7, 1] = 1_000_001
    adata.X = counts
    assert "'c7' (row 7)" in refused(adata)


def test_too_small(adata):
    assert "2 cells" in refused(adata[:1].copy())
    assert "1 gene" in refused(adata[:, :0].copy())


def test_gene_names(adata):
    adata.var_names = ["a", "b", "a", "c", "b", "d"]
    message = refused(adata)
    assert "'a', 'b'" in message
    assert "var_names_make_unique" in message
    assert "gene_id_key" in message
    setup_anndata(adata, **KEYS, gene_id_key="symbol")
    registry = fit_registry(adata)
    assert registry.genes == tuple("uvwxyz")
    assert registry.var["var_names"] == ("a", "b", "a", "c", "b", "d")


def test_gene_id_key(adata):
    assert "Near matches: 'symbol'" in refused(adata, gene_id_key="symbols")
    adata.var["symbol"] = ["u", None, "w", "x", "y", "z"]
    assert "missing for 1 genes" in refused(adata, gene_id_key="symbol")


@pytest.mark.parametrize(("bad", "text"), [(0.0, "row 5"), (-1.0, "row 5"), (np.nan, "row 5"), ("many", "numbers")])
def test_size_factor_key(adata, bad, text):
    adata.obs["depth"] = pd.Series(100.0, index=adata.obs_names).astype(object)
    adata.obs.iloc[5, adata.obs.columns.get_loc("depth")] = bad
    assert text in refused(adata, size_factor_key="depth")
    adata.obs["depth"] = 100
    setup_anndata(adata, **KEYS, size_factor_key="depth")


def test_views_and_backed_files(adata, tmp_path):
    view = adata[::2]
    setup_anndata(view, **KEYS)
    assert fit_registry(view).vocabulary == (1, 2, 3)
    assert "_scldm_cd4" not in adata.uns
    adata.write_h5ad(tmp_path / "a.h5ad")
    before = (tmp_path / "a.h5ad").read_bytes()
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert "before subsetting" in refused(backed[::2])
    setup_anndata(backed, **KEYS)
    assert fit_registry(backed).vocabulary == (2, 2, 3)
    backed.file.close()
    assert (tmp_path / "a.h5ad").read_bytes() == before


def test_an_ordered_categorical_keeps_its_order(adata):
    adata.obs["time"] = pd.Categorical(["Rest", "Stim8hr", "Stim48hr"] * 8, ["0", "Rest", "Stim8hr", "Stim48hr"])
    setup_anndata(adata, **KEYS)
    assert fit_registry(adata).timepoint.levels == ("Rest", "Stim48hr", "Stim8hr")
    adata.obs["time"] = adata.obs["time"].cat.as_ordered()
    registry = fit_registry(adata)
    assert registry.timepoint.levels == ("Rest", "Stim8hr", "Stim48hr")
    codes = CellData.from_adata(adata, registry).labels[:, 1]
    assert registry.timepoint.decode(codes).tolist() == adata.obs["time"].tolist()
    assert Registry.from_dict(registry.to_dict()) == registry

"""Cells in files: same counts, labels and names as in memory, from h5ad, zarr, one file or several."""

import pickle

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scldm_cd4 import DataError, open_cells
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.rows import JoinedRows, MemoryRows, SparseRows
from scldm_cd4.data.setup import setup_anndata

KEYS = {"perturbation_key": "guide", "donor_key": "donor", "control": "NTC"}


def make(n: int = 60, *, donor: str = "d", genes: int = 8, seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (n, genes))
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "guide": pd.Categorical(rng.choice(["NTC", f"P{seed}"], n)),
            "donor": [f"{donor}{i % 2}" for i in range(n)],
            "depth": counts.sum(1),
        },
        index=[f"{donor}-cell{i}" for i in range(n)],
    )
    return ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=[f"G{i}" for i in range(genes)])
    )


def write(adata: ad.AnnData, path, **options) -> str:
    if path.suffix == ".zarr":
        with ad.settings.override(zarr_write_format=2):
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adata.write_zarr(path)
    else:
        adata.write_h5ad(path, **options)
    return str(path)


FORMS = {"csr": lambda x: x, "csc": lambda x: x.tocsc(), "dense": lambda x: x.toarray()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_a_file_gives_what_the_anndata_gives(tmp_path, ending, form):
    adata = make()
    adata.X = FORMS[form](adata.X)
    adata.layers["raw"] = adata.X.copy()
    store = open_cells(write(adata, tmp_path / f"a{ending}"))
    assert store.shape == adata.shape
    assert list(store.obs_names) == list(adata.obs_names)
    assert list(store.obs.columns) == ["guide", "donor", "depth"]
    for layer in (None, "raw"):
        for cells in (store, adata):
            setup_anndata(cells, **KEYS, layer=layer)
        mine, theirs = CellData.from_adata(store), CellData.from_adata(adata)
        assert mine.registry == theirs.registry
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        np.testing.assert_array_equal(mine.library, theirs.library)
        rows = np.array([7, 3, 3, 59, 0, 40, 41])
        assert (mine.counts(rows) != theirs.counts(rows)).nnz == 0
        assert mine.counts(slice(0, 60)).dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(rows=st.sets(st.integers(0, 499), max_size=40), joined=st.booleans())
def test_any_rows_are_read(rows, joined, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    adata = make(500)
    if not (path := folder / "rows.h5ad").exists():
        adata.write_h5ad(path)
    with h5py.File(path) as file:
        source = SparseRows(file["X"])
        dense = adata.X.toarray()
        if joined:
            source = JoinedRows([source, MemoryRows(dense)], [np.arange(8)[::-1].copy(), None], 8)
            dense = np.vstack([dense[:, ::-1], dense])
            rows = {2 * row for row in rows}
        wanted = np.array(sorted(rows), dtype=np.int64)
        np.testing.assert_array_equal(source.read(wanted).toarray(), dense[wanted])
        if not joined:
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(wanted).toarray(), dense[wanted])


def test_files_are_joined_by_gene_names_and_labels(tmp_path):
    first, second = make(40, donor="a"), make(30, donor="b", seed=1)
    paths = [write(first, tmp_path / "1.h5ad"), write(second[:, ::-1].copy(), tmp_path / "2.zarr")]
    store, whole = open_cells(paths), ad.concat([first, second])
    for cells in (store, whole):
        setup_anndata(cells, **KEYS)
    mine, theirs = CellData.from_adata(store), CellData.from_adata(whole)
    assert mine.registry.perturbation.levels == ("NTC", "P0", "P1")
    assert mine.registry.donor.levels == ("a0", "a1", "b0", "b1")
    np.testing.assert_array_equal(mine.labels, theirs.labels)
    assert list(mine.obs_names) == list(whole.obs_names)
    for rows in (np.arange(70), np.array([69, 2, 39, 40, 41])):
        assert (mine.counts(rows) != theirs.counts(rows)).nnz == 0


def test_other_genes_are_refused_or_left_out(tmp_path):
    paths = [write(make(40), tmp_path / "1.h5ad"), write(make(30, genes=6), tmp_path / "2.h5ad")]
    with pytest.raises(DataError, match=r"lacks 2 genes of .*1\.h5ad.*'G6', 'G7'.*join='inner'"):
        open_cells(paths)
    store = open_cells(paths, join="inner")
    assert list(store.var_names) == [f"G{i}" for i in range(6)]
    assert store.X.read(np.array([3, 45])).shape == (2, 6)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="not a file"):
        open_cells(tmp_path / "none.h5ad")
    (tmp_path / "text.h5ad").write_text("no")
    with pytest.raises(DataError, match="damaged"):
        open_cells(tmp_path / "text.h5ad")
    with pytest.raises(DataError, match="at least one"):
        open_cells([])
    with pytest.raises(DataError, match="open_cells"):
        setup_anndata(str(tmp_path / "text.h5ad"), **KEYS)
    path = write(make(), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indices"][5] = 999
    store = open_cells(path)
    with pytest.raises(DataError, match="damaged"):
        setup_anndata(store, **KEYS)


def test_a_bad_value_is_named(tmp_path):
    adata = make()
    adata.X.data[100] = 0.5
    store = open_cells(write(adata, tmp_path / "a.h5ad"))
    row = int(np.searchsorted(adata.X.indptr, 100, side="right")) - 1
    with pytest.raises(DataError, match=f"0.5 at cell 'd-cell{row}'"):
        setup_anndata(store, **KEYS)


def test_compressed_files_say_that_they_are_slow(tmp_path):
    fast = open_cells(write(make(), tmp_path / "fast.h5ad"))
    slow = open_cells(write(make(), tmp_path / "slow.h5ad", compression="gzip"))
    assert fast.X.slow == ""
    assert "gzip" in slow.X.slow
    assert "compression=" in slow.X.slow
    assert slow.X.block >= fast.X.block > 1


def test_some_cells_are_taken(tmp_path):
    whole = make()
    whole.obs.loc["d-cell7", "guide"] = "NTC"
    store, rows = open_cells(write(whole, tmp_path / "a.h5ad")), np.array([50, 3, 7, 8, 31])
    for cells in (store, whole):
        setup_anndata(cells, **KEYS, size_factor_key="depth")
    expected = CellData.from_adata(whole[rows].copy())
    view = whole[::-1]
    for cells, own in ((store, rows), (whole, rows), (view, 59 - rows)):
        found = CellData.from_adata(cells, expected.registry, rows=own)
        assert found.n_cells == 5
        assert list(found.obs_names) == list(expected.obs_names)
        assert found.identity == expected.identity
        assert (found.counts(np.array([4, 0, 1])) != expected.counts(np.array([4, 0, 1]))).nnz == 0
        for name in ("labels", "totals", "library"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    with pytest.raises(DataError, match="no cells"):
        CellData.from_adata(store, rows=rows[:0])
    store.obs["guide"] = "unknown"
    store.obs.loc[rows, "guide"] = "NTC"
    assert CellData.from_adata(store, expected.registry, rows=rows).n_cells == 5


def test_cells_of_files_are_read_into_memory(tmp_path):
    parts = [make(40, donor="a"), make(30, donor="b", seed=1)]
    store = open_cells([write(part, tmp_path / f"{i}.h5ad") for i, part in enumerate(parts)])
    store.obsm["X"] = np.arange(70)[:, None]
    whole = ad.concat(parts, merge="same")
    rows = np.array([69, 2, 41])
    for chosen in (rows, slice(5, 50), np.arange(70) % 2 == 0):
        cells, expected = store.to_memory(chosen), whole[chosen]
        assert list(cells.obs_names) == list(expected.obs_names)
        assert list(cells.obs["guide"].astype(str)) == list(expected.obs["guide"].astype(str))
        np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
        np.testing.assert_array_equal(cells.obsm["X"].ravel(), np.arange(70)[chosen])
    assert store.to_memory().shape == store.shape
    assert "layers" not in repr(store)

"""CellData: same counts from every kind of matrix, genes by name, labels as codes, queries that fit or are refused."""

import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scldm_cd4._errors import DataError, GeneMismatchError, UnknownCategoryError
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.matrix import expressed_batch
from scldm_cd4.data.setup import fit_registry, setup_anndata
from scldm_cd4.registry import Registry

N, G = 30, 8
KEYS = {"perturbation_key": "guide", "donor_key": "donor", "control": "NTC"}


def make(seed: int = 0) -> ad.AnnData:
    counts = np.random.default_rng(seed).poisson(1.0, (N, G))
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {"guide": ["NTC", "GATA3", "STAT5B"] * 10, "donor": ["d1", "d2"] * 15}, index=[f"c{i}" for i in range(N)]
    )
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(G)]}, index=[f"ENSG0{i}" for i in range(G)])
    out = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
    setup_anndata(out, **KEYS)
    return out


@pytest.fixture
def adata() -> ad.AnnData:
    return make()


@pytest.fixture
def registry(adata) -> Registry:
    return fit_registry(adata)


def messy(dense: np.ndarray) -> sp.csr_matrix:
    """Return CSR with descending indices, explicit zeros and every count written as two entries."""
    rows, columns = np.nonzero(dense)
    values = dense[rows, columns]
    order = np.lexsort((-columns, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    indptr = np.searchsorted(rows, np.arange(len(dense) + 1)) * 2
    data = np.stack([values - 1, np.ones_like(values)], axis=1).ravel()
    return sp.csr_matrix((data, np.repeat(columns, 2), indptr), shape=dense.shape)


def with_int64_indices(matrix: sp.spmatrix) -> sp.spmatrix:
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return matrix


FORMS = {
    "csr": lambda x: sp.csr_matrix(x.astype(np.float32)),
    "csr float64, int64 indices": lambda x: with_int64_indices(sp.csr_matrix(x.astype(np.float64))),
    "csc int64": lambda x: sp.csc_matrix(x.astype(np.int64)),
    "csr uint8": lambda x: sp.csr_matrix(x.astype(np.uint8)),
    "csr array": lambda x: sp.csr_array(x.astype(np.float32)),
    "messy": messy,
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "int16": lambda x: x.astype(np.int16),
    "uint32, by columns": lambda x: np.asfortranarray(x.astype(np.uint32)),
}


def assert_standard(matrix: sp.csr_matrix, expected: np.ndarray) -> None:
    assert (matrix.format, matrix.dtype, matrix.indices.dtype) == ("csr", np.float32, np.int32)
    standard = sp.csr_matrix(expected.astype(np.float32))
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(matrix, part), getattr(standard, part))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_csr(adata, registry, form):
    dense = adata.X.toarray()
    adata.X = FORMS[form](dense)
    kept = adata.X.copy()
    cells = CellData.from_adata(adata, registry)
    assert_standard(cells.counts(np.arange(N)), dense)
    rows = np.array([7, 3, 3, 29, 0])
    assert_standard(cells.counts(rows), dense[rows])
    np.testing.assert_array_equal(cells.library, dense.sum(axis=1))
    assert cells.library.dtype == np.float64
    for part in ("data", "indices", "indptr") if sp.issparse(kept) else ("data",):
        np.testing.assert_array_equal(getattr(adata.X, part), getattr(kept, part))  # the input is not touched


def test_truth_values_are_counts(adata):
    adata.X = adata.X.toarray() > 0
    setup_anndata(adata, **KEYS)
    assert_standard(CellData.from_adata(adata).counts(slice(0, N)), adata.X)


@pytest.mark.parametrize("form", ["csr", "csc int64", "float64"])
def test_backed_files_and_views_of_them(adata, registry, tmp_path, form):
    dense = adata.X.toarray()
    adata.X = FORMS[form](dense)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    cells = CellData.from_adata(backed, registry)
    rows = np.array([7, 3, 3, 29, 0])
    assert_standard(cells.counts(rows), dense[rows])
    assert_standard(cells.counts(np.arange(N) % 2 == 0), dense[::2])
    view = CellData.from_adata(backed[::-2, ::-1], registry)
    assert_standard(view.counts(np.array([1, 0, 14])), dense[::-2][[1, 0, 14]])
    mask = np.asarray(adata.obs["donor"] == "d2")
    assert_standard(CellData.from_adata(backed[mask], registry).counts(slice(2, 5)), dense[mask][2:5])
    backed.file.close()


def test_memory_of_backed_reads_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for n in (4_000, 16_000):
        counts = sp.csr_matrix(np.ones((n, 400), dtype=np.float32))
        big = ad.AnnData(counts, obs=pd.DataFrame({"p": ["a"] * n}, index=map(str, range(n))))
        big.write_h5ad(tmp_path / f"{n}.h5ad")
        backed = ad.read_h5ad(tmp_path / f"{n}.h5ad", backed="r")
        setup_anndata(big, perturbation_key="p")
        cells = CellData.from_adata(backed, fit_registry(big))
        del big, counts
        tracemalloc.start()
        for start in range(0, n, n // 10):
            cells.counts(np.arange(start, n, n // 50)[::-1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        backed.file.close()
    assert peaks[1] < 1.5 * peaks[0]


def test_views_and_subsets(adata, registry):
    dense = adata.X.toarray()
    view = adata[[5, 1, 9], ::-1]
    assert_standard(CellData.from_adata(view, registry).counts(np.arange(3)), dense[[5, 1, 9]])
    assert view.is_view
    one = CellData.from_adata(adata[4], registry)
    assert (one.n_cells, one.labels.tolist()) == (1, [[0, 0, 0]])


@pytest.mark.parametrize("rows", [[30], [-1], [0, 99]])
def test_rows_out_of_range(adata, registry, rows):
    with pytest.raises(IndexError, match=r"0\.\.29"):
        CellData.from_adata(adata, registry).counts(np.array(rows))


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(G)),
    form=st.sampled_from(sorted(FORMS)),
    extra=st.integers(0, 3),
    rows=st.lists(st.integers(0, N - 1), max_size=8),
)
def test_gene_order_dtype_sparsity_and_extra_genes_change_nothing(order, form, extra, rows):
    reference = make()
    registry = fit_registry(reference)
    dense = reference.X.toarray()
    values = np.concatenate([dense[:, order], np.ones((N, extra))], axis=1)
    names = [*reference.var_names[list(order)], *(f"other{i}" for i in range(extra))]
    place = np.random.default_rng(len(rows)).permutation(G + extra)
    query = ad.AnnData(FORMS[form](values[:, place]), obs=reference.obs.copy())
    query.var_names = np.array(names)[place]
    cells = CellData.from_adata(query, registry)
    assert_standard(cells.counts(np.array(rows, dtype=int)), dense[rows])
    np.testing.assert_array_equal(cells.library, dense.sum(axis=1))
    assert (cells.report.n_found, cells.report.n_missing, cells.report.n_extra) == (G, 0, extra)


def test_labels_are_codes_in_the_order_of_roles(adata, registry):
    cells = CellData.from_adata(adata, registry)
    assert cells.labels.dtype == np.int64
    assert registry.donor.decode(cells.labels[:, 0]).tolist() == adata.obs["donor"].tolist()
    assert set(cells.labels[:, 1]) == {0}
    assert registry.perturbation.decode(cells.labels[:, 2]).tolist() == adata.obs["guide"].tolist()
    assert cells.obs_names.tolist() == adata.obs_names.tolist()


def test_category_order_of_the_query_plays_no_part(adata, registry):
    expected = CellData.from_adata(adata, registry).labels
    query = adata.copy()
    query.obs["guide"] = pd.Categorical(query.obs["guide"], categories=["x", "STAT5B", "NTC", "GATA3"])
    np.testing.assert_array_equal(CellData.from_adata(query, registry).labels, expected)
    subset = CellData.from_adata(query[query.obs["guide"] == "STAT5B"], registry)
    assert set(subset.labels[:, 2]) == {registry.perturbation.encode("STAT5B")[0]}


def test_integer_labels_of_training_fit_float_labels_of_a_query(adata):
    adata.obs["donor"] = [1, 2] * 15
    setup_anndata(adata, **KEYS)
    registry = fit_registry(adata)
    query = adata.copy()
    query.obs["donor"] = query.obs["donor"].astype(float)
    np.testing.assert_array_equal(
        CellData.from_adata(query, registry).labels, CellData.from_adata(adata, registry).labels
    )


def test_unknown_and_missing_labels(adata, registry):
    query = adata.copy()
    query.obs["guide"] = query.obs["guide"].replace("GATA3", "GATA33")
    with pytest.raises(UnknownCategoryError, match="'GATA33'.*column 'guide'.*'GATA3'"):
        CellData.from_adata(query, registry)
    assert CellData.from_adata(query, registry, labels=False).labels is None
    del query.obs["guide"], query.uns["_scldm_cd4"]
    with pytest.raises(DataError, match="perturbation_key='guide' is not a column"):
        CellData.from_adata(query, registry)
    assert CellData.from_adata(query, registry, labels=False).n_cells == N


def test_a_query_may_declare_its_own_columns(adata, registry):
    query = adata.copy()
    query.obs = query.obs.rename(columns={"guide": "target"})
    query.layers["raw"] = query.X.copy()
    query.X = query.X.log1p()
    setup_anndata(query, perturbation_key="target", donor_key="donor", layer="raw")
    cells = CellData.from_adata(query, registry)
    assert_standard(cells.counts(slice(0, N)), adata.X.toarray())
    np.testing.assert_array_equal(cells.labels, CellData.from_adata(adata, registry).labels)


def test_undeclared_without_registry(adata):
    del adata.uns["_scldm_cd4"]
    with pytest.raises(DataError, match="setup_anndata"):
        CellData.from_adata(adata)


def test_missing_genes(adata, registry):
    query = adata[:, [0, 3, 4, 5, 6, 7]]
    with pytest.raises(GeneMismatchError, match=r"6 of the model's 8 genes found, 2 missing \(25.0%: ENSG01, ENSG02\)"):
        CellData.from_adata(query, registry)
    with pytest.warns(UserWarning, match=r"25\.0%"):
        cells = CellData.from_adata(query, registry, allow_missing=True)
    assert cells.present.tolist() == [True, False, False, True, True, True, True, True]
    dense = adata.X.toarray() * cells.present
    assert_standard(cells.counts(np.arange(N)), dense)
    np.testing.assert_array_equal(cells.library, dense.sum(axis=1))
    with pytest.raises(GeneMismatchError, match="At most 50%"):
        CellData.from_adata(adata[:, :3], registry, allow_missing=True)


def test_symbols_against_identifiers(adata, registry):
    query = adata.copy()
    query.var["ensembl"] = query.var_names
    query.var_names = query.var["symbol"].to_numpy()
    with pytest.raises(GeneMismatchError, match="gene_id_key='ensembl'"):
        CellData.from_adata(query, registry)
    setup_anndata(query, **KEYS, gene_id_key="ensembl")
    assert CellData.from_adata(query, registry).report.n_missing == 0
    query.var = pd.DataFrame(index=query.var_names)
    del query.uns["_scldm_cd4"]
    with pytest.raises(GeneMismatchError, match="'symbol'.*'S0'.*'ENSG00'"):
        CellData.from_adata(query, registry)
    query.var_names = [f"other{i}" for i in range(G)]
    with pytest.raises(GeneMismatchError, match="Ensembl identifiers, those of the data gene symbols"):
        CellData.from_adata(query, registry)
    query.var_names = [f"{gene}.{i}" for i, gene in enumerate(registry.genes)]
    with pytest.raises(GeneMismatchError, match="version suffix"):
        CellData.from_adata(query, registry)


def test_gene_id_key_of_the_model_is_used_where_the_query_has_it(adata):
    setup_anndata(adata, **KEYS, gene_id_key="symbol")
    registry = fit_registry(adata)
    query = adata.copy()
    del query.uns["_scldm_cd4"]
    assert CellData.from_adata(query[:, ::-1], registry).report.n_missing == 0
    query.var = pd.DataFrame(index=query.var["symbol"].to_numpy())
    assert CellData.from_adata(query, registry).report.n_missing == 0


def test_duplicate_names(adata, registry):
    query = adata.copy()
    query.obs_names = ["same"] * N
    assert CellData.from_adata(query, registry).n_cells == N
    query.var_names = ["ENSG00"] * 2 + list(query.var_names[2:])
    with pytest.raises(DataError, match="'ENSG00'"):
        CellData.from_adata(query, registry)


def test_bad_query_counts(adata, registry):
    query = adata.copy()
    query.X = query.X.log1p()
    query.layers["counts"] = adata.X
    with pytest.raises(DataError, match="layer='counts'"):
        CellData.from_adata(query, registry)
    query = adata.copy()
    query.X[5, 2] = np.nan
    with pytest.raises(DataError, match="nan at cell 'c5' .row 5., gene 'ENSG02'"):
        CellData.from_adata(query[:, ::-1], registry)
    dense = adata.X.toarray()
    dense[[1, 2]] = 0
    query.X = dense
    with pytest.raises(DataError, match="2 of 30 cells have no counts"):
        CellData.from_adata(query, registry)
    with pytest.raises(DataError, match="no cells"):
        CellData.from_adata(adata[:0], registry)


def test_size_factor_key(adata):
    adata.obs["depth"] = np.arange(1, N + 1)
    setup_anndata(adata, **KEYS, size_factor_key="depth")
    np.testing.assert_array_equal(CellData.from_adata(adata).library, np.arange(1.0, N + 1))


def test_report_is_a_sentence(adata, registry):
    assert str(CellData.from_adata(adata, registry).report) == "8 of the model's 8 genes found."
    assert repr(CellData.from_adata(adata)) == "CellData: 30 cells x 8 genes; 8 of the model's 8 genes found."


def test_damaged_sparse_matrix_is_refused(adata, registry):
    adata.X.indices[3] = 1000
    with pytest.raises(DataError, match="damaged"):
        CellData.from_adata(adata, registry)


@pytest.mark.parametrize("seed", range(3))
def test_expressed_batch_holds_exactly_the_counts(seed):
    dense = np.random.default_rng(seed).poisson(0.7, (9, 13)).astype(np.float32)
    dense[4] = 0
    genes, counts = expressed_batch(sp.csr_matrix(dense))
    assert (genes.dtype, counts.dtype) == (np.int64, np.float32)
    assert genes.shape == counts.shape == (9, int((dense > 0).sum(axis=1).max()))
    back = np.zeros((9, 14), dtype=np.float32)
    np.put_along_axis(back, genes, counts, axis=1)
    np.testing.assert_array_equal(back[:, 1:], dense)
    assert ((genes == 0) == (counts == 0)).all()
    assert (np.diff((genes > 0).astype(int), axis=1) <= 0).all()  # padding is on the right


def test_expressed_batch_of_explicit_zeros_and_empty_cells():
    explicit = sp.csr_matrix((np.zeros(2, dtype=np.float32), [0, 3], [0, 1, 2]), shape=(2, 4))
    genes, counts = expressed_batch(explicit)
    assert genes.tolist() == counts.tolist() == [[0], [0]]
    assert explicit.nnz == 2
    assert expressed_batch(sp.csr_matrix((0, 4)))[0].shape == (0, 1)


def test_real_cells(shared_dir):
    real = ad.read_h5ad(shared_dir / "data/papalexi_dev.h5ad")
    setup_anndata(real, perturbation_key="perturbation", donor_key="replicate", control="NT")
    cells = CellData.from_adata(real)
    assert (cells.n_cells, cells.n_genes, cells.registry.vocabulary) == (14055, 299, (2, 1, 26))
    np.testing.assert_array_equal(cells.library, np.asarray(real.X.sum(axis=1)).ravel())

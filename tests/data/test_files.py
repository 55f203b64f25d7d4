"""Opening h5ad files: good ones come back whole, bad ones are refused at once and before allocation."""

import time

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from scldm_cd4 import _errors
from scldm_cd4.data.files import open_h5ad


@pytest.fixture
def adata() -> ad.AnnData:
    counts = sp.random(30, 12, density=0.4, random_state=0, format="csr", dtype=np.float32)
    counts.data[:] = np.ceil(counts.data * 5)
    out = ad.AnnData(counts)
    out.obs["odd | name"] = [f"β {i}" for i in range(30)]
    out.obs["shared"] = np.array(["a", "b"] * 15)
    out.var["shared"] = np.array(["x", "y"] * 6)
    return out


@pytest.fixture
def path(adata, tmp_path):
    target = tmp_path / "cells with space.h5ad"
    adata.write_h5ad(target)
    return target


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_good_file_comes_back_whole(adata, tmp_path, kind, backed):
    expected = adata.X.toarray()
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": expected}[kind]
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    back = open_h5ad(tmp_path / "a.h5ad", backed=backed)
    assert back.isbacked == backed
    values = back[:].to_memory().X if backed else back.X
    np.testing.assert_array_equal(values.toarray() if sp.issparse(values) else values, expected)
    assert back.obs["shared"].tolist() == adata.obs["shared"].tolist()
    assert back.var["shared"].tolist() == adata.var["shared"].tolist()


def test_missing_file_and_other_kinds(tmp_path):
    with pytest.raises(_errors.DataError, match="not a file"):
        open_h5ad(tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text("no hdf5")
    with pytest.raises(_errors.DataError, match="cannot be read as h5ad"):
        open_h5ad(tmp_path / "text.h5ad")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_file_is_refused_quickly(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    start = time.monotonic()
    with pytest.raises(_errors.DataError, match="damaged, truncated"):
        open_h5ad(path)
    assert time.monotonic() - start < 2


def test_external_link(path, tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["x"] = np.zeros((30, 12), dtype=np.float32)
    with h5py.File(path, "a") as file:
        file["layers/stolen"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/x")
    with pytest.raises(_errors.DataError, match="/layers/stolen is a link"):
        open_h5ad(path)


def test_external_storage(path, tmp_path):
    (tmp_path / "secret.txt").write_bytes(bytes(30 * 12))
    with h5py.File(path, "a") as file:
        file["layers"].create_dataset(
            "stolen", (30, 12), "u1", external=[(str(tmp_path / "secret.txt"), 0, h5py.h5f.UNLIMITED)]
        )
    with pytest.raises(_errors.DataError, match="another file"):
        open_h5ad(path)


def test_virtual_dataset(path, tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["x"] = np.zeros((30, 12), dtype=np.float32)
    layout = h5py.VirtualLayout((30, 12), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (30, 12))
    with h5py.File(path, "a") as file:
        file["layers"].create_virtual_dataset("stolen", layout)
    with pytest.raises(_errors.DataError, match="another file"):
        open_h5ad(path)


def test_a_cycle_of_links_ends(path):
    with h5py.File(path, "a") as file:
        file["uns/loop"] = file["uns"]
    with pytest.raises(_errors.DataError, match="linked twice"):
        open_h5ad(path)


@pytest.mark.parametrize("backed", [False, True])
def test_claimed_terabyte(path, backed):
    with h5py.File(path, "a") as file:
        del file["X"]
        file.create_dataset("X", (30, 10**10), "f4", chunks=(1, 10**6))
    start = time.monotonic()
    with pytest.raises(_errors.DataError, match="claims shape"):
        open_h5ad(path, backed=backed)
    assert time.monotonic() - start < 2


def test_decompression_bomb(path):
    with h5py.File(path, "a") as file:
        bomb = file["uns"].create_dataset("bomb", (10**9,), "u1", chunks=(10**6,), compression="gzip")
        bomb[:10] = 1
    with pytest.raises(_errors.DataError, match="claims shape"):
        open_h5ad(path)


def test_giant_chunk(path):
    with h5py.File(path, "a") as file:
        file["uns"].create_dataset("bomb", (10,), "u1", chunks=(2**31,), maxshape=(None,))
    with pytest.raises(_errors.DataError, match="chunks"):
        open_h5ad(path)


def test_size_limit_leaves_backed_x_out(adata, tmp_path):
    adata.X = np.ones((30, 12)) * np.arange(12)
    adata.layers["big"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(_errors.DataError, match="max_bytes"):
        open_h5ad(tmp_path / "a.h5ad", max_bytes=5000)
    with pytest.raises(_errors.DataError, match="/layers/big"):
        open_h5ad(tmp_path / "a.h5ad", backed=True, max_bytes=2000)
    del adata.layers["big"]
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert open_h5ad(tmp_path / "b.h5ad", backed=True, max_bytes=2800).shape == (30, 12)


@pytest.mark.parametrize(
    ("part", "position", "value", "message"),
    [
        ("indices", 3, 12, "outside 0..11"),
        ("indices", 0, -1, "outside 0..11"),
        ("indptr", 5, 10**6, "ascend"),
        ("indptr", -1, 10**6, "span"),
        ("indptr", 0, 1, "span"),
    ],
)
def test_sparse_indices_out_of_bounds(path, part, position, value, message):
    with h5py.File(path, "a") as file:
        values = file["X"][part][:]
        values[position] = value
        file["X"][part][:] = values
    with pytest.raises(_errors.DataError, match=message):
        open_h5ad(path)


def test_sparse_parts_of_unequal_length(path):
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = np.array([31, 12])
    with pytest.raises(_errors.DataError, match="does not fit"):
        open_h5ad(path)


def test_the_file_is_not_changed(path):
    before = path.read_bytes()
    open_h5ad(path)
    open_h5ad(path, backed=True).file.close()
    assert path.read_bytes() == before


def test_flipped_bytes_raise_our_error_or_read(path):
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(20):
        damaged = bytearray(content)
        for at in generator.integers(0, len(content), 4):
            damaged[at] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            outcomes.add(type(open_h5ad(path)))
        except _errors.DataError as error:
            outcomes.add(type(error))
    assert outcomes == {ad.AnnData, _errors.DataError}

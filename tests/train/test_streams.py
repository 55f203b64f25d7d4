"""Training from files: same batches whoever reads them, resume in the middle of an epoch, latents kept on disk."""

import json
import warnings

import numpy as np
import pytest
import torch

from scldm_cd4 import CD4Model, DataError, open_cells
from scldm_cd4.data.cells import CellData
from scldm_cd4.train import loaders
from scldm_cd4.train.latent_cache import cached_latents
from scldm_cd4.train.latents import encode_rows
from scldm_cd4.train.launch import processes, require_launcher
from scldm_cd4.train.loaders import CountBatches, make_loader

KEYS = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint", "control": "NTC"}


@pytest.fixture
def stored(simulated, tmp_path):
    plain = simulated.copy()
    plain.write_h5ad(tmp_path / "cells.h5ad")
    store = open_cells(tmp_path / "cells.h5ad")
    CD4Model.setup_anndata(store, **KEYS)
    return store


@pytest.fixture
def batches(stored, monkeypatch) -> CountBatches:
    monkeypatch.setattr(loaders, "FETCH_CELLS", 64)
    monkeypatch.setattr(loaders, "FETCH_BLOCKS", 1)
    return CountBatches(CellData.from_adata(stored), np.arange(10, 290), expressed=True, shown=(0.5, 0.9), seed=3)


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(map(torch.equal, x.values(), y.values())) for x, y in zip(a, b, strict=True)
    )


def test_an_epoch_from_a_file_has_every_cell_once(batches):
    loader = make_loader(batches, 16, seed=1)
    totals = np.sort(torch.cat([batch["counts"].sum(1) + batch["target"].sum(1) for batch in loader]).numpy())
    np.testing.assert_array_equal(totals, np.sort(batches.cells.library[10:290]))
    assert len(loader) == 18


def test_workers_and_resume_change_no_batch(batches):
    whole = list(make_loader(batches, 16, seed=1))
    loader = make_loader(batches, 16, seed=1)
    loader.load_state_dict({"epoch": 0, "done": 7})
    assert equal(list(loader), whole[7:])
    second = list(loader)
    assert len(second) == len(whole)
    assert equal(list(make_loader(batches, 16, seed=1, num_workers=2)), whole)


def test_a_file_trains_the_model_that_memory_trains(stored, simulated, quick):
    latents = []
    for cells in (stored, simulated):
        model = CD4Model(cells, "tiny", **quick)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The decoder makes little use")
            model.train(seed=0, max_epochs=3)
        latents.append(model.get_latent())
    assert latents[0].shape == latents[1].shape  # the order of the cells differs, so the weights do too
    assert np.isfinite(latents[0]).all()
    np.testing.assert_allclose(model.get_latent(stored), latents[1], atol=1e-5)


def test_latents_on_disk_are_kept_over_a_stop(trained, simulated, tmp_path, monkeypatch):
    monkeypatch.setattr("scldm_cd4.train.latent_cache.BLOCK", 64)
    cells, rows, path = CellData.from_adata(simulated), np.arange(0, 300, 2), tmp_path / "latents_train.bin"
    vae = trained._state.vae
    expected = encode_rows(vae, cells, rows)
    assert torch.equal(cached_latents(vae, cells, rows, path), expected)
    encoded = []

    def counted(vae, cells, rows, **options):
        encoded.append(len(rows))
        return encode_rows(vae, cells, rows, **options)

    monkeypatch.setattr("scldm_cd4.train.latent_cache.encode_rows", counted)
    assert torch.equal(cached_latents(vae, cells, rows, path), expected)
    assert encoded == []
    with path.open("r+b") as handle:  # damage one block, and forget the last as a stop would
        handle.write(b"\x01\x02\x03")
    record = path.with_name("latents_train.0.json")
    known = json.loads(record.read_text())
    del known["crc"]["2"]
    record.write_text(json.dumps(known))
    assert torch.equal(cached_latents(vae, cells, rows, path), expected)
    assert encoded == [64, 22]
    cached_latents(vae, cells, rows[:100], path)  # other cells
    assert sum(encoded) == 64 + 22 + 100


def test_several_devices_in_one_process_are_refused(monkeypatch):
    for devices in (2, [0, 1], -1):
        with pytest.raises(DataError, match="torchrun --nproc-per-node"):
            require_launcher(devices)
    for devices in (1, "auto", [3]):
        require_launcher(devices)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(DataError, match="RANK is not set"):
        processes()
    monkeypatch.setenv("RANK", "2")
    assert processes() == (2, 4)

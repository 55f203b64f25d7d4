import math
import pickle

import numpy as np
import pytest
import torch

from scldm_cd4._errors import CheckpointError
from scldm_cd4.train import checkpoint_io
from scldm_cd4.train.checkpoint_io import read_state, recorded_seed, write_state

STATE = {
    "weights": {"a.b": torch.arange(6.0).view(2, 3), "scalar": torch.tensor(2)},
    "optimiser": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"betas": (0.9, 0.99), "fused": True}]},
    "rng": torch.get_rng_state(),
    "array": np.arange(3),
    "none": None,
    "best": math.inf,
    "text": "$tensor ü",
    "$odd": {"$tensor": "not one"},
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_state_comes_back_as_it_was(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for owner, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dump")):
        monkeypatch.setattr(owner, name, refuse)
    path = tmp_path / "a folder" / "state.safetensors"
    write_state(STATE, path)
    assert same(STATE | {"array": torch.arange(3)}, read_state(path))
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_tensors_that_share_memory_are_kept_apart(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    write_state({"base": base, "view": base[:, 1], "turned": base.T}, tmp_path / "s")
    back = read_state(tmp_path / "s")
    assert torch.equal(back["turned"], base.T)
    assert torch.equal(back["view"], base[:, 1])


def test_an_object_is_refused_with_its_place(tmp_path):
    with pytest.raises(CheckpointError, match=r"object at state/x/0"):
        write_state({"x": [object()]}, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_last_state(tmp_path, monkeypatch):
    path = tmp_path / "s"
    write_state({"x": torch.ones(2)}, path)

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*MiB are free"):
        write_state({"x": torch.zeros(2)}, path)
    assert torch.equal(read_state(path)["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "noise", "foreign", "newer"])
def test_unusable_files_are_refused(tmp_path, damage, monkeypatch):
    path = tmp_path / "s"
    write_state(STATE, path)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, path)
    elif damage == "newer":
        monkeypatch.setattr(checkpoint_io, "VERSION", 2)
    else:
        path.write_bytes({"short": data[: len(data) // 2], "empty": b"", "noise": b"\x00" * 64 + data}[damage])
    with pytest.raises(CheckpointError):
        read_state(path)


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no record"):
        recorded_seed(tmp_path)

"""The folder of a saved model: round trip, damage, crashes and hostile contents."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from scldm_cd4._errors import CheckpointError
from scldm_cd4.checkpoint import native
from scldm_cd4.checkpoint.native import FILES, load_folder, save_folder


def contents(value: float = 1.0) -> dict:
    table = torch.full((3, 2), value)
    return {
        "tensors": {"vae.a": table, "vae.tied": table, "dit.row": table[1], "dit.step": torch.tensor(3)},
        "config": {"vae": {"width": 8, "sizes": (1, 2)}},
        "registry": {"genes": ["GATA3", "β_2 m"], "counts": {"A_B": {"C": {"D": np.int64(4)}}}},
        "history": {"loss": np.array([value, np.nan, np.inf], np.float32)},
        "readme": "# A model\n",
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_folder(tmp_path / "my model", **contents())


def seal(folder: Path) -> None:
    """Make the manifest agree with the files, as somebody with bad intent would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in FILES:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(folder):
    saved = load_folder(folder)
    for name, tensor in contents()["tensors"].items():
        assert torch.equal(saved.tensors[name], tensor)
        assert saved.tensors[name].dtype == tensor.dtype
    assert saved.config == {"vae": {"width": 8, "sizes": [1, 2]}}
    assert saved.registry == {"genes": ["GATA3", "β_2 m"], "counts": {"A_B": {"C": {"D": 4}}}}
    assert saved.history == {"loss": [1.0, None, None]}
    assert saved.manifest["format_version"] == native.FORMAT_VERSION
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    assert [p.name for p in folder.parent.iterdir()] == ["my model"]


def test_the_same_model_gives_the_same_bytes(folder, tmp_path):
    other = save_folder(tmp_path / "deeper" / "still" / "again", **contents())
    assert all((folder / n).read_bytes() == (other / n).read_bytes() for n in (*FILES, "manifest.json"))


def test_tensors_survive_the_folder_being_replaced(folder):
    saved = load_folder(folder)
    save_folder(folder, **contents(2.0), overwrite=True)
    assert torch.equal(saved.tensors["vae.a"], torch.full((3, 2), 1.0))
    assert torch.equal(load_folder(folder).tensors["vae.a"], torch.full((3, 2), 2.0))


def test_nothing_is_replaced_unasked(folder, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_folder(folder, **contents(2.0))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_folder(folder, **contents(2.0), overwrite=True)
    (tmp_path / "home").mkdir()
    save_folder(tmp_path / "home", **contents())  # an empty folder is free
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cells.h5ad").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("data", "file"):
        with pytest.raises(FileExistsError):
            save_folder(tmp_path / name, **contents(), overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save_folder(tmp_path / "file" / "model", **contents())
    assert (tmp_path / "data" / "cells.h5ad").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    save_folder(tmp_path / "latest", **contents(2.0), overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert load_folder(folder).tensors["vae.a"][0, 0] == 2.0


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "directory"])
def test_a_missing_file_is_named(folder, name, how):
    (folder / name).unlink()
    if how == "directory":
        (folder / name).mkdir()
    if how == "directory" and name == "README.md":
        assert load_folder(folder).manifest  # nothing is read from it
        return
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_folder(folder)


@pytest.mark.parametrize("name", sorted({*FILES, "manifest.json"} - {"README.md"}))
def test_truncated_files_are_named(folder, name):
    whole = (folder / name).read_bytes()
    for n in (0, 1, len(whole) // 2, len(whole) - 2):
        (folder / name).write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_folder(folder)


def test_flipped_bits_are_found(folder):
    rng = random.Random(0)
    for name in sorted({*FILES} - {"README.md"}):
        whole = (folder / name).read_bytes()
        for _ in range(25):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"{name}.*damaged"):
                load_folder(folder)
        (folder / name).write_bytes(whole)


def test_a_damaged_manifest_raises_our_error_or_changes_nothing(folder):
    rng, good = random.Random(1), load_folder(folder)
    whole = (folder / "manifest.json").read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (folder / "manifest.json").write_bytes(damaged)
        try:
            saved = load_folder(folder)
        except CheckpointError:
            refused += 1
        else:
            assert (saved.config, saved.registry, saved.history) == (good.config, good.registry, good.history)
            assert all(torch.equal(saved.tensors[k], v) for k, v in good.tensors.items())
    assert refused > 200


def test_consistent_nonsense_raises_our_error(folder):
    """Files that agree with their checksums and still make no sense."""
    whole = {name: (folder / name).read_bytes() for name in FILES}
    nonsense = [
        b"", b"[1, 2]", b"null", b"{", b'{"a": ' * 100_000, b"\xff\xfe", b"9" * 10_000,
        (2**62).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}'[:60] + b"0000",
    ]  # fmt: skip
    for name in ("model.safetensors", "config.json"):
        for data in nonsense:
            (folder / name).write_bytes(data)
            seal(folder)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                load_folder(folder)
        (folder / name).write_bytes(whole[name])


def test_unlisted_files_are_named_and_hidden_ones_ignored(folder):
    (folder / ".gitattributes").write_text("")
    load_folder(folder)
    (folder / "weights.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"weights\.pkl"):
        load_folder(folder)


def test_the_readme_may_be_edited(folder):
    (folder / "README.md").write_text("# Our model, with a longer text")
    assert load_folder(folder).config["vae"]["width"] == 8


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "..\\x", "a/b", "config.json\x00", "", "new.json"])
def test_names_outside_the_format_are_refused(folder, name):
    (folder.parent / "secret.json").write_text("{}")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files=files | {name: files["config.json"]})
    with pytest.raises(CheckpointError, match="no part of a saved model"):
        load_folder(folder)


@pytest.mark.parametrize("files", [None, [], {}, {"config.json": 1}, dict.fromkeys(FILES, {}), dict.fromkeys(FILES, 3)])
def test_a_manifest_without_proper_entries_is_refused(folder, files):
    edit_manifest(folder, files=files)
    with pytest.raises(CheckpointError, match="manifest"):
        load_folder(folder)


@pytest.mark.parametrize("version", [native.FORMAT_VERSION + 1, 10**30, 0, -1, "1", 1.0, True, None, [1]])
def test_unknown_format_versions_are_refused(folder, version):
    edit_manifest(folder, format_version=version, package_version="9.9")
    with pytest.raises(CheckpointError, match="update scldm_cd4|no format version"):
        load_folder(folder)
    edit_manifest(folder, format_version=1, format="other")
    with pytest.raises(CheckpointError, match="not the manifest"):
        load_folder(folder)


def test_older_formats_are_migrated_or_say_who_wrote_them(folder, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(native, "FORMAT_VERSION", 3)
    with pytest.raises(CheckpointError, match=r"written by scldm_cd4 .* no way from format 1"):
        load_folder(folder)
    steps = {v: lambda saved, v=v: replace(saved, config=saved.config | {f"from_{v}": True}) for v in (1, 2)}
    monkeypatch.setattr(native, "MIGRATIONS", steps)
    assert load_folder(folder).config == {"vae": {"width": 8, "sizes": [1, 2]}, "from_1": True, "from_2": True}


def test_links_of_the_cache_are_read_and_other_links_and_things_are_not(folder, tmp_path):
    snapshot, blob = tmp_path / "models--me--it" / "snapshots" / "abc", tmp_path / "models--me--it" / "blobs" / "123"
    blob.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    shutil.move(snapshot / "config.json", blob)
    (snapshot / "config.json").symlink_to(Path("../../blobs/123"))
    assert load_folder(snapshot).config["vae"]["width"] == 8  # the hub's cache is made of such links
    shutil.move(folder / "config.json", tmp_path / "elsewhere")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"config\.json is a link out of its folder"):
        load_folder(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_folder(folder)
    if hasattr(os, "mkfifo"):
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")  # reading it would wait for ever
        with pytest.raises(CheckpointError, match="not a file"):
            load_folder(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(folder)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_folder(folder)


def test_huge_json_is_refused_before_it_is_read(folder):
    for name, size in (("config.json", native.MAX_JSON_BYTES + 1), ("manifest.json", native.MAX_MANIFEST_BYTES + 1)):
        if name == "config.json":
            files = json.loads((folder / "manifest.json").read_text())["files"]
            digest = hashlib.sha256()
            for _ in range(size // 2**20):
                digest.update(bytes(2**20))
            digest.update(bytes(size % 2**20))
            files[name] = {"bytes": size, "sha256": digest.hexdigest()}
            edit_manifest(folder, files=files)
        with (folder / name).open("wb") as file:
            file.truncate(size)  # sparse
        with pytest.raises(CheckpointError, match=f"{name}.*more than"):
            load_folder(folder)


@pytest.mark.parametrize("place", ["nowhere", "file", "empty"])
def test_what_is_no_model_is_said(tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="saved model"):
        load_folder(tmp_path / place)


def test_a_full_disk_leaves_the_old_model(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"disk is full: .* needs \d+ MiB, \d+ MiB are free; .* untouched"):
            save_folder(folder, **contents(2.0), overwrite=True)
    with monkeypatch.context() as m:
        usage = shutil.disk_usage(folder)
        m.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match="0 MiB are free"):
            save_folder(folder.parent / "a" / "b", **contents())
    assert load_folder(folder).tensors["vae.a"][0, 0] == 1.0
    assert "my model" in [p.name for p in folder.parent.iterdir()]
    assert not list(folder.parent.glob(".my model*"))


def test_a_place_that_cannot_be_written_is_said(folder, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as m:
        m.setattr(Path, "mkdir", forbidden)
        with pytest.raises(CheckpointError, match="cannot be saved to .*Permission denied.*Choose a folder"):
            save_folder(folder, **contents(2.0), overwrite=True)
    with monkeypatch.context() as m:
        m.setattr(Path, "open", forbidden)
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            load_folder(folder)
    assert load_folder(folder).tensors["vae.a"][0, 0] == 1.0


def test_an_interrupt_leaves_the_old_model_and_nothing_else(folder, monkeypatch):
    real, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_folder(folder, **contents(2.0), overwrite=True)
    assert load_folder(folder).tensors["vae.a"][0, 0] == 1.0
    assert [p.name for p in folder.parent.iterdir()] == ["my model"]


KILLED = """
    import os, shutil, sys
    from pathlib import Path
    import torch
    from scldm_cd4.checkpoint import native

    # one child per point of death: before and after each sync, rename and removal of the save
    target = Path(sys.argv[1]) / "model"
    def save(v):
        native.save_folder(target, tensors={"v": torch.full((4,), v)}, config={"v": v}, registry={}, history={},
                           readme="", overwrite=True)
    def dying(real, state):
        def call(*args, **kwargs):
            for after in (False, True):
                state[0] -= 1
                if state[0] < 0:
                    os._exit(9)
                if not after:
                    out = real(*args, **kwargs)
            return out
        return call
    point, finished, seen = 0, False, []
    while not finished:
        shutil.rmtree(target, ignore_errors=True)
        save(1.0)
        child = os.fork()
        if child == 0:
            state = [point]
            os.fsync, shutil.rmtree = dying(os.fsync, state), dying(shutil.rmtree, state)
            Path.rename = dying(Path.rename, state)
            save(2.0)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        saved = native.load_folder(target)
        assert saved.config["v"] == saved.tensors["v"].unique().item()
        seen.append(saved.config["v"])
        save(3.0)  # the next save copes with what was left
        assert native.load_folder(target).config["v"] == 3.0
        assert not (target.parent / ".model.previous").exists()
        point += 1
    sys.stdout.write(" ".join(map(str, seen)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_point_the_old_or_the_new_model_loads(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split()
    assert len(seen) > 20
    assert seen == sorted(seen)  # the old one up to some point, the new one from there
    assert set(seen) == {"1.0", "2.0"}

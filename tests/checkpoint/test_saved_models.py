"""Saved models of every release load for ever; what a saved folder says and does not say."""

import getpass
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_saved import REQUEST, SAVED

from scldm_cd4 import CD4Model, __version__
from scldm_cd4.checkpoint.native import FILES, MANIFEST

RELEASES = sorted(path.name for path in SAVED.iterdir())


def test_this_release_has_one():
    assert __version__ in RELEASES, "run python tests/checkpoint/make_saved.py at a release"


@pytest.mark.parametrize("release", RELEASES)
def test_saved_models_of_each_release_load_and_give_what_they_gave(release: str):
    model = CD4Model.load(SAVED / release / "model", device="cpu")
    expected = json.loads((SAVED / release / "expected.json").read_text())
    cells = model.generate(**REQUEST, output="mean")
    assert cells.obs_names.tolist() == expected["obs_names"]
    np.testing.assert_allclose(np.asarray(cells.X), expected["mean"], rtol=1e-3, atol=1e-4)
    assert cells.obs["n_train_cells"].min() > 0


@pytest.mark.parametrize("release", RELEASES)
def test_a_model_of_each_release_can_be_saved_and_trained_further(release: str, tmp_path: Path):
    model = CD4Model.load(SAVED / release / "model", device="cpu")
    model.save(tmp_path / "again")
    again = CD4Model.load(tmp_path / "again", device="cpu")
    assert again._state.fingerprint() == model._state.fingerprint()


def test_a_saved_folder_names_no_user_path_or_secret(trained: CD4Model, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    folder = tmp_path / "a place of mine"
    trained.save(folder)
    text = b"".join((folder / name).read_bytes() for name in (*FILES, MANIFEST))
    secrets = [str(tmp_path), str(Path.home()) + "/", "a place of mine", "hf_0123456789abcdef", str(Path.cwd())]
    if len(getpass.getuser()) > 4:  # a short name occurs by chance
        secrets.append(getpass.getuser())
    assert [s for s in secrets if s.encode() in text] == []


def test_the_model_card_says_what_a_reader_needs(trained: CD4Model, tmp_path: Path):
    scores = pd.DataFrame({"metric": ["pearson|delta"], "model": [0.51234], "baseline": [float("nan")]})
    trained.save(tmp_path / "m", scores=scores)
    card = (tmp_path / "m" / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: scldm_cd4\n(.*\n)*---\n\n# ", card)
    for said in ("50 genes", "2 donors (`donor_id`)", "control: `NTC`", "cells for validation", "seed 0"):
        assert said in card
    for said in ("Not for clinical decisions", "For research", "Only perturbations, donors and time points that were"):
        assert said in card
    assert "| pearson\\|delta | 0.5123 | - |" in card
    nll = trained.history_["vae"]["mean_profile_nll"].iloc[-1]
    assert f"{nll:.4g} (the mean profile of the training cells)" in card
    total = sum(n for d in trained.registry["train_counts"].values() for t in d.values() for n in t.values())
    assert f"{total} training cells" in card
    trained.save(tmp_path / "plain")
    assert "No scores against held-out cells were given" in (tmp_path / "plain" / "README.md").read_text()


def test_an_older_release_that_was_changed_by_hand_is_refused(tmp_path: Path):
    shutil.copytree(SAVED / RELEASES[0] / "model", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"width": 8', '"width": 9'))
    with pytest.raises(ValueError, match="checksum"), warnings.catch_warnings():
        CD4Model.load(tmp_path / "m")

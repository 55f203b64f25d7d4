"""What validation conditions teach about predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import CD4Model, CheckpointError, DataError, datasets, open_cells
from scldm_cd4.calibration import Calibration, calibrate


def planted(slope: float, n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Features of which the second tells the correlation, two conditions per perturbation."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 3))
    r = np.tanh(0.5 + slope * features[:, 1] + 0.2 * rng.normal(size=n))
    return features, r, [f"P{i // 2}" for i in range(n)], np.full(n, 30.0)


def test_a_planted_relation_is_found_on_left_out_perturbations() -> None:
    features, r, names, n = planted(0.6)
    found, left_out = calibrate(features, r, names, n)
    assert found.facts["left_out_mae"] < 0.5 * found.facts["left_out_mae_of_mean"]
    assert found.facts["left_out_spearman"] > 0.8
    assert found.facts["n_perturbations"] == 40
    inside = (left_out[:, 1] <= r) & (r <= left_out[:, 2])
    assert 0.8 < inside.mean() == pytest.approx(found.facts["left_out_coverage"])
    new = planted(0.6, seed=1)
    assert np.abs(found.predict(new[0])[:, 0] - new[1]).mean() < 0.2


def test_without_a_relation_the_mean_remains() -> None:
    features, r, names, n = planted(0.0)
    found, left_out = calibrate(features, r, names, n)
    assert np.ptp(left_out[:, 0]) < 0.15
    assert found.facts["left_out_mae"] == pytest.approx(found.facts["left_out_mae_of_mean"], rel=0.1)


def test_left_out_means_left_out() -> None:
    features, r, names, n = planted(0.6)
    changed = r.copy()
    changed[:2] = -0.9
    before, after = (calibrate(features, x, names, n)[1] for x in (r, changed))
    np.testing.assert_allclose(np.arctanh(before[:2, 0]), np.arctanh(after[:2, 0]), rtol=1e-9)
    assert not np.allclose(before[2:, 0], after[2:, 0])


def test_beyond_what_was_seen_nothing_is_extrapolated() -> None:
    features, r, names, n = planted(0.6)
    found, _ = calibrate(features, r, names, n)
    edge, beyond = features.max(axis=0), features.max(axis=0) + 100
    np.testing.assert_array_equal(found.predict(edge[None]), found.predict(beyond[None]))
    assert np.isnan(found.predict(np.array([[0.0, np.nan, 0.0]]))).all()


def test_plain_values_and_back() -> None:
    found, _ = calibrate(*planted(0.6))
    again = Calibration.from_dict(found.to_dict())
    assert again == found
    for damage in ({"sd": None}, {"weights": [1.0]}, {"facts": None}):
        with pytest.raises(CheckpointError, match="reliability"):
            Calibration.from_dict(found.to_dict() | damage)


def test_without_validation_conditions_the_table_says_why(trained: Any, tmp_path: Path) -> None:
    table = trained.reliability("GATA3", donor="CE0008162", n_cells=20, seed=0)
    assert table["expected_pearson_delta"].isna().all()
    assert table["note"].str.contains("2 validation conditions|1 validation conditions").all()
    assert np.isfinite(table["effect_size"]).all()
    assert list(table["timepoint"]) == ["Rest", "Stim8hr"]
    with pytest.raises(DataError, match="10 are needed"):
        trained.fit_reliability(n_cells=20, seed=0)
    trained.save(tmp_path / "model")
    loaded = CD4Model.load(tmp_path / "model").reliability("GATA3", "CE0008162", "Rest", n_cells=20, seed=0)
    assert loaded["note"].str.contains("fit_reliability").all()


@pytest.fixture(scope="module")
def validated(quick: dict[str, Any]) -> Any:
    """A model with 14 held-out conditions of seven perturbations."""
    adata = datasets.synthetic_cd4(900, 40, n_perturbations=7, n_donors=3, n_timepoints=2, seed=0)
    CD4Model.setup_anndata(
        adata, perturbation_key="perturbation", donor_key="donor_id", timepoint_key="timepoint", control="NTC"
    )
    short = {name: quick[name] | {"target_steps": 10} for name in ("train_vae", "train_flow")}
    model = CD4Model(adata, "tiny", **(quick | short))
    names = [name for name in model.perturbations if name != "NTC"]
    held = [
        {"perturbation": name, "donor_id": model.donors[i % 3], "timepoint": t}
        for i, name in enumerate(names)
        for t in model.timepoints
    ]
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        model.train(seed=0, split={"conditions": held})
    return model


def test_learned_applied_and_kept(validated: Any, tmp_path: Path) -> None:
    learned = validated.fit_reliability(n_cells=20, seed=0)
    assert len(learned) == learned.attrs["n_conditions"] == 14
    assert (learned.attrs["n_cells"], learned.attrs["seed"]) == (20, 0)
    assert learned["pearson_delta"].between(-1, 1).all()
    assert (learned["n_cells"] >= 10).all()
    name, donor = learned["perturbation"].iloc[0], learned["donor_id"].iloc[0]
    asked = pd.DataFrame(
        {"perturbation": [name, "NTC", name], "donor_id": donor, "timepoint": ["Rest", "Rest", "Stim8hr"]}
    )
    table = validated.reliability(conditions=asked, n_cells=20, seed=0)
    assert list(table["perturbation"]) == [name, "NTC", name]
    assert (table["n_train_cells"].to_numpy() == 0).tolist() == [True, False, True]
    known = table.drop(1)
    assert (known["expected_lo"] < known["expected_pearson_delta"]).all()
    assert (known["expected_pearson_delta"] < known["expected_hi"]).all()
    assert np.isnan(table["expected_pearson_delta"].iloc[1])
    assert "control" in table["note"].iloc[1]
    np.testing.assert_allclose(known["effect_size"], learned["effect_size"].iloc[:2], rtol=1e-6)
    validated.save(tmp_path / "model")
    loaded = CD4Model.load(tmp_path / "model").reliability(conditions=asked, n_cells=20, seed=0)
    pd.testing.assert_frame_equal(loaded, table)


@pytest.fixture
def unlearned(validated: Any, tmp_path: Path) -> Any:
    """Copies of the validated model that have learned nothing yet."""

    def made() -> Any:
        model = CD4Model.load(tmp_path / "validated", adata=validated.adata)
        model.training_.pop("reliability", None)
        return model

    validated.save(tmp_path / "validated")
    return made


def test_what_is_learned_does_not_depend_on_the_first_call(unlearned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scldm_cd4.reliability.DEFAULT_N_CELLS", 30)
    fresh, used = unlearned(), unlearned()
    used.reliability("GATA3", n_cells=24, seed=7)
    tables = [model.reliability("GATA3", n_cells=20, seed=0) for model in (fresh, used)]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0].attrs == tables[1].attrs
    assert (tables[0].attrs["n_cells"], tables[0].attrs["seed"]) == (30, 0)
    assert tables[0]["expected_pearson_delta"].notna().all()
    used.fit_reliability(n_cells=20, seed=7)
    again = used.reliability("GATA3", n_cells=20, seed=0)
    assert (again.attrs["n_cells"], again.attrs["seed"]) == (20, 7)


def test_cells_in_files_teach_what_cells_in_memory_do(unlearned: Any, tmp_path: Path) -> None:
    model = unlearned()
    adata = model.adata.copy()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    adata.obs.iloc[::40, adata.obs.columns.get_loc("perturbation")] = "unknown"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    both = (adata, open_cells(tmp_path / "cells.h5ad"))
    tables = [model.fit_reliability(cells, n_cells=20, seed=0) for cells in both]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize("n_cells", [0, 1, 19, "many", 20.5])
def test_too_few_cells(trained: Any, n_cells: Any) -> None:
    for learn in (trained.fit_reliability, trained.reliability):
        with pytest.raises(DataError, match=r"n_cells must be (at least 20|a whole number)"):
            learn(n_cells=n_cells, seed=0)

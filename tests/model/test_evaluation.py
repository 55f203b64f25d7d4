"""`CD4Model.evaluate`: held-out conditions generated and scored."""

import warnings

import numpy as np
import pytest

from scldm_cd4 import CD4Model
from scldm_cd4._errors import DataError

QUICK = {"profile": "minimal", "n_repeats": 1, "min_cells": 4}


@pytest.fixture(scope="module")
def table(trained):
    return trained.evaluate(seed=1, **QUICK)


def test_held_out_conditions_are_scored_beside_baselines(trained, table):
    held = {
        tuple(row)
        for row in trained.adata.obs.iloc[trained.test_indices][["donor_id", "timepoint", "perturbation"]].to_numpy()
    }
    found = {tuple(row) for row in table[["donor_id", "timepoint", "perturbation"]].to_numpy()}
    assert found == held
    assert (table["n_real"] == table["n_pred"]).all()
    energy = table[table["metric"] == "energy_distance"]
    for column in ("value", "ceiling", "baseline_control", "matched_value", "matched_baseline_control"):
        assert np.isfinite(energy[column]).all(), column
    assert table.attrs["components_fitted_on"] == "the training cells"
    assert table.attrs["model_hash"]
    assert table["note"].str.contains("half of the training controls").all()


def test_seed_decides(trained, table):
    assert trained.evaluate(seed=1, **QUICK).equals(table)
    assert not trained.evaluate(seed=2, **QUICK).equals(table)


def test_given_cells_and_options(trained, simulated):
    cells = simulated[trained.validation_indices]
    found = trained.evaluate(
        cells, n_cells=30, generate={"guidance": 0.5}, seed=1, baselines=["two_way"], **{**QUICK, "min_cells": 2}
    )
    assert (found["n_pred"].dropna() == 30).all()
    assert "baseline_two_way" in found
    assert "baseline_control" not in found


def test_targets_are_found_by_symbol_where_genes_go_by_identifier(simulated, quick, table):
    adata = simulated.copy()
    adata.var["gene_symbol"], adata.var_names = adata.var_names, adata.var["gene_id"]
    keys = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint"}
    CD4Model.setup_anndata(adata, **keys, control="NTC")
    model = CD4Model(adata, "tiny", **quick)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        model.train(seed=0, split={"conditions": [{"perturbation": "GATA3", "donor_id": "CE0008162"}]})
    found = model.evaluate(seed=1, **QUICK)
    assert found.attrs["targets_left_out"] == table.attrs["targets_left_out"] == 2
    assert found.equals(table)
    assert model.evaluate(seed=1, target_genes={"GATA3": None}, **QUICK).attrs["targets_left_out"] == 0


def test_a_model_loaded_without_cells_has_no_training_cells(trained, simulated, tmp_path):
    trained.save(tmp_path / "model")
    loaded = CD4Model.load(tmp_path / "model")
    with pytest.raises(DataError, match="pass adata="):
        loaded.evaluate(seed=1)
    found = loaded.evaluate(simulated, seed=1, **{**QUICK, "min_cells": 2})
    assert found["baseline_control"].isna().all()
    assert found["note"].str.contains("no training cells").all()


def test_a_loaded_model_takes_its_training_cells_or_finds_them(trained, simulated, table, tmp_path):
    trained.save(tmp_path / "model")
    held, train = (simulated[rows] for rows in (trained.test_indices, trained.train_indices))
    found = CD4Model.load(tmp_path / "model").evaluate(held, train=train, seed=1, **QUICK)
    assert found.equals(table)
    assert CD4Model.load(tmp_path / "model", simulated).evaluate(seed=1, **QUICK).equals(table)


def test_controls_alone_have_no_effect_to_score(trained, simulated):
    with pytest.raises(DataError, match="all controls"):
        trained.evaluate(simulated[simulated.obs["perturbation"] == "NTC"])

"""Labels keep their kind, size factors have the effect they are declared for, and mistakes are answered in words."""

import datetime
import json
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import CD4Model
from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4.data.labels import as_label, read_labels
from scldm_cd4.registry import Attribute, Registry

KEYS = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint", "control": "NTC"}
UNTRAINED_ENOUGH = pytest.mark.filterwarnings("ignore:The decoder makes little use of the latent")


def trained_on(adata: Any, quick: Any, **keys: Any) -> CD4Model:
    CD4Model.setup_anndata(adata, **KEYS | keys)
    model = CD4Model(adata, "tiny", **quick)
    model.train(seed=0, max_epochs=1)
    return model


@UNTRAINED_ENOUGH
@pytest.mark.parametrize(
    ("dtype", "first", "kind"),
    [
        ("int32", 1, "int"),
        ("Int64", 1, "int"),
        ("bool", True, "bool"),
        ("boolean", True, "bool"),
        ("float64", 1.0, "float"),
        ("category", 1, "int"),
        ("string", "1", "string"),
    ],
)
def test_generated_labels_are_of_the_kind_of_the_column(
    simulated: Any, quick: Any, tmp_path: Any, dtype: str, first: Any, kind: str
) -> None:
    """4b-5: real and generated cells join to one column, which a file holds."""
    adata = simulated.copy()
    adata.obs["batch"] = pd.Series((adata.obs["donor_id"] == "CE0008162").astype(int)).astype(dtype)
    model = trained_on(adata, quick, donor_key="batch")
    model.save(tmp_path / "model")
    model = CD4Model.load(tmp_path / "model")
    assert model.registry["donor"]["kind"] == kind
    cells = model.generate("NTC", first, n_cells=2, seed=0, out=tmp_path / "cells.h5ad")
    assert list(cells.obs["batch"].cat.categories) == [first]
    cells = cells.to_memory()
    same = model.generate("NTC", as_label(first), n_cells=2, seed=0)
    assert (cells.X != same.X).nnz == 0
    joined = ad.concat([adata, cells], index_unique="-")
    joined.write_h5ad(tmp_path / "joined.h5ad")
    again = ad.read_h5ad(tmp_path / "joined.h5ad")
    assert list(again.obs["batch"]) == [*adata.obs["batch"], *[first] * cells.n_obs]
    assert type(again.obs["batch"].iloc[-1]) is type(again.obs["batch"].iloc[0])
    moved = model.generate("NTC", cells=adata[:2], seed=0)
    assert list(moved.obs["source_batch"]) == list(adata.obs["batch"][:2])


@UNTRAINED_ENOUGH
def test_unconditional_cells_have_string_labels(simulated: Any, quick: Any) -> None:
    """What is no label of the column stays a word."""
    adata = simulated.copy()
    adata.obs["batch"] = (adata.obs["donor_id"] == "CE0008162").to_numpy()
    model = trained_on(adata, quick, donor_key="batch")
    cells = model.generate(guidance=0.0, n_cells=2, seed=0)
    assert list(cells.obs["batch"]) == ["unconditional"] * 2


def test_kinds_in_the_registry(trained: CD4Model) -> None:
    """Files of early models, without kinds, hold strings; a kind that the levels do not have is damage."""
    values = trained.registry
    del values["donor"]["kind"]
    assert Registry.from_dict(json.loads(json.dumps(values))).donor.kind == "string"
    for kind in ("int", "bool", "complex", None, []):
        values["donor"]["kind"] = kind
        with pytest.raises(CheckpointError, match="damaged"):
            Registry.from_dict(values)
    with pytest.raises(DataError, match="not unique as values of kind 'int'"):
        Attribute("donor", "d", ("1", "01"), "int")


@UNTRAINED_ENOUGH
def test_size_factors_are_relative_depths(simulated: Any, quick: Any) -> None:
    """Their distribution replaces that of the counts; their scale plays no part; training does not change."""
    plain = trained_on(simulated.copy(), quick)
    totals = np.asarray(simulated.X.sum(axis=1)).ravel()
    models = []
    for depth in (np.linspace(1.0, 2.0, simulated.n_obs), np.linspace(1e3, 2e3, simulated.n_obs)):
        adata = simulated.copy()
        adata.obs["depth"] = depth
        models.append(trained_on(adata, quick, size_factor_key="depth"))
    cells = [model.generate("NTC", n_cells=50, seed=0) for model in (*models, plain)]
    np.testing.assert_allclose(cells[0].obs["size_factor"], cells[1].obs["size_factor"])
    assert (cells[0].X != cells[1].X).nnz == 0
    drawn = cells[0].obs["size_factor"]
    assert drawn.max() / drawn.min() <= 2.0
    assert abs(drawn.mean() / totals.mean() - 1) < 0.1
    own = cells[2].obs["size_factor"]
    assert own.max() / own.min() > 2.0
    assert not np.allclose(drawn, own)
    np.testing.assert_array_equal(models[0].get_latent(), plain.get_latent())


@UNTRAINED_ENOUGH
def test_size_factors_that_are_panel_totals_change_nothing(simulated: Any, quick: Any) -> None:
    """Declared counts per cell are what is taken without a declaration."""
    adata = simulated.copy()
    adata.obs["depth"] = np.asarray(simulated.X.sum(axis=1)).ravel()
    declared = trained_on(adata, quick, size_factor_key="depth").generate("NTC", n_cells=5, seed=0)
    own = trained_on(simulated.copy(), quick).generate("NTC", n_cells=5, seed=0)
    np.testing.assert_allclose(declared.obs["size_factor"], own.obs["size_factor"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lr": 1e-3}, r"no keyword 'lr'.*plan_kwargs=\{'lr': "),
        ({"batch_sise": 8}, r"'batch_sise'.*Near matches: 'batch_size'.*plan_kwargs"),
        ({"max_epoch": 2}, r"'max_epoch'.*Near matches: 'max_epochs'.*plan_kwargs"),
        ({"logger": False, "limit_train_batch": 2}, r"'limit_train_batch'.*'limit_train_batches'"),
    ],
)
def test_mistyped_keywords_of_training(simulated: Any, quick: Any, given: dict[str, Any], text: str) -> None:
    """They are refused before any work, with what was meant."""
    model = CD4Model(simulated, "tiny", **quick)
    with pytest.raises(DataError, match=text):
        model.train(seed=0, **given)
    assert model.train_indices is None


@pytest.mark.parametrize("bad", ["a", None, {"donor": "a"}, [1.0]])
def test_guidance_that_is_no_number(trained: CD4Model, bad: Any) -> None:
    """The message says what guidance takes."""
    with pytest.raises(DataError, match="guidance takes a number"):
        trained.generate("NTC", n_cells=1, guidance=bad)


DAY = "2024-05-01"
NOON = "2024-05-01 12:00:00"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (pd.Timestamp(DAY), DAY),
        (np.datetime64(DAY), DAY),
        (np.datetime64(DAY, "ns"), DAY),
        (datetime.date(2024, 5, 1), DAY),
        (datetime.datetime(2024, 5, 1), DAY),
        (pd.Timestamp(NOON), NOON),
        (np.datetime64(NOON, "ns"), NOON),
        (pd.Timestamp(DAY, tz="UTC"), "2024-05-01 00:00:00+00:00"),
        (np.timedelta64(5, "h"), "0 days 05:00:00"),
        (pd.Timedelta(hours=5), "0 days 05:00:00"),
    ],
)
def test_dates_as_labels(value: Any, label: str) -> None:
    """A moment has one label, whatever type it comes in."""
    assert as_label(value) == label
    obs = pd.DataFrame({"when": [value]})
    for column in (obs["when"], obs["when"].astype("category"), obs["when"].astype(object)):
        assert read_labels(pd.DataFrame({"when": column}), "when", "timepoint_key")[1] == (label,)


def test_blank_labels_are_empty(simulated: Any) -> None:
    """Blanks alone are no label; blanks at an end belong to it."""
    adata = simulated.copy()
    donors = adata.obs["donor_id"].astype(str).to_numpy(dtype=object)
    adata.obs["donor_id"] = np.where(np.arange(adata.n_obs) < 3, " \t", donors)
    with pytest.raises(DataError, match=r"donor_id.*empty in 3 of"):
        CD4Model.setup_anndata(adata, **KEYS)
    assert read_labels(pd.DataFrame({"d": ["a", "a "]}), "d", "donor_key")[1] == ("a", "a ")


def test_arguments_of_load_in_the_wrong_order(trained: CD4Model, simulated: Any, tmp_path: Any) -> None:
    """The message names the order."""
    trained.save(tmp_path / "model")
    with pytest.raises(DataError, match=r"CD4Model\.load\(folder, adata\); got AnnData"):
        CD4Model.load(simulated, tmp_path / "model")
    with pytest.raises(DataError, match="an AnnData is needed, got str"):
        CD4Model.load(tmp_path / "model", "cells.h5ad")
    assert CD4Model.load(tmp_path / "model", simulated).adata is simulated

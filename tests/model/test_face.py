"""The face of the package: imports, setting up, training, saving, looking."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scldm_cd4
from scldm_cd4 import (
    CD4Model,
    CheckpointError,
    DataError,
    NotTrainedError,
    TrainingError,
    UnknownCategoryError,
    settings,
)

PLATEAU = "ignore:The decoder makes little use"
pytestmark = pytest.mark.filterwarnings(PLATEAU)


def test_import_loads_nothing_heavy() -> None:
    heavy = ("torch", "lightning", "scanpy", "ot", "matplotlib", "anndata", "pandas", "scipy", "sklearn")
    code = f"import sys, scldm_cd4; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    for name in scldm_cd4.__all__:
        assert getattr(scldm_cd4, name) is not None
        assert name in dir(scldm_cd4)
    with pytest.raises(AttributeError, match="nothing_here"):
        scldm_cd4.nothing_here  # noqa: B018


def test_settings_override_is_undone_also_after_an_error() -> None:
    with settings.override(seed=3, batch_size=64):
        assert settings.seed == 3
    with pytest.raises(DataError), settings.override(seed=3, batch_size=0):
        pytest.fail("not reached")
    assert settings.seed is None
    assert settings.batch_size is None


@pytest.mark.parametrize(
    ("name", "value"), [("sed", 1), ("seed", "x"), ("seed", True), ("batch_size", 0), ("seed", -1)]
)
def test_settings_refuse_what_has_no_meaning(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=name):
        setattr(settings, name, value)


def test_cells_must_be_declared(simulated: Any) -> None:
    plain = simulated.copy()
    del plain.uns["_scldm_cd4"]
    with pytest.raises(DataError, match="setup_anndata"):
        CD4Model(plain)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.get_latent(),
        lambda m: m.get_latent_representation(),
        lambda m: m.get_normalized_expression(),
        lambda m: m.get_reconstruction_error(),
        lambda m: m.generate(),
        lambda m: m.predict(pd.DataFrame({"perturbation": ["NTC"]})),
        lambda m: m.rank_perturbations(pd.Series(dtype=float)),
        lambda m: m.save("nowhere"),
        lambda m: m.train(stage="flow"),
    ],
)
def test_untrained_is_said(simulated: Any, use: Any) -> None:
    model = CD4Model(simulated, "tiny")
    assert not model.is_trained_
    with pytest.raises(NotTrainedError, match="not trained: call train"):
        use(model)


def test_flow_alone_missing_is_said(simulated: Any, quick: Any) -> None:
    model = CD4Model(simulated, "tiny", **quick)
    model.train(stage="vae", seed=0, max_epochs=1)
    assert model.get_latent(indices=[0]).shape == (1, 16)
    assert not model.is_trained
    with pytest.raises(NotTrainedError, match="flow"):
        model.generate(n_cells=1)
    held_out = model.validation_indices
    model.train(stage="flow", seed=1, max_epochs=1)
    np.testing.assert_array_equal(model.validation_indices, held_out)
    assert model.is_trained
    assert set(model.history_) == {"vae", "flow"}


def test_cells_that_the_autoencoder_saw_are_not_held_out_in_silence(simulated: Any, quick: Any) -> None:
    model = CD4Model(simulated, "tiny", **quick)
    model.train(stage="vae", seed=0, max_epochs=1)
    with pytest.warns(UserWarning, match="held out now trained the autoencoder"):
        model.train(stage="flow", split={"test": 0.3}, seed=0, max_epochs=1)


def test_a_loaded_model_knows_the_cells_that_it_held_out(
    trained: CD4Model, simulated: Any, quick: Any, tmp_path: Path
) -> None:
    """Also for a flow trained anew, whatever its seed; not for other cells, nor for these in another order."""
    trained.save(tmp_path / "m")
    loaded = CD4Model.load(tmp_path / "m", simulated.copy())
    for part in ("train_indices", "validation_indices", "test_indices"):
        np.testing.assert_array_equal(getattr(loaded, part), getattr(trained, part))
    changed = simulated.copy()
    changed.obs["donor_id"] = changed.obs["donor_id"].cat.rename_categories(
        dict(zip(trained.donors, trained.donors[::-1], strict=True))
    )
    for other in (simulated[::-1].copy(), simulated[:50].copy(), changed, simulated[:, ::-1].copy(), None):
        same = other is not None and other.var_names[0] != simulated.var_names[0]  # genes may come in any order
        assert (CD4Model.load(tmp_path / "m", other).test_indices is not None) == same
    model = CD4Model(simulated, "tiny", **quick)
    model.train(stage="vae", seed=0, max_epochs=1)
    model.save(tmp_path / "half")
    held_out, model = model.validation_indices, CD4Model.load(tmp_path / "half", simulated)
    model.train(stage="flow", seed=7, max_epochs=1)
    np.testing.assert_array_equal(model.validation_indices, held_out)


def test_a_damaged_split_is_refused(trained: CD4Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = trained._state.split
    assert split is not None
    monkeypatch.setitem(split.spec, "n_cells", {"train": 1, "validation": 0, "test": 0})
    trained.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="split is damaged"):
        CD4Model.load(tmp_path / "m")


def test_after_training(trained: Any, simulated: Any) -> None:
    assert trained.is_trained_
    assert trained.is_trained
    for table in trained.history_.values():
        assert table.index.name == "epoch"
        assert np.isfinite(table["train_loss"]).all()
    parts = [trained.train_indices, trained.validation_indices, trained.test_indices]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(simulated.n_obs))
    assert trained.training_["vae"]["seed"] == 0
    assert trained.perturbations == tuple(sorted(simulated.obs["perturbation"].cat.categories))
    assert len(trained.donors) == len(trained.timepoints) == 2
    assert json.loads(json.dumps(trained.registry))["control"] == "NTC"


def test_views_of_the_model(trained: Any) -> None:
    text = repr(trained)
    assert "4 perturbations, 2 timepoints, 2 donors" in text
    assert "autoencoder and flow" in text
    assert trained._repr_html_().startswith("<b>CD4Model</b>")
    table = trained.view_anndata_setup()
    assert table.loc["donor", "key"] == "donor_id"
    assert table.loc["genes", "levels"] == 50


def test_equal_seeds_give_equal_models_and_leave_global_generators_alone(simulated: Any, quick: Any) -> None:
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    models = []
    for _ in range(2):
        model = CD4Model(simulated, "tiny", **quick)
        model.train(seed=3, max_epochs=1)
        models.append(model)
    cells = [m.generate(n_cells=3, seed=1) for m in models]
    assert cells[0].uns["scldm_cd4"]["model_hash"] == cells[1].uns["scldm_cd4"]["model_hash"]
    assert (cells[0].X != cells[1].X).nnz == 0
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


def test_train_size(simulated: Any, quick: Any) -> None:
    model = CD4Model(simulated, "tiny", **quick)
    model.train(seed=0, max_epochs=1, train_size=0.7, validation_size=0.1, stage="vae")
    n = [len(x) / simulated.n_obs for x in (model.train_indices, model.validation_indices, model.test_indices)]
    assert n == pytest.approx([0.7, 0.1, 0.2], abs=0.07)
    with pytest.raises(DataError, match="at most 1"):
        model.train(train_size=0.95, validation_size=0.2)
    with pytest.raises(DataError, match="either"):
        model.train(train_size=0.5, split=0.1)


def test_without_control_training_warns_and_ranking_refuses(simulated: Any, quick: Any) -> None:
    adata = simulated.copy()
    CD4Model.setup_anndata(adata, perturbation_key="perturbation", donor_key="donor_id")
    model = CD4Model(adata, "tiny", **quick)
    with pytest.warns(UserWarning, match="no control was declared"):
        model.train(seed=0, max_epochs=1)
    cells = model.generate(n_cells=2, seed=0)
    assert "control" not in cells.uns["scldm_cd4"]
    with pytest.raises(DataError, match="control"):
        model.rank_perturbations(pd.Series(1.0, index=adata.var_names))


def test_failure_keeps_a_trained_model_and_says_what_to_try(simulated: Any, quick: Any) -> None:
    model = CD4Model(simulated, "tiny", **quick)
    model.train(seed=0, max_epochs=1)
    before, train = model.generate(n_cells=4, seed=0), model.train_indices
    bad = {"lr": 1e30, "clip_norm": 0.0, "warmup": 0.0}
    with pytest.raises(TrainingError, match="learning rate"):
        model.train(seed=1, max_epochs=3, split={"test": 0.5}, plan_kwargs=bad)
    assert (model.generate(n_cells=4, seed=0).X != before.X).nnz == 0
    np.testing.assert_array_equal(model.train_indices, train)  # else evaluate would take training cells for held out


def test_failure_in_the_flow_keeps_the_autoencoder(simulated: Any, quick: Any, tmp_path: Path) -> None:
    model = CD4Model(simulated, "tiny", **quick)
    bad = {"lr": 1e30, "clip_norm": 0.0, "warmup": 0.0}
    with pytest.raises(TrainingError):
        model.train(seed=1, max_epochs=2, plan_kwargs={"vae": {}, "flow": bad})
    assert np.isfinite(model.get_latent()).all()
    model.save(tmp_path / "m")
    loaded = CD4Model.load(tmp_path / "m", simulated)
    np.testing.assert_array_equal(loaded.validation_indices, model.validation_indices)


def stopper(plan: str, what: type[BaseException]) -> Any:
    """A callback that raises after the first step of a stage."""
    from lightning.pytorch import Callback

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            if type(module).__name__ == plan:
                raise what

    return Stop()


def test_a_retraining_that_does_not_end_leaves_the_model_as_it_was(simulated: Any, quick: Any) -> None:
    model = CD4Model(simulated, "tiny", **quick)
    bad = {"lr": 1e30, "clip_norm": 0.0, "warmup": 0.0}
    model.train(seed=0, max_epochs=2, stage="vae", split=0.2)
    latents, facts, distance = model.get_latent(), model.training_, model.query_distance()
    with pytest.raises(TrainingError):
        model.train(seed=1, max_epochs=2, plan_kwargs=bad)
    np.testing.assert_array_equal(model.get_latent(), latents)
    pd.testing.assert_frame_equal(model.query_distance(), distance)
    assert (model.training_, list(model.history)) == (facts, ["vae"])
    model.train(seed=0, max_epochs=1, stage="flow")
    cells = model.generate("GATA3", n_cells=3, seed=0).X.toarray()
    with pytest.warns(UserWarning, match="interrupted and the model is as it was before"):
        model.train(seed=1, max_epochs=1, callbacks=[stopper("VAEPlan", KeyboardInterrupt)])
    np.testing.assert_array_equal(model.generate("GATA3", n_cells=3, seed=0).X.toarray(), cells)


def test_a_new_autoencoder_whose_flow_failed_is_told_of_whole(simulated: Any, quick: Any) -> None:
    model, alone = (CD4Model(simulated, "tiny", **quick) for _ in range(2))
    model.train(seed=0, max_epochs=1, stage="vae")
    with pytest.raises(RuntimeError, match="no memory for the flow"):
        model.train(seed=1, max_epochs=2, callbacks=[stopper("FlowPlan", NoMemory)])
    alone.train(seed=1, max_epochs=2, stage="vae")
    assert not model.is_trained
    assert len(model.history["vae"]) == 2
    assert model.training_["vae"]["seed"] == 1
    np.testing.assert_array_equal(model.get_latent(), alone.get_latent())
    pd.testing.assert_frame_equal(model.query_distance(), alone.query_distance())


class NoMemory(RuntimeError):
    """Any error that is no TrainingError."""

    def __init__(self) -> None:
        super().__init__("no memory for the flow")


def test_a_training_is_resumed_with_its_split_and_its_cells(simulated: Any, quick: Any, tmp_path: Path) -> None:
    held = {"hold_out": {"perturbation": ["GATA3"]}}
    first = CD4Model(simulated, "tiny", **quick)
    with pytest.warns(UserWarning, match="no training cell is left"):
        first.train(seed=0, max_epochs=1, stage="vae", split=held, checkpoint_dir=tmp_path / "state")
    other = simulated[::-1].copy()
    for adata, split, wrong in ((simulated, 0.2, "held out other cells"), (other, None, "was on other cells")):
        with pytest.raises(DataError, match=wrong):
            CD4Model(adata, "tiny", **quick).train(max_epochs=1, split=split, resume_from=tmp_path / "state")
    fewer = simulated[:, :-1].copy()
    with pytest.raises(DataError, match="was on other genes"):
        CD4Model(fewer, "tiny", **quick).train(max_epochs=1, resume_from=tmp_path / "state")
    resumed = CD4Model(simulated, "tiny", **quick)
    resumed.train(max_epochs=1, resume_from=tmp_path / "state")
    np.testing.assert_array_equal(resumed.test_indices, first.test_indices)
    assert resumed.training_["flow"]["split"]["hold_out"] == {"perturbation": ["GATA3"]}


def test_validation_cells_leave_no_trace_in_what_is_generated(simulated: Any, quick: Any) -> None:
    rows = np.flatnonzero((simulated.obs["perturbation"] == "GATA3") & (simulated.obs["donor_id"] == "CE0008162"))
    split = np.full(simulated.n_obs, "train", dtype=object)
    split[rows] = "validation"
    changed = simulated.copy()
    counts = changed.X.toarray()
    counts[rows, 5] += 200
    changed.X = sparse.csr_matrix(counts)
    found = []
    for adata in (simulated, changed):
        model = CD4Model(adata, "tiny", **quick)
        model.train(
            seed=0, max_epochs=1, split=split, early_stopping=False, plan_kwargs={"vae": {"refit_theta": False}}
        )
        found.append(model.generate("GATA3", n_cells=5, output="mean", seed=0).X)
    np.testing.assert_array_equal(*found)


def test_facts_on_training_are_those_of_the_stage_and_of_the_weights(simulated: Any, quick: Any) -> None:
    model = CD4Model(simulated, "tiny", **quick)
    with pytest.warns(UserWarning, match="interrupted and the model holds the weights of that moment"):
        model.train(seed=0, max_epochs=1, callbacks=[stopper("FlowPlan", KeyboardInterrupt)])
    assert "autoencoder and flow (interrupted)" in repr(model)
    assert {name: facts["interrupted"] for name, facts in model.training_.items()} == {"vae": False, "flow": True}
    model.train(seed=0, max_epochs=1, stage="vae")
    assert list(model.history) == list(model.training_) == ["vae"]


# ---------------------------------------------------------------------------------------------------- save and load


def test_p9_saved_model_generates_the_same_without_cells(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    trained.save(folder)
    again = CD4Model.load(folder)
    assert again.adata is None
    first, second = (m.generate(n_cells=5, seed=0) for m in (trained, again))
    assert (first.X != second.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, second.obs)
    assert first.uns["scldm_cd4"] == second.uns["scldm_cd4"]
    pd.testing.assert_frame_equal(trained.history_["vae"], again.history_["vae"], check_dtype=False)
    assert again.registry == trained.registry == CD4Model.load_registry(folder)
    with pytest.raises(DataError, match="pass adata="):
        again.get_latent()
    assert np.array_equal(again.get_latent(trained.adata), trained.get_latent())


def test_load_on_an_instance_gives_the_trained_model(simulated: Any, trained: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "m")
    model = CD4Model(simulated, "tiny").load(tmp_path / "m", simulated)
    assert model.is_trained_
    assert model.adata is simulated


def test_save_does_not_overwrite(trained: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "m")
    with pytest.raises(FileExistsError, match="overwrite"):
        trained.save(tmp_path / "m")
    trained.save(tmp_path / "m", overwrite=True)


def test_from_pretrained_reads_own_folders_and_names_what_it_cannot(trained: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "m")
    assert CD4Model.from_pretrained(tmp_path / "m").is_trained_
    with pytest.raises(CheckpointError, match="hub"):
        CD4Model.from_pretrained("someone/some-model")


def test_d22_vocabulary_that_does_not_fit_the_weights_is_refused(trained: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    state = trained._state
    wrong = replace(state.registry.donor, levels=(*state.registry.donor.levels, "another"))
    replace(state, registry=replace(state.registry, donor=wrong)).save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="do not fit"):
        CD4Model.load(tmp_path / "m")


def test_o1_nothing_is_unpickled(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    trained.save(tmp_path / "m")
    assert CD4Model.load(tmp_path / "m").generate(n_cells=1, seed=0).n_obs == 16


@pytest.mark.parametrize("keys", [{}, {"donor_key": "donor_id"}, {"timepoint_key": "timepoint"}])
def test_every_subset_of_conditions_trains_and_reloads(
    simulated: Any, quick: Any, tmp_path: Path, keys: dict[str, str]
) -> None:
    adata = simulated.copy()
    CD4Model.setup_anndata(adata, perturbation_key="perturbation", control="NTC", **keys)
    model = CD4Model(adata, "tiny", **quick)
    model.train(seed=0, max_epochs=1)
    model.save(tmp_path / "m")
    again = CD4Model.load(tmp_path / "m")
    shapes = [{k: v.shape for k, v in m._state.tensors().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]
    cells = [m.generate("NTC", n_cells=3, seed=0) for m in (model, again)]
    assert (cells[0].X != cells[1].X).nnz == 0
    assert {"donor_id", "timepoint"} & set(cells[0].obs) == set(keys.values())


def test_a_label_of_what_was_not_declared_is_refused_with_the_remedy(simulated: Any, quick: Any) -> None:
    adata = simulated.copy()
    CD4Model.setup_anndata(adata, perturbation_key="perturbation", control="NTC")
    model = CD4Model(adata, "tiny", **quick)
    model.train(seed=0, max_epochs=1)
    with pytest.raises(UnknownCategoryError, match="no timepoint was declared.*timepoint_key="):
        model.generate("NTC", timepoint="Stim8hr")


def test_a_setting_without_its_part_is_refused_with_the_place(simulated: Any) -> None:
    with pytest.raises(ValueError, match=r"no part 'n_tokens'.*vae=\{'n_tokens': ...\}"):
        CD4Model(simulated, "tiny", n_tokens=8)


@pytest.mark.parametrize("n", [2, 3])
def test_cells_without_principal_components_train(simulated: Any, quick: Any, n: int) -> None:
    adata = simulated[:n].copy()
    adata.X = adata.X[[0] * n] if n > 2 else adata.X
    CD4Model.setup_anndata(adata, perturbation_key="perturbation", control=str(adata.obs["perturbation"].iloc[0]))
    model = CD4Model(adata, "tiny", **quick)
    model.train(seed=0, max_epochs=2, validation_size=0)
    assert np.isfinite(model.generate(n_cells=2, output="mean", seed=0).X).all()


def test_device_that_is_not_there(trained: Any) -> None:
    with pytest.raises(DataError, match="device"):
        trained.to_device("cuda:99")
    trained.to_device("cpu")
    assert trained.device.type == "cpu"


def test_d5_averaged_weights_generate(simulated: Any, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scldm_cd4.train import runner

    seen: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(fit(*args, **kwargs))
        return seen[-1]

    fit = runner.fit
    monkeypatch.setattr(runner, "fit", spy)
    model = CD4Model(simulated, "tiny", **quick)
    model.train(seed=0)
    latent = model.generate(n_cells=2, seed=0, output="latent").X
    model._state.dit.load_state_dict(seen[0].online)
    assert not np.allclose(latent, model.generate(n_cells=2, seed=0, output="latent").X)

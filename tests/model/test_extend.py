"""New donors and time points from a few cells, and how near query cells lie to the training cells."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scldm_cd4 import CD4Model, DataError, GeneMismatchError, UnknownCategoryError, datasets, open_cells
from scldm_cd4.extension import Prior, fit_embeddings
from scldm_cd4.flow import flow_loss, interpolate

NEW = "CE0008678"
ROW = "class_embeddings.donor.weight"
pytestmark = pytest.mark.filterwarnings("ignore:.* of the given cells lie farther")


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Any:
    """Fit for a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scldm_cd4.extension.N_STEPS", 20)
        patch.setattr("scldm_cd4.extension.BATCH", 32)
        yield


@pytest.fixture(scope="module")
def query() -> Any:
    """Control cells of a donor that the trained model does not know."""
    adata = datasets.synthetic_cd4(300, 50, n_perturbations=3, n_donors=3, n_timepoints=2, seed=0)
    return adata[(adata.obs["donor_id"] == NEW) & (adata.obs["perturbation"] == "NTC")].copy()


@pytest.fixture(scope="module")
def extended(trained: Any, query: Any) -> Any:
    return trained.extend(query, donor=NEW, seed=0)


def test_all_but_the_new_rows_stays_to_the_bit(trained: Any, extended: Any) -> None:
    before, after = trained._state.tensors(), extended._state.tensors()
    assert set(before) == set(after)
    grown = {name for name in before if before[name].shape != after[name].shape}
    assert grown == {f"dit.{ROW}", "vae.label_effects.vectors.donor.weight"}
    for name, old in before.items():
        kept = torch.cat([after[name][:-2], after[name][-1:]]) if name in grown else after[name]
        assert torch.equal(old, kept), name
    assert extended.donors == (*trained.donors, NEW)
    assert trained.donors == ("CE0008162", "CE0010866")


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
def test_cells_of_other_donors_stay_to_the_bit(trained: Any, extended: Any, guidance: float) -> None:
    ask = {"perturbation": "NTC", "donor": "CE0010866", "timepoint": "Rest", "n_cells": 20, "seed": 1}
    both = [model.generate(**ask, guidance=guidance) for model in (trained, extended)]
    assert (both[0].X != both[1].X).nnz == 0
    assert np.array_equal(both[0].obs["size_factor"], both[1].obs["size_factor"])


def test_the_new_donor_is_generated_with_its_evidence(extended: Any, query: Any) -> None:
    cells = extended.generate(donor=NEW, timepoint="Rest", n_cells=3, seed=0)
    numbers = cells.obs.groupby("perturbation", observed=True)["n_train_cells"].first()
    assert numbers["NTC"] == (query.obs["timepoint"] == "Rest").sum() > 0
    assert (numbers.drop("NTC") == 0).all()
    assert not np.array_equal(
        cells.X[:3].toarray(), extended.generate("GATA3", "CE0008162", "Rest", n_cells=3, seed=0).X
    )


def test_library_sizes_of_the_new_contexts(trained: Any, extended: Any, query: Any) -> None:
    known, now = trained.registry["size_factors"], extended.registry["size_factors"]
    assert {key: now[key] for key in ("timepoints", "overall")} == {
        key: known[key] for key in ("timepoints", "overall")
    }
    stats = now["contexts"]["Rest"].pop(NEW)
    now["contexts"]["Stim8hr"].pop(NEW)
    assert now == known
    totals = np.asarray(query.X.sum(axis=1)).ravel()[(query.obs["timepoint"] == "Rest").to_numpy()]
    assert stats["mean"] == pytest.approx(np.log(totals).mean())


def test_seed_decides(trained: Any, extended: Any, query: Any) -> None:
    same, other = (trained.extend(query, donor=NEW, seed=seed)._state.tensors() for seed in (0, 1))
    assert torch.equal(same[f"dit.{ROW}"], extended._state.tensors()[f"dit.{ROW}"])
    assert not torch.equal(other[f"dit.{ROW}"], same[f"dit.{ROW}"])
    state = torch.random.get_rng_state()
    trained.extend(query, donor=NEW, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saved_and_loaded(extended: Any, tmp_path: Path) -> None:
    extended.save(tmp_path / "model")
    loaded = CD4Model.load(tmp_path / "model")
    ask = {"perturbation": "GATA3", "donor": NEW, "timepoint": "Rest", "n_cells": 10, "seed": 2}
    assert (loaded.generate(**ask).X != extended.generate(**ask).X).nnz == 0
    assert loaded.registry == extended.registry
    assert loaded.training_["extensions"] == [{"levels": {"donor": [NEW]}, "n_cells": 20, "seed": 0}]
    with pytest.raises(DataError, match="knows the donor"):
        loaded.extend(donor=NEW)
    with pytest.raises(DataError, match="nothing left to train"):
        loaded.train()


def test_without_cells_it_is_the_average_of_the_trained(trained: Any) -> None:
    with pytest.warns(UserWarning, match="average of 2 trained donor levels"):
        model = trained.extend(donor="D9")
    table = model._state.dit.class_embeddings["donor"].weight
    torch.testing.assert_close(table[2], table[:2].mean(0))
    assert model.adata is trained.adata
    cells = model.generate("GATA3", "D9", "Rest", n_cells=5, seed=0)
    assert (cells.obs["n_train_cells"] == 0).all()
    with pytest.warns(UserWarning, match="'T9'"):
        further = model.extend(timepoint="T9")
    assert further.generate("GATA3", "D9", "T9", n_cells=5, seed=0).n_obs == 5
    with pytest.warns(UserWarning, match="average of 2 trained donor"):  # levels added before are no part of it
        twice = further.extend(donor="D10")
    torch.testing.assert_close(twice._state.dit.class_embeddings["donor"].weight[3], table[2])


def test_new_time_point(trained: Any, simulated: Any) -> None:
    cells = simulated[simulated.obs["timepoint"] == "Stim8hr"].copy()
    cells.obs["timepoint"] = "Stim48hr"
    model = trained.extend(cells, timepoint="Stim48hr", seed=0)
    assert model.timepoints[-1] == "Stim48hr"
    made = model.generate("GATA3", "CE0008162", "Stim48hr", n_cells=4, seed=0)
    assert (
        made.obs["n_train_cells"]
        == ((cells.obs["donor_id"] == "CE0008162") & (cells.obs["perturbation"] == "GATA3")).sum()
    ).all()


def test_held_out_donor_of_the_vocabulary_takes_its_own_place(trained: Any, simulated: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    model = CD4Model.load(tmp_path / "model")
    registry = model._state.registry
    counts = {p: {d: t for d, t in by.items() if d != "CE0008162"} for p, by in registry.train_counts.items()}
    model._state.registry = replace(registry, train_counts=counts)
    cells = simulated[(simulated.obs["donor_id"] == "CE0008162").to_numpy()].copy()
    found = model.extend(cells, donor="CE0008162", seed=0)
    assert found.donors == model.donors
    assert found.generate("GATA3", "CE0008162", "Rest", n_cells=2, seed=0).n_obs == 2


def test_more_cells_go_farther_from_the_average(trained: Any, query: Any) -> None:
    import anndata as ad

    many = ad.concat([query] * 8, index_unique="-")
    table = trained._state.dit.class_embeddings["donor"].weight
    moved = []
    for cells in (query[:4].copy(), many):
        row = trained.extend(cells, donor=NEW, seed=0)._state.dit.class_embeddings["donor"].weight[2]
        moved.append(float((row - table[:2].mean(0)).detach().norm()))
    assert 0 < moved[0] < moved[1]


def test_fitted_rows_explain_the_cells_better(trained: Any) -> None:
    dit, generator = trained._state.dit, torch.Generator().manual_seed(0)
    shape = (400, trained.config.vae.latent_tokens, trained.config.vae.n_channels)
    latents = torch.randn(shape, generator=generator) * 0.3 + torch.linspace(-1, 1, shape[2])
    labels = torch.tensor([[0, 0, 0]]).repeat(400, 1)
    prior = Prior(dit.class_embeddings["donor"].weight.detach()[0], 0.5)
    fitted = fit_embeddings(dit, latents, labels, {"donor": ([0], prior)}, seed=0, n_steps=60)["donor"]
    assert torch.equal(fitted[1:], dit.class_embeddings["donor"].weight.detach()[1:])
    noise, t = torch.randn(shape, generator=generator), torch.rand(400, generator=generator)
    x_t, u = interpolate(noise, latents, t)
    with torch.no_grad():
        tables = (dit.class_embeddings["donor"].weight, fitted)
        losses = [
            flow_loss(torch.func.functional_call(dit, {ROW: table}, (x_t, t, labels)), u).mean() for table in tables
        ]
    assert losses[1] < losses[0]


def test_what_is_refused(trained: Any, query: Any, simulated: Any) -> None:
    with pytest.raises(DataError, match="knows the donor 'CE0008162' already"):
        trained.extend(simulated, donor="CE0008162")
    with pytest.raises(DataError, match="no cell of the donor 'D9'"):
        trained.extend(query, donor="D9")
    with pytest.raises(DataError, match="say what is new"):
        trained.extend(query)
    with pytest.raises(DataError, match="different labels"):
        trained.extend(query, donor=[NEW, NEW])
    with pytest.raises(GeneMismatchError):
        trained.extend(query[:, :40].copy(), donor=NEW)
    other = query.copy()
    other.obs["perturbation"] = "GATA4"
    with pytest.raises(UnknownCategoryError, match="GATA3"):
        trained.extend(other, donor=NEW)
    counts = query.copy()
    counts.X = counts.X * 0.5
    with pytest.raises(DataError, match="count"):
        trained.extend(counts, donor=NEW)


def test_an_attribute_without_a_column_cannot_grow(simulated: Any, quick: dict[str, Any], trained: Any) -> None:
    from scldm_cd4.extension import new_levels

    registry = trained._state.registry
    without = replace(registry, timepoint=replace(registry.timepoint, column=None))
    with pytest.raises(DataError, match="without a timepoint column"):
        new_levels(without, {"timepoint": "Stim48hr"})


def test_load_query_data(trained: Any, extended: Any, query: Any, simulated: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    found = CD4Model.load_query_data(query, tmp_path / "model", seed=0)
    assert found.donors == extended.donors
    assert torch.equal(found._state.tensors()[f"dit.{ROW}"], extended._state.tensors()[f"dit.{ROW}"])
    assert found.adata is query
    same = CD4Model.load_query_data(simulated, trained)
    assert same.donors == trained.donors
    with pytest.raises(DataError, match="query cells first"):
        CD4Model.load_query_data(str(tmp_path / "model"), query)


def test_a_model_for_query_cells_is_one_of_its_own(trained: Any, simulated: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    model = CD4Model.load(tmp_path / "model")
    ask = {"perturbation": "GATA3", "donor": "CE0008162", "timepoint": "Rest", "n_cells": 20, "seed": 0}
    before, facts = model.generate(**ask), dict(model.training_)
    other = CD4Model.load_query_data(simulated[:150].copy(), model)
    assert (other.generate(**ask).X != before.X).nnz == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        other.train(seed=1, stage="flow")
    after = model.generate(**ask)
    assert (after.X != before.X).nnz == 0
    assert (other.generate(**ask).X != before.X).nnz > 0
    assert after.uns["scldm_cd4"]["model_hash"] == before.uns["scldm_cd4"]["model_hash"]
    assert model.training_ == facts != other.training_


def test_a_model_without_a_flow_takes_query_cells(trained: Any, simulated: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    model = CD4Model.load(tmp_path / "model")
    model._state.dit = None
    np.testing.assert_array_equal(
        CD4Model.load_query_data(simulated, model).get_latent(indices=[3]), trained.get_latent(indices=[3])
    )


def test_cells_in_files_that_hold_others_too(trained: Any, simulated: Any, query: Any, tmp_path: Path) -> None:
    adata = datasets.synthetic_cd4(300, 50, n_perturbations=3, n_donors=3, n_timepoints=2, seed=0)
    (adata[~adata.obs["donor_id"].isin([NEW])].copy()).write_h5ad(tmp_path / "known.h5ad")
    query.write_h5ad(tmp_path / "query.h5ad")
    cells = open_cells([tmp_path / "known.h5ad", tmp_path / "query.h5ad"])
    rows = {}
    for name, model in {
        "memory": trained.extend(query, donor=NEW, seed=0),
        "files": trained.extend(cells, donor=NEW, seed=0),
        "query": CD4Model.load_query_data(cells, trained, seed=0),
    }.items():
        assert model.training_["extensions"][0]["n_cells"] == query.n_obs
        rows[name] = model._state.tensors()[f"dit.{ROW}"]
    assert torch.equal(rows["files"], rows["memory"])
    assert torch.equal(rows["query"], rows["memory"])


def test_query_distance(trained: Any, simulated: Any, query: Any, tmp_path: Path) -> None:
    table = trained.query_distance()
    assert list(table.columns) == ["latent_distance", "latent_percentile", "nll", "nll_percentile", "is_far"]
    assert table.index.equals(simulated.obs_names)
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    assert table["latent_percentile"].between(0, 100).all()
    assert table.attrs["held_out"]
    trained.save(tmp_path / "model")
    loaded = CD4Model.load(tmp_path / "model")
    assert loaded.query_distance(query).equals(trained.query_distance(query))  # its donor is not known to the model
    some = trained.query_distance(indices=[5, 2])
    np.testing.assert_allclose(some["nll"], table["nll"].iloc[[5, 2]], rtol=1e-4)
    held = table.iloc[trained.validation_indices]
    assert held["is_far"].mean() <= 2.5 / len(held)


def test_shuffled_genes_are_far(trained: Any, simulated: Any) -> None:
    odd = simulated[:60].copy()
    odd.X = odd.X[:, np.random.default_rng(0).permutation(50)]
    assert trained.query_distance(odd)["is_far"].mean() > 0.8
    with pytest.warns(UserWarning, match="lie farther from the training cells"):
        trained.generate("GATA3", cells=odd, seed=0)
    odd.obs["donor_id"] = NEW
    with pytest.warns(UserWarning, match="lie farther from the training cells"):
        trained.extend(odd, donor=NEW, seed=0)


def test_a_model_without_its_training_cells_needs_others(trained: Any, simulated: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    model = CD4Model.load(tmp_path / "model")
    model._state.familiarity = None
    with pytest.raises(DataError, match="reference="):
        model.query_distance(simulated)
    table = model.query_distance(simulated, reference=simulated)
    assert table["is_far"].mean() < 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("GATA3", cells=simulated[:3].copy(), seed=0)

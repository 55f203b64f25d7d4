"""Cells of conditions: what can be asked for, what comes out, what is refused."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scldm_cd4 import DataError, GeneMismatchError, UnknownCategoryError
from scldm_cd4.config import ROLES

DONORS = ["CE0008162", "CE0010866"]


@pytest.fixture(scope="module")
def names(trained: Any) -> list[str]:
    """Three perturbations; the first has no training cell with the first donor."""
    return [p for p in trained.perturbations if p != "NTC"]


@pytest.fixture(scope="module")
def cells(trained: Any) -> Any:
    return trained.generate(perturbation="NTC", donor=DONORS[0], timepoint="Rest", n_cells=20, seed=0)


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a.X.toarray(), b.X.toarray()) and a.obs_names.equals(b.obs_names))


# ------------------------------------------------------------------------------------------------ what comes out


def test_cells_are_labelled_counts_with_evidence(trained: Any, cells: Any, simulated: Any) -> None:
    assert sparse.isspmatrix_csr(cells.X)
    assert cells.X.dtype == np.float32
    assert (cells.X.data >= 1).all()
    assert np.array_equal(cells.X.data, np.round(cells.X.data))
    assert cells.var_names.equals(simulated.var_names)
    assert not cells.layers
    assert cells.obs_names.is_unique
    for column in ("perturbation", "donor_id", "timepoint"):
        assert isinstance(cells.obs[column].dtype, pd.CategoricalDtype)
    assert cells.obs["is_generated"].all()
    assert (cells.obs["size_factor"] > 0).all()
    train = simulated.obs.iloc[trained.train_indices]
    control = train[train["perturbation"] == "NTC"]
    here = (control["donor_id"] == DONORS[0]) & (control["timepoint"] == "Rest")
    assert (cells.obs["n_train_cells"] == here.sum()).all()
    assert (cells.obs["n_train_contexts"] == 4).all()


def test_provenance(trained: Any, cells: Any) -> None:
    facts = cells.uns["scldm_cd4"]
    assert (facts["perturbation_key"], facts["donor_key"], facts["timepoint_key"]) == (
        "perturbation",
        "donor_id",
        "timepoint",
    )
    assert facts["control"] == "NTC"
    assert (facts["solver"], facts["n_steps"], facts["guidance"], facts["seed"]) == ("midpoint", 6, 1.0, 0)
    assert facts["units"].startswith("counts")
    assert len(facts["model_hash"]) == 16


@pytest.mark.parametrize("guidance", [1.0, {"donor": 2.0, "timepoint": 2.0, "perturbation": 2.0}])
def test_file_round_trip(trained: Any, tmp_path: Path, guidance: Any) -> None:
    cells = trained.generate("NTC", n_cells=3, seed=0, guidance=guidance)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(cells.obs, again.obs, check_index_type=False, check_categorical=False)
    assert again.uns["scldm_cd4"]["seed"] == 0
    assert same(cells, again)


def test_lists_are_a_cross_product_in_the_order_of_the_roles(trained: Any, names: list[str]) -> None:
    cells = trained.generate([names[1], "NTC"], DONORS, "Rest", n_cells=2, seed=0)
    assert ROLES == ("donor", "timepoint", "perturbation")
    assert list(cells.obs["donor_id"]) == [DONORS[0]] * 4 + [DONORS[1]] * 4
    assert list(cells.obs["perturbation"]) == [names[1], names[1], "NTC", "NTC"] * 2


def test_none_is_all_trained_levels(trained: Any) -> None:
    cells = trained.generate(n_cells=1, seed=0)
    assert cells.n_obs == 4 * 2 * 2


@pytest.mark.parametrize("form", [list, np.array, pd.Series, pd.Index, pd.Categorical, tuple])
def test_several_labels_in_any_form(trained: Any, form: Any) -> None:
    assert trained.generate("NTC", form(DONORS), "Rest", n_cells=1, seed=0).n_obs == 2


def test_table_of_conditions(trained: Any, names: list[str]) -> None:
    table = pd.DataFrame(
        {"perturbation": ["NTC", names[1]], "donor_id": DONORS, "timepoint": ["Rest"] * 2, "n_cells": [2, 3]}
    )
    cells = trained.generate(conditions=table, seed=0)
    assert list(cells.obs["perturbation"]) == ["NTC"] * 2 + [names[1]] * 3
    assert same(cells, trained.predict(table, seed=0))
    by_role = table.rename(columns={"donor_id": "donor"}).astype({"perturbation": "category"})
    assert same(cells, trained.generate(conditions=by_role, seed=0))
    pair = trained.generate(conditions=table.drop(columns="n_cells"), n_cells=1, seed=0)
    assert np.array_equal(pair.X.toarray(), cells.X.toarray()[[0, 2]])


def test_a_condition_asked_for_twice_goes_on(trained: Any) -> None:
    once = trained.generate("NTC", DONORS[0], "Rest", n_cells=6, seed=0)
    twice = trained.generate(["NTC", "NTC"], DONORS[0], "Rest", n_cells=3, seed=0)
    assert same(once, twice)
    assert twice.obs_names.is_unique


def test_unseen_combination_is_allowed_and_flagged(trained: Any, names: list[str]) -> None:
    cells = trained.generate(names[0], DONORS, "Rest", n_cells=2, seed=0)
    n = cells.obs.groupby("donor_id", observed=True)["n_train_cells"].first()
    assert n[DONORS[0]] == 0
    assert n[DONORS[1]] > 0
    assert (cells.obs["n_train_contexts"] == 2).all()


@pytest.mark.parametrize("output", ["mean", "lognorm", "latent"])
def test_other_outputs(trained: Any, cells: Any, output: str) -> None:
    other = trained.generate("NTC", DONORS[0], "Rest", n_cells=20, seed=0, output=output)
    assert other.uns["scldm_cd4"]["output"] == output
    assert other.X.dtype == np.float32
    if output == "mean":
        np.testing.assert_allclose(other.X.sum(1), cells.obs["size_factor"], rtol=1e-4)
    elif output == "lognorm":
        counts = cells.X.toarray().astype(float)
        expected = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
        np.testing.assert_allclose(other.X.toarray(), expected, rtol=1e-5)
    else:
        assert other.shape == (20, 16)
        assert np.isfinite(other.X).all()


def test_genes_slices_what_was_drawn_with_all(trained: Any, cells: Any) -> None:
    wanted = [cells.var_names[7], cells.var_names[2]]
    part = trained.generate("NTC", DONORS[0], "Rest", n_cells=20, seed=0, genes=wanted)
    assert list(part.var_names) == wanted
    assert np.array_equal(part.X.toarray(), cells[:, wanted].X.toarray())


def test_size_factors(trained: Any) -> None:
    ask = {"perturbation": "NTC", "donor": DONORS[0], "timepoint": "Rest", "n_cells": 4, "seed": 0}
    assert (trained.generate(**ask, size_factors=500).obs["size_factor"] == 500).all()
    given = [100.0, 200.0, 300.0, 400.0]
    cells = trained.generate(**ask, size_factors=given, output="mean")
    np.testing.assert_allclose(cells.X.sum(1), given, rtol=1e-4)
    typical = trained.generate(**ask, size_factors="context").obs["size_factor"]
    assert typical.nunique() == 1
    drawn = trained.generate(**ask | {"n_cells": 2000}, output="latent").obs["size_factor"]
    assert np.median(drawn) == pytest.approx(typical.iloc[0], rel=0.1)
    for bad in (0, -1, np.nan, 1e12, [1, 2], "other", ["a"] * 4):
        with pytest.raises(DataError, match="size_factors"):
            trained.generate(**ask, size_factors=bad)


def test_guidance_holds_within_its_interval(trained: Any, cells: Any) -> None:
    def drawn(**options: Any) -> Any:
        request = {"donor": DONORS[0], "timepoint": "Rest", "n_cells": cells.n_obs, "seed": 0}
        return trained.generate("NTC", **request, guidance=2.0, **options)

    between_steps = drawn(guidance_interval=(0.99, 0.995))
    assert same(between_steps, cells)
    assert between_steps.uns["scldm_cd4"]["guidance_interval"] == {"from": 0.99, "to": 0.995}
    assert not same(drawn(guidance_interval=(0.4, 0.6)), cells)
    assert not same(drawn(guidance_interval=(0.4, 0.6)), drawn())


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_cells": 0}, DataError, "at least 1"),
        ({"n_cells": -3}, DataError, "at least 1"),
        ({"n_cells": 1.5}, DataError, "whole number"),
        ({"n_cells": True}, DataError, "whole number"),
        ({"n_cells": float("nan")}, DataError, "whole number"),
        ({"guidance": -1.0}, DataError, "at least 0"),
        ({"guidance": float("nan")}, DataError, "finite"),
        ({"guidance": float("inf")}, DataError, "finite"),
        ({"guidance": None}, DataError, "None"),
        ({"guidance": {"perturbation": 2.0}}, DataError, "one guidance weight"),
        ({"guidance": {"sex": 2.0}}, DataError, "sex"),
        ({"guidance_interval": (0.9, 0.1)}, DataError, "guidance interval"),
        ({"n_steps": 0}, DataError, "n_steps"),
        ({"n_steps": 1.5}, DataError, "n_steps"),
        ({"solver": "newton"}, DataError, "midpoint"),
        ({"output": "rank"}, DataError, "lognorm"),
        ({"precision": "fp8"}, DataError, "precision"),
        ({"batch_size": 0}, DataError, "batch_size"),
        ({"seed": -1}, DataError, "seed"),
        ({"seed": 1.5}, DataError, "seed"),
        ({"perturbation": "NOTAGENE"}, UnknownCategoryError, "'perturbation'"),
        ({"perturbation": "ntc"}, UnknownCategoryError, "Near matches: 'NTC'"),
        ({"perturbation": []}, DataError, "empty list"),
        ({"perturbation": ad.AnnData(np.ones((2, 2)))}, DataError, "takes labels, got AnnData.*cells="),
        ({"donor": pd.DataFrame({"donor_id": ["CE0008162"]})}, DataError, "takes labels, got DataFrame.*conditions="),
        ({"perturbation": [None]}, UnknownCategoryError, "None"),
        ({"donor": "D9"}, UnknownCategoryError, "CE0008162"),
        ({"donor_id": "CE0008162"}, DataError, r"declared as the donor, so its labels go to donor="),
        ({"pertubation": "NTC"}, TypeError, "unexpected keyword argument 'pertubation'"),
        ({"genes": ["NOTAGENE"]}, GeneMismatchError, "NOTAGENE"),
        ({"genes": []}, GeneMismatchError, "at least one"),
        ({"genes": "GATA3", "output": "latent"}, DataError, "no meaning"),
        ({"conditions": pd.DataFrame({"perturbation": ["NTC"]}), "perturbation": "NTC"}, DataError, "not both"),
        ({"conditions": pd.DataFrame({"perturbation": ["NTC"]})}, DataError, "needs a column 'donor_id'"),
        ({"conditions": pd.DataFrame({"perturbation": ["NTC"], "n": [3]})}, DataError, "column 'n'.*'n_cells'"),
        ({"conditions": pd.DataFrame()}, DataError, "no rows"),
        ({"conditions": {"perturbation": ["NTC"]}}, DataError, "DataFrame"),
    ],
)
def test_refused(trained: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        trained.generate(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pertubation": ["NTC"]}, DataError, "Near matches: 'perturbation'"),
        ({"donor": [DONORS[0]]}, DataError, "twice"),
        ({"n_cells": [0]}, DataError, "row 0"),
        ({"timepoint": [np.nan]}, DataError, "without a label"),
        ({"timepoint": ["Stim99hr"]}, UnknownCategoryError, "Stim99hr"),
    ],
)
def test_table_refused(trained: Any, change: dict[str, Any], error: Any, message: str) -> None:
    table = pd.DataFrame({"perturbation": ["NTC"], "donor_id": [DONORS[0]], "timepoint": ["Rest"]}).assign(**change)
    with pytest.raises(error, match=message):
        trained.generate(conditions=table)


def test_level_without_training_cells_is_refused(trained: Any, names: list[str]) -> None:
    from dataclasses import replace

    from scldm_cd4.conditions import resolve_requests

    registry = trained._state.registry
    counts = {p: v for p, v in registry.train_counts.items() if p != names[2]}
    registry = replace(registry, train_counts=counts)
    with pytest.raises(UnknownCategoryError, match="without any training cell"):
        resolve_requests(registry, perturbation=names[2])
    assert names[2] not in {r.labels[2] for r in resolve_requests(registry)}


# ----------------------------------------------------------------------------------------------------------- guidance


def test_d1_unconditional_cells_do_not_depend_on_labels_and_say_so(trained: Any, names: list[str]) -> None:
    ask = {"guidance": 0, "seed": 0, "n_cells": 4}
    cells = [trained.generate(p, **ask) for p in ("NTC", names[1], None)]
    assert all(same(cells[0], other) for other in cells[1:])
    for column in ("perturbation", "donor_id", "timepoint"):
        assert set(cells[0].obs[column]) == {"unconditional"}
    assert (cells[0].obs["n_train_cells"] == len(trained.train_indices)).all()
    conditional = trained.generate("NTC", DONORS[0], "Rest", n_cells=4, seed=0)
    assert not np.array_equal(cells[0].X.toarray(), conditional.X.toarray())


def test_d6_one_weight_serves_all_attributes(trained: Any) -> None:
    ask = {"perturbation": "NTC", "donor": DONORS[0], "timepoint": "Rest", "n_cells": 3, "seed": 0}
    assert same(trained.generate(**ask, guidance=2.0), trained.generate(**ask, guidance=dict.fromkeys(ROLES, 2.0)))
    assert not same(trained.generate(**ask, guidance=2.0), trained.generate(**ask))


@pytest.mark.parametrize(("guidance", "rows_per_cell"), [(0.0, 12), (1.0, 12), (1.5, 24)])
def test_p1_network_rows(trained: Any, monkeypatch: pytest.MonkeyPatch, guidance: float, rows_per_cell: int) -> None:
    rows: list[int] = []
    dit = trained._state.dit
    handle = dit.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        trained.generate("NTC", DONORS[0], "Rest", n_cells=128, seed=0, guidance=guidance, output="latent")
    finally:
        handle.remove()
    assert sum(rows) == 128 * rows_per_cell


def test_p7_library_sizes_are_drawn_by_block(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scldm_cd4.size_factors import SizeFactors

    calls: list[int] = []
    sample = SizeFactors.sample

    def spy(self: Any, donor: Any, timepoint: Any, uniform: Any, perturbation: Any) -> Any:
        calls.append(len(uniform))
        return sample(self, donor, timepoint, uniform, perturbation)

    monkeypatch.setattr(SizeFactors, "sample", spy)
    trained.generate("NTC", DONORS[0], "Rest", n_cells=300, seed=0, output="latent")
    assert sum(calls) == 300
    assert len(calls) <= 4


def test_d3_size_factors_come_with_the_model_and_fit_its_contexts(trained: Any, simulated: Any) -> None:
    cells = trained.generate("NTC", n_cells=500, seed=0, output="latent")
    train = simulated[trained.train_indices]
    real = pd.Series(np.asarray(train.X.sum(axis=1)).ravel(), index=train.obs_names)
    for (donor, time), made in cells.obs.groupby(["donor_id", "timepoint"], observed=True)["size_factor"]:
        here = real[(train.obs["donor_id"] == donor).to_numpy() & (train.obs["timepoint"] == time).to_numpy()]
        assert np.log(made).mean() == pytest.approx(np.log(here).mean(), abs=0.1)
        assert here.min() <= made.min()
        assert made.max() <= here.max()


# ------------------------------------------------------------------------------------------------------- to a file


@pytest.mark.parametrize("output", ["counts", "mean", "lognorm", "latent"])
def test_streamed_file_holds_the_same_cells(trained: Any, tmp_path: Path, output: str) -> None:
    ask = {"perturbation": "NTC", "n_cells": 150, "seed": 0, "output": output}
    memory = trained.generate(**ask)
    path = tmp_path / "a folder" / "cells.h5ad"
    disk = trained.generate(**ask, out=path)
    assert disk.isbacked
    loaded = disk.to_memory()
    disk.file.close()
    a, b = (x.X.toarray() if sparse.issparse(x.X) else x.X for x in (memory, loaded))
    assert np.array_equal(a, b)
    pd.testing.assert_frame_equal(memory.obs, loaded.obs, check_index_type=False, check_categorical=False)
    assert list(loaded.var_names) == list(memory.var_names)
    assert [p.name for p in path.parent.iterdir()] == ["cells.h5ad"]


def test_file_is_never_overwritten_unasked(trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        trained.generate("NTC", n_cells=1, out=path)
    assert path.read_text() == "precious"
    trained.generate("NTC", n_cells=1, seed=0, out=path, overwrite=True).file.close()
    assert ad.read_h5ad(path).n_obs == 4
    with pytest.raises(DataError, match="h5ad"):
        trained.generate("NTC", n_cells=1, out=tmp_path / "cells.csv")


def test_a_failure_leaves_no_file(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scldm_cd4.sinks import FileSink

    def fail(self: Any, *args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSink, "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        trained.generate("NTC", n_cells=1, out=tmp_path / "cells.h5ad")
    assert list(tmp_path.iterdir()) == []


def test_p11_cells_leave_memory_as_they_come(trained: Any) -> None:
    from scldm_cd4._parallel import in_order

    started: list[int] = []
    results = in_order(lambda i: started.append(i) or i, range(1000), 2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(started) < 20
    results.close()


@pytest.mark.parametrize("label", ["A_B", "a:b", "a\\:b", "é ü", "unconditional"])
def test_odd_labels(simulated: Any, quick: Any, label: str, tmp_path: Path) -> None:
    from scldm_cd4.conditions import Request
    from scldm_cd4.output import describe_cells
    from scldm_cd4.registry import Attribute, Registry

    registry = Registry(
        genes=("G",),
        donor=Attribute("donor", "d", ("A", "b", label)),
        timepoint=Attribute("timepoint", None, ("all",)),
        perturbation=Attribute("perturbation", "p", ("B_C", "C", label)),
    )
    pairs = [(d, p) for d in registry.donor.levels for p in registry.perturbation.levels]
    obs = describe_cells(registry, [Request((d, "all", p), 2) for d, p in pairs], np.ones(18))
    assert obs.index.is_unique
    assert list(obs["p"][::2]) == [p for _, p in pairs]
    cells = ad.AnnData(np.ones((18, 1)), obs=obs)
    cells.write_h5ad(tmp_path / "x.h5ad")
    assert list(ad.read_h5ad(tmp_path / "x.h5ad").obs["p"]) == list(obs["p"])

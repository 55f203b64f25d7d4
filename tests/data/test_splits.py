"""Splits: nothing lost, conditions kept in proportion, hold-outs complete, too little data said in a sentence."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scldm_cd4._errors import DataError, UnknownCategoryError
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.setup import setup_anndata
from scldm_cd4.data.splits import Split, make_split


def make(sizes: dict[tuple[str, str, str], int], **obs: object) -> CellData:
    rows = [key for key, n in sizes.items() for _ in range(n)]
    table = pd.DataFrame(rows, columns=["donor_id", "time", "guide"], index=[f"c{i}" for i in range(len(rows))])
    table = table.sample(frac=1, random_state=0).assign(**obs)
    adata = ad.AnnData(np.ones((len(rows), 3)), obs=table)
    setup_anndata(adata, perturbation_key="guide", donor_key="donor_id", timepoint_key="time")
    return CellData.from_adata(adata)


def grid(n: int = 20) -> CellData:
    return make({(d, t, p): n for d in ("d1", "d2") for t in ("Rest", "Stim") for p in ("A", "B", "NTC")})


def assert_whole(cells: CellData, split: Split) -> None:
    parts = np.concatenate([split.train, split.validation, split.test])
    np.testing.assert_array_equal(np.sort(parts), np.arange(cells.n_cells))
    assert json.loads(json.dumps(split.spec)) == split.spec
    assert split.spec["n_cells"] == {
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
    }


def test_default_is_stratified_by_condition():
    cells = grid()
    split = make_split(cells, seed=0)
    assert_whole(cells, split)
    assert len(split.test) == 0
    codes, n = np.unique(cells.labels[split.validation], axis=0, return_counts=True)
    assert (len(codes), set(n)) == (12, {2})


def test_seed_decides():
    cells = grid()
    first, again, other = (make_split(cells, seed=s).validation for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_small_conditions_stay_in_training():
    cells = make({("d", "t", "A"): 100, ("d", "t", "B"): 9, ("d", "t", "C"): 1})
    split = make_split(cells, 0.1, seed=0)
    assert_whole(cells, split)
    assert set(cells.obs["guide"].iloc[split.validation]) == {"A"}
    assert len(split.validation) == 10


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    validation=st.floats(0, 0.6),
    test=st.floats(0, 0.35),
    seed=st.integers(0, 5),
)
def test_nothing_is_lost_and_every_condition_keeps_a_training_cell(sizes, validation, test, seed):
    cells = make({("d", "t", f"p{i}"): n for i, n in enumerate([*sizes, 10])})
    split = make_split(cells, {"validation": validation, "test": test}, seed=seed)
    assert_whole(cells, split)
    assert len(np.unique(cells.labels[split.train], axis=0)) == len(sizes) + 1


@pytest.mark.parametrize("n", [2, 5, 9])
def test_fewer_than_ten_cells_do_not_all_go_to_validation(n):
    split = make_split(make({("d", "t", "A"): n}), seed=0)
    assert len(split.train) == n - 1
    assert len(split.validation) == 1


def test_conditions_of_single_cells():
    cells = make({("d", "t", f"p{i}"): 1 for i in range(6)})
    with pytest.raises(DataError, match="no condition has two cells.*validation to 0"):
        make_split(cells, seed=0)
    assert len(make_split(cells, 0.0, seed=0).train) == 6


def test_hold_out_takes_cells_with_any_listed_label():
    cells = grid()
    with pytest.warns(UserWarning, match="no training cell is left") as caught:
        split = make_split(cells, {"hold_out": {"perturbation": ["A"], "donor_id": "d2"}}, seed=0)
    assert_whole(cells, split)
    obs = cells.obs
    np.testing.assert_array_equal(split.test, np.flatnonzero((obs["guide"] == "A") | (obs["donor_id"] == "d2")))
    assert split.spec["untrained"] == {"donor": ["d2"], "perturbation": ["A"]}
    assert split.spec["hold_out"] == {"perturbation": ["A"], "donor": ["d2"]}
    assert sorted("donor" in str(w.message) for w in caught) == [False, True]
    assert len(split.validation) == 8  # 10 % of the others
    registry = cells.registry.with_training(cells.labels[split.train], cells.library[split.train])
    assert registry.untrained("donor") == ("d2",)


@pytest.mark.parametrize("form", ["frame", "records"])
def test_combination_hold_out(form):
    cells = grid()
    frame = pd.DataFrame({"perturbation": ["A", "B"], "donor_id": ["d1", "d2"], "timepoint": ["Stim", "Rest"]})
    conditions = frame if form == "frame" else frame.to_dict("records")
    split = make_split(cells, {"conditions": conditions, "validation": 0}, seed=0)
    assert_whole(cells, split)
    assert len(split.test) == 40
    held = cells.obs.iloc[split.test][["donor_id", "time", "guide"]].drop_duplicates().to_numpy().tolist()
    assert sorted(held) == [["d1", "Stim", "A"], ["d2", "Rest", "B"]]
    assert split.spec["untrained"] == {}
    assert len(split.validation) == 0


def test_a_row_of_conditions_may_leave_columns_out():
    cells = grid()
    split = make_split(cells, {"conditions": [{"guide": "A", "donor": "d1"}]}, seed=0)
    assert set(cells.obs["time"].iloc[split.test]) == {"Rest", "Stim"}
    assert len(split.test) == 40


def test_column_and_array():
    values = np.array(["train", "validation", "test", "train"] * 60)
    cells = grid()
    cells.obs["part"] = pd.Categorical(values)
    for split in (make_split(cells, "part", seed=0), make_split(cells, values, seed=1)):
        assert_whole(cells, split)
        np.testing.assert_array_equal(split.test, np.flatnonzero(values == "test"))
        np.testing.assert_array_equal(split.validation, np.flatnonzero(values == "validation"))
    np.testing.assert_array_equal(make_split(cells, cells.obs["part"], seed=0).test, split.test)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("prt", "'prt' is not a column"),
        (["train"] * 3, "one value for each of the 240 cells"),
        (["train"] * 239 + ["tset"], "'tset'"),
        (["train"] * 239 + [None], "missing or empty in 1 of 240"),
        (["test"] * 240, "no cell is left for training"),
        (pd.Series(["train"] * 240), "index of the split differs"),
        (1.0, "share for validation"),
        (-0.1, "share for validation"),
        (float("nan"), "share for validation"),
        (True, "one value for each"),
        ({"validaton": 0.1}, "Near matches: 'validation'"),
        ({"validation": 0.5, "test": 0.5}, "nothing for training"),
        ({"hold_out": ["A"]}, "by role"),
        ({"hold_out": {"gene": ["A"]}}, "'gene' is neither a role"),
        ({"hold_out": {"donor": ["d1", "d2"]}}, "no cell is left for training"),
        ({"conditions": [{}]}, "every row"),
    ],
)
def test_what_is_refused(split, message):
    with pytest.raises(DataError, match=message):
        make_split(grid(), split, seed=0)


def test_unknown_label_to_hold_out():
    with pytest.raises(UnknownCategoryError, match="'a'.*Near matches: 'A'"):
        make_split(grid(), {"hold_out": {"perturbation": "a"}}, seed=0)


def test_combination_without_cells():
    cells = make({("d1", "t", "A"): 20, ("d2", "t", "B"): 20})
    with pytest.raises(DataError, match="no cell with"):
        make_split(cells, {"conditions": [{"donor": "d1", "perturbation": "B"}]}, seed=0)


def test_labels_are_needed():
    cells = grid()
    cells.labels = None
    with pytest.raises(DataError, match="labels=True"):
        make_split(cells, seed=0)

"""Plots of a ranking."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import DataError, pl


@pytest.fixture(scope="module")
def signature(four_donors: Any) -> pd.Series:
    return four_donors.var["true_th1_axis"] + 0.01 * np.arange(four_donors.n_vars)


@pytest.fixture(scope="module")
def table(ranked: Any, signature: pd.Series) -> pd.DataFrame:
    return ranked.rank_perturbations(signature, effects="observed", n_cells=20, seed=0)


@pytest.fixture(scope="module")
def each(ranked: Any, signature: pd.Series) -> pd.DataFrame:
    return ranked.rank_perturbations(signature, effects="observed", donor="each", timepoint="each", n_cells=20, seed=0)


def test_waterfall(table: pd.DataFrame, each: pd.DataFrame) -> None:
    ax = pl.waterfall(table, known=["GATA3"], n_named=1, title="SIMULATED")
    assert {text.get_text() for text in ax.texts} == {"GATA3", *table["perturbation"].iloc[[0, -1]]}
    ax.figure.canvas.draw()
    with pytest.raises(DataError, match="several donors"):
        pl.waterfall(each)
    with pytest.raises(DataError, match="none of the known"):
        pl.waterfall(table, known=["nobody"])


def test_heatmap(table: pd.DataFrame, each: pd.DataFrame) -> None:
    ax = pl.ranking_heatmap(each, n=5)
    assert ax.images[0].get_array().shape == (5, 8)
    first = each.groupby("perturbation")["score"].mean().idxmax()
    assert ax.get_yticklabels()[0].get_text() == first
    named = each.assign(timepoint=each["timepoint"].astype(str).map({"Rest": "48 h", "Stim8hr": "8 h"}))
    labels = [label.get_text() for label in pl.ranking_heatmap(named).get_xticklabels()]
    assert [label.split(", ")[0] for label in labels] == ["8 h"] * 4 + ["48 h"] * 4
    with pytest.raises(DataError, match="one group"):
        pl.ranking_heatmap(table)


def test_card_names_the_genes_that_drive_the_score(table: pd.DataFrame, four_donors: Any) -> None:
    figure = pl.candidate_card(table, "GATA3")
    figure.canvas.draw()
    donors, genes, _ = figure.axes
    assert len(donors.get_xticklabels()) == 5
    named = [label.get_text() for label in genes.get_yticklabels()]
    axis = four_donors.var["true_th1_axis"]
    assert "GATA3" not in named
    assert (axis[named] != 0).mean() > 0.7
    with pytest.raises(DataError, match="no score"):
        pl.candidate_card(table, "nobody")


def test_card_is_silent_on_training_cells_that_are_not_known(table: pd.DataFrame) -> None:
    """As of an imported checkpoint."""
    words = pl.candidate_card(table, "GATA3").axes[2].texts[0].get_text()
    assert "trained on" in words
    unknown = pl.candidate_card(table.assign(n_train_cells=np.nan, n_train_contexts=np.nan), "GATA3")
    lines = words.splitlines()
    assert unknown.axes[2].texts[0].get_text().splitlines() == [line for line in lines if "trained on" not in line]

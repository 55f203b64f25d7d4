"""Plots: what they draw, that they leave pyplot alone, and how they refuse."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scldm_cd4 import pl
from scldm_cd4._errors import DataError


@pytest.fixture
def plane() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, 2))


def points(ax: Axes) -> np.ndarray:
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])


def test_embedding_draws_every_cell_once_in_shuffled_order(plane):
    groups = np.repeat(["a", "b"], 30)
    ax = pl.embedding(plane, groups, title="cells")
    drawn = points(ax)
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, plane))
    assert not np.array_equal(drawn, plane)
    colours = ax.collections[-1].get_facecolors()[:, :3]
    first_half = {tuple(colour) for colour in colours[:10]}
    assert len(first_half) == 2  # neither group lies on top
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_title() == "cells"


def test_same_seed_same_order(plane):
    groups = np.repeat(["a", "b"], 30)
    np.testing.assert_array_equal(points(pl.embedding(plane, groups)), points(pl.embedding(plane, groups)))


def test_unnamed_groups_are_grey_and_below(plane):
    groups = np.repeat(["a", "b", "c"], 20)
    ax = pl.embedding(plane, groups, named=["b"])
    below, above = ax.collections
    assert len(below.get_offsets()) == 40
    assert len(above.get_offsets()) == 20
    assert np.ptp(below.get_facecolors()[0, :3]) == 0
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b", "others"]


def test_embedding_draws_on_given_axes(plane):
    ax = Figure().subplots()
    assert pl.embedding(plane, ["a"] * 60, ax=ax) is ax


def test_figure_has_both_kinds_and_shared_limits(plane, tmp_path: Path):
    figure = pl.real_vs_generated(
        plane, plane + 5, ["x"] * 60, ["y"] * 60, named=["x", "y"], title="SIMULATED", names=("seen", "made")
    )
    both, real, made = figure.axes
    assert len(points(both)) == 120
    np.testing.assert_array_equal(np.sort(points(real), axis=0), np.sort(plane, axis=0))
    assert real.get_xlim() == made.get_xlim() == both.get_xlim()
    assert figure.get_suptitle() == "SIMULATED"
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_colours_differ_also_in_lightness():
    from matplotlib.colors import to_rgb

    from scldm_cd4.pl._embedding import COLOURS, REST

    shades = np.array([to_rgb(colour) for colour in (*COLOURS, REST)])
    apart = np.linalg.norm(shades[:, None] - shades[None], axis=2)[np.triu_indices(len(shades), 1)]
    assert apart.min() > 0.2


@pytest.mark.parametrize(
    ("n_groups", "n_labels", "message"), [(60, 60, "name at most 7"), (1, 59, "do not fit 59 groups")]
)
def test_embedding_refuses(plane, n_groups: int, n_labels: int, message: str):
    with pytest.raises(DataError, match=message):
        pl.embedding(plane, [f"g{i % n_groups}" for i in range(n_labels)])


def test_embed_like_needs_reference_cells(plane):
    with pytest.raises(DataError, match="at least 4"):
        pl.embed_like(plane[:3], plane)


@pytest.mark.slow
def test_embed_like_is_shaped_by_the_reference_alone():
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.normal(size=(80, 5)), rng.normal(size=(80, 5)) + 12])
    near, far = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)) + 12
    both = pl.embed_like(reference, near, far)
    again = pl.embed_like(reference, near)
    assert [x.shape for x in both] == [(40, 2), (40, 2)]
    np.testing.assert_array_equal(both[0], again[0])
    assert np.linalg.norm(both[0].mean(axis=0) - both[1].mean(axis=0)) > 3 * both[0].std(axis=0).max()

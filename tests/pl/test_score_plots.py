"""Plots of trainings, effects, scores and quality: what they draw, write and refuse."""

import sys
from itertools import combinations
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from scldm_cd4 import CD4Model, DataError, GeneMismatchError, metrics, pl

FACTS = {"perturbation_key": "perturbation", "donor_key": "donor", "control": "NT", "output": "counts"}


def cells(n: int, seed: int, *, effect: float = 2.0) -> Any:
    """Counts of 30 genes; the perturbation A doubles the first three, and its own gene falls."""
    rng = np.random.default_rng(seed)
    labels = np.tile(["A", "NT"], n)
    mean = np.full((2 * n, 30), 4.0)
    mean[labels == "A", :3] *= effect
    mean[labels == "A", 3] = 0.3
    obs = pd.DataFrame(
        {"perturbation": labels, "donor": np.repeat(["d1", "d2"], n)}, index=[f"c{i}" for i in range(2 * n)]
    )
    names = [f"g{i}" for i in range(30)]
    names[3], names[4] = "A", "_x$y$"
    return ad.AnnData(rng.poisson(mean).astype(np.float32), obs=obs, var=pd.DataFrame(index=names))


@pytest.fixture(scope="module")
def real() -> Any:
    return cells(120, 0)


@pytest.fixture(scope="module")
def generated() -> Any:
    out = cells(100, 1)
    out.uns["scldm_cd4"] = dict(FACTS)
    return out[:, ::-1].copy()


def named(ax: Any) -> set[str]:
    return {text.get_text() for text in ax.texts if text.get_text() and "\n" not in text.get_text()}


def test_delta_scatter_draws_effects_against_real_controls(real: Any, generated: Any, tmp_path: Any) -> None:
    ax = pl.delta_scatter(real, generated, "A", n_named=3, genes=["g9"], save=tmp_path / "a.png")
    assert named(ax) == {"g0", "g1", "g2", "g9"}
    x, y = np.asarray(ax.collections[0].get_offsets()).T
    assert len(x) == 29  # its own gene is a cross
    values, labels = metrics.log_normalize(real), real.obs["perturbation"].to_numpy()
    contexts = real.obs["donor"].to_numpy()
    a, c = labels == "A", labels == "NT"
    expected = metrics.context_delta(values[a], values[c], contexts[a], contexts[c])[real.var_names != "A"]
    np.testing.assert_allclose(x, expected, atol=1e-10)
    assert (y[:3] > 0.3).all()
    note = next(text.get_text() for text in ax.texts if "r = " in text.get_text())
    assert "by chance" in note
    assert "2 contexts" in note
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(GeneMismatchError, match="g1"):
        pl.delta_scatter(real, generated, "A", genes=["g1x"])
    with pytest.raises(DataError, match="no context has real"):
        pl.delta_scatter(real, generated, "B")
    with pytest.raises(DataError, match="cannot be written"):
        pl.delta_scatter(real, generated, "A", save=tmp_path / "a.nothing")


def test_names_stand_apart_and_inside(real: Any, generated: Any) -> None:
    """Also where many genes lie in one heap."""
    ax = pl.delta_scatter(real, generated, "A", n_named=20)
    figure = ax.get_figure()
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts] + [ax.get_legend().get_window_extent()]
    assert len(boxes) == 22
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
    frame = ax.get_window_extent().padded(1.0)
    assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_volcano_of_cells_and_of_tables(generated: Any, real: Any) -> None:
    ax = pl.de_volcano(generated, perturbation="A", n_named=4)
    assert named(ax) == {"g0", "g1", "g2", "A"}
    counts = {text.get_text() for text in ax.get_legend().get_texts()}
    assert "higher (3)" in counts
    table = pd.DataFrame(
        {"names": ["up", "down", "flat"], "logfoldchanges": [2.0, -1.0, 0.1], "pvals_adj": [0.0, 1e-3, 0.9]}
    )
    drawn = Figure().subplots()
    assert pl.de_volcano(table, n_named=1, ax=drawn) is drawn
    assert named(drawn) == {"up"}
    assert np.isfinite(np.concatenate([c.get_offsets() for c in drawn.collections])).all()
    with pytest.raises(DataError, match="none of the columns gene, names"):
        pl.de_volcano(pd.DataFrame({"x": [1]}))
    with pytest.raises(DataError, match="which perturbation"):
        pl.de_volcano(generated)
    with pytest.raises(DataError, match="generate both"):
        pl.de_volcano(generated, perturbation="B")
    with pytest.raises(DataError, match="is not known"):
        pl.de_volcano(real, perturbation="A")


def test_qc_has_equally_many_cells(real: Any, generated: Any) -> None:
    figure = pl.qc(real, generated, title="SIMULATED")
    assert figure.get_suptitle() == "SIMULATED, 200 cells each"
    library = figure.axes[0]
    assert "generated, median" in library.get_legend().get_texts()[1].get_text()
    zeros = np.asarray(figure.axes[2].collections[0].get_offsets())
    a = list(real.var_names).index("A")
    assert zeros[a].min() > 0.1
    broken = generated.copy()
    broken.X = broken.X + 0.5
    with pytest.raises(DataError, match="generated cells"):
        pl.qc(real, broken)


def test_overlay_matches_composition(real: Any, generated: Any) -> None:
    figure = pl.overlay(real, generated, method="pca", title="SIMULATED", n_cells=40)
    sizes = [sum(len(c.get_offsets()) for c in ax.collections) for ax in figure.axes]
    assert sizes == [80, 80, 40, 40]
    assert figure.axes[0].get_xlabel() == "PC 1"
    whole = pl.overlay(real, generated, reference=real, method="pca")
    assert sum(len(c.get_offsets()) for c in whole.axes[2].collections) == 120
    with pytest.raises(DataError, match="method must be"):
        pl.overlay(real, generated, method="tsne")
    other = generated.copy()
    other.obs["perturbation"] = "B"
    with pytest.raises(DataError, match="none is shared"):
        pl.overlay(real, other, method="pca")


def test_plots_read_counts_and_genes_where_they_were_declared(real: Any, generated: Any) -> None:
    var = pd.DataFrame({"id": real.var_names.to_numpy()}, index=[f"symbol{i}" for i in range(30)])
    moved = ad.AnnData(metrics.log_normalize(real), obs=real.obs, var=var, layers={"counts": real.X})
    drawers = {
        "scatter": lambda cells, **how: pl.delta_scatter(cells, generated, "A", **how).collections[0],
        "qc": lambda cells, **how: pl.qc(cells, generated, **how).axes[2].collections[0],
        "overlay": lambda cells, **how: pl.overlay(cells, generated, method="pca", **how).axes[2].collections[0],
    }
    undeclared = ad.AnnData(moved.X, obs=real.obs, var=real.var, layers=dict(moved.layers))
    CD4Model.setup_anndata(moved, perturbation_key="perturbation", layer="counts", gene_id_key="id")
    for name, draw in drawers.items():
        expected = np.asarray(draw(real).get_offsets())
        for found in (draw(moved), draw(moved, layer="counts"), draw(undeclared, layer="counts")):
            np.testing.assert_allclose(found.get_offsets(), expected, err_msg=name)
        with pytest.raises(DataError, match=r"layer='counts'\)\.$"):  # and nothing on what plots do not take
            draw(undeclared)
        with pytest.raises(
            GeneMismatchError, match=r"same names \(setup_anndata\(gene_id_key=\) chooses a var column\)$"
        ):
            draw(ad.AnnData(real.X, obs=real.obs, var=var))
        with pytest.raises(DataError, match="no layer 'raw'"):
            draw(moved, layer="raw")


def test_overlay_of_few_cells_says_what_is_too_few(real: Any, generated: Any) -> None:
    few = real[[0, 2, 4, 1, 3, 5, *range(120, 130, 2)]].copy()  # three of two conditions, five of one
    with pytest.raises(DataError, match=r"at least 4 real cells \(2 with reference=\).* hold 3 real cells at most"):
        pl.overlay(few[:6], generated)
    figure = pl.overlay(few, generated, reference=real, method="pca")
    assert "cells each" in figure.axes[0].get_title()
    with pytest.warns(UserWarning, match=r"2 of 3 conditions are left out: they have fewer than 4 real cells"):
        pl.overlay(few, generated, method="pca")
    with pytest.raises(DataError, match="a plane needs at least 4 reference cells, got 2; give other real cells"):
        pl.overlay(few[6:], generated)
    with pytest.raises(DataError, match="real: there are no cells"):
        pl.overlay(real[:0], generated)
    with pytest.raises(DataError, match="n_cells must be at least 1"):
        pl.overlay(real, generated, n_cells=0)


def test_history_has_a_panel_per_stage(trained: Any) -> None:
    figure = pl.training_history(trained)
    assert [ax.get_title() for ax in figure.axes] == ["autoencoder", "flow"]
    for ax, stage in zip(figure.axes, ("vae", "flow"), strict=True):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), trained.history_[stage]["train_loss"])
    with pytest.raises(DataError, match="no history"):
        pl.training_history({})


def scores() -> pd.DataFrame:
    rows = []
    for i, perturbation in enumerate("ABCD"):
        low = {"metric": "pearson_delta", "value": 0.6, "ceiling": 0.8, "control": 0.0, "additive": 0.4}
        weak = {"metric": "energy_distance", "value": 3.0, "ceiling": 1.0 + i % 2 * 2, "control": 2.0, "additive": 2.0}
        for row in (low, weak):
            baselines = {f"{p}baseline_{n}": row[n] for n in ("control", "additive") for p in ("", "matched_")}
            value = row["value"] + i / 100
            values = {"value": value, "matched_value": value, "ceiling": row["ceiling"] + i / 100, "floor": 0.0}
            labels = {
                "context": "d1",
                "perturbation": perturbation,
                "metric": row["metric"],
                "n_real": 50,
                "n_pred": 50,
            }
            rows.append(labels | values | baselines)
    return pd.DataFrame(rows)


def test_bars_stand_between_baseline_and_repeat() -> None:
    table = scores()
    ax = pl.metric_bars(table, ["pearson_delta", "energy_distance"], intervals=False)
    expected = metrics.score(table, "control")
    (bar,) = [p for p in ax.patches if p.get_hatch() is None]
    assert bar.get_width() == pytest.approx(expected.loc["pearson_delta", "score"])
    (hatched,) = [p for p in ax.patches if p.get_hatch()]
    assert not expected.loc["energy_distance", "is_resolved"]
    assert hatched.get_width() <= 1.5
    (mark,) = [line for line in ax.lines if line.get_label() == "additive"]
    assert mark.get_xdata()[0] == pytest.approx(0.4 / expected.loc["pearson_delta", "ceiling"], rel=0.05)
    assert ax.get_yticklabels()[0].get_text().startswith("pearson_delta ↑")
    assert pl.metric_bars(table, "pearson_delta", others=[]).get_legend() is not None
    for bad, message in (
        ({"metrics": ["mmd"]}, "no metric 'mmd'"),
        ({"baseline": "x"}, "baselines"),
        ({"others": ["x"]}, "'x'"),
    ):
        with pytest.raises(DataError, match=message):
            pl.metric_bars(table, intervals=False, **bad)


def test_baselines_beyond_the_scale_are_drawn_at_its_edge() -> None:
    table = scores()
    table["baseline_additive"] = table["matched_baseline_additive"] = -9.0  # far below the control
    ax = pl.metric_bars(table, "pearson_delta", intervals=False)
    (mark,) = [line for line in ax.lines if line.get_label() == "additive"]
    low = ax.get_xlim()[0]
    assert low <= mark.get_xdata()[0] == -1.5
    assert "beyond" in ax.get_xlabel()
    assert "beyond" not in pl.metric_bars(scores(), "pearson_delta", intervals=False).get_xlabel()


def test_pyplot_is_left_alone_outside_a_notebook(real: Any, generated: Any) -> None:
    before = sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []
    pl.delta_scatter(real, generated, "A")
    pl.qc(real, generated)
    after = sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []
    assert after == before


def test_a_notebook_gets_a_figure_that_it_shows(real: Any, generated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr("scldm_cd4.pl._figure.in_notebook", lambda: True)
    ax = pl.delta_scatter(real, generated, "A")
    assert ax.figure.number in plt.get_fignums()
    plt.close(ax.figure)
    figure = pl.qc(real, generated)
    assert figure not in [plt.figure(n) for n in plt.get_fignums()]


def test_bars_without_a_score_say_what_the_table_notes() -> None:
    real, train = cells(40, 0), cells(40, 1)
    only_b = train[train.obs["donor"] == "d2"]
    here = real[real.obs["donor"] == "d1"]
    table = metrics.evaluate(
        here,
        cells(40, 2)[here.obs_names],
        train=only_b,
        perturbation_key="perturbation",
        context_keys="donor",
        control="NT",
        profile=["pearson_delta"],
        n_repeats=1,
    )
    with pytest.raises(DataError, match="control cells of the contexts that are scored. The table notes: .*control"):
        pl.metric_bars(table)

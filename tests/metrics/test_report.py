"""The page about generated cells: whole, self-contained, safe, and equal to the table."""

import base64
import io
import re
import time
from html.parser import HTMLParser

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.samples import Keys
from scldm_cd4.metrics.page import figures, parts
from scldm_cd4.metrics.page import html as written
from scldm_cd4.metrics.page.scored import Scored

EVIL = '<script>alert("x")</script>'
ODD = "_a$b & <b>c</b>"
CONTROL = "NTC & <i>"
GENES = ["<img src=x onerror=alert(1)>", "$g", "_h", *(f"g{i}" for i in range(37))]
TARGETS = {EVIL: GENES[0], ODD: GENES[1]}
KEYS = {"perturbation_key": "target", "context_keys": ["<donor>"], "control": CONTROL, "target_genes": TARGETS}
LABELS = (EVIL, ODD, "g5")
SECTIONS = ["scores", "conditions", "deltas", "umap", "recovery", "quality", "provenance"]


def make_cells(seed, labels=(*LABELS, CONTROL), n=40):
    truth, rng = np.random.default_rng(1), np.random.default_rng([2, seed])
    base = truth.normal(0, 1, len(GENES))
    effects = {label: truth.normal(0, 1.5, len(GENES)) * (truth.random(len(GENES)) < 0.4) for label in LABELS}
    rows = [(donor, label) for donor in ("d<1>", "d2") for label in labels for _ in range(n)]
    log_mean = np.stack([base + effects.get(label, 0.0) + 0.3 * (donor == "d2") for donor, label in rows])
    mean = np.exp(log_mean) * 6 * rng.gamma(4, 0.25, (len(rows), 1))
    obs = pd.DataFrame(rows, columns=["<donor>", "target"], index=[f"{seed}_{i}" for i in range(len(rows))])
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(mean).astype(np.float32)), obs=obs, var=pd.DataFrame(index=pd.Index(GENES))
    )


@pytest.fixture(scope="module")
def cells():
    real, pred, train = make_cells(1), make_cells(2, LABELS), make_cells(3)
    real.uns["simulated"] = True
    pred.uns["scldm_cd4"] = {"seed": 7, "solver": EVIL}
    return {"real": real, "pred": pred, "train": train}


@pytest.fixture(scope="module")
def table(cells):
    return metrics.evaluate(**cells, **KEYS, n_repeats=1, seed=5)


def first_components(reference, *others, seed=0):
    return [cells[:, :2] for cells in others]


@pytest.fixture(scope="module")
def html(cells, table, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scldm_cd4.pl.embed_like", first_components)
        assert metrics.report(**cells, path=path, table=table, title=f"Cells of {EVIL}", seed=5, **KEYS) == path
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture
def quick(monkeypatch):
    """Small figures, few redraws, and two principal components in place of the UMAP, which takes seconds to start."""
    monkeypatch.setattr(written, "DPI", 20)
    monkeypatch.setattr(parts, "N_BOOT", 5)
    monkeypatch.setattr(parts, "MAX_DRAWN", 1)
    monkeypatch.setattr("scldm_cd4.metrics.page.report.MAX_PANELS", 1)
    monkeypatch.setattr("scldm_cd4.pl.embed_like", first_components)


class Reader(HTMLParser):
    """Collects elements, attributes, the texts of cells, and tables by section."""

    def __init__(self):
        super().__init__()
        self.tags, self.urls, self.tables, self.sections, self.text = [], [], {}, [], []
        self.cell = None

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.urls += [attributes[name] for name in ("src", "href", "action", "data", "srcset") if name in attributes]
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag == "table":
            self.tables.setdefault(self.sections[-1], []).append([])
        if tag == "tr":
            self.tables[self.sections[-1]][-1].append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_data(self, data):
        self.text.append(data)
        if self.cell is not None:
            self.cell.append(data)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[self.sections[-1]][-1][-1].append("".join(self.cell))
            self.cell = None


@pytest.fixture(scope="module")
def page(html):
    reader = Reader()
    reader.feed(html)
    return reader


def images(html):
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]


class TestPage:
    def test_every_section_is_there_and_linked(self, page):
        assert page.sections == SECTIONS
        assert [url for url in page.urls if url.startswith("#")] == [f"#{name}" for name in SECTIONS]

    def test_five_figures_that_can_be_read(self, html):
        from matplotlib.image import imread

        found = [imread(io.BytesIO(data), format="png") for data in images(html)]
        assert len(found) == 5
        for image in found:
            assert min(image.shape[:2]) > 300
            assert image[..., :3].std() > 0.01

    def test_nothing_is_loaded_and_nothing_runs(self, html, page):
        assert all(url.startswith(("data:", "#")) for url in page.urls)
        assert not {"script", "iframe", "object", "embed", "form", "base", "svg", "video"} & set(page.tags)
        assert page.tags.count("link") == 0
        assert "default-src 'none'" in html
        without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
        assert not re.search(r"https?://|//\w|@import|url\(", without_data)

    def test_labels_are_text(self, html, page):
        for label in (EVIL, ODD, CONTROL, "d<1>", "<donor>", f"Cells of {EVIL}"):
            assert label in "".join(page.text)
        for markup in ("<script", "<b>", "<i>", "<donor>", "d<1>", "<img src=x"):
            assert markup not in html

    def test_simulated_cells_are_named_so(self, html, cells, table, tmp_path, quick):
        assert html.count("SIMULATED") == 1
        real = cells["real"].copy()
        del real.uns["simulated"]
        path = metrics.report(**{**cells, "real": real}, path=tmp_path / "p.html", table=table, seed=5, **KEYS)
        plain = path.read_text(encoding="utf-8")
        assert "SIMULATED" not in plain

    def test_provenance(self, page):
        import scldm_cd4

        cells, made, carried = page.tables["provenance"]
        assert ["real", "320", "40", "240"] in cells
        assert ["training", "320", "40", "–"] in cells
        assert ["controls of the scored contexts", "–", "–", "80"] in cells
        said = dict(row for row in made if len(row) == 2)
        assert said["seed"] == "5"
        assert said["control"] == CONTROL
        assert said["scldm_cd4"] == scldm_cd4.__version__
        assert said["numpy"] == np.__version__
        assert said["components_fitted_on"] == "the training cells"
        assert ["solver", EVIL] in carried


class TestNumbers:
    def test_averages_equal_the_table(self, page, table):
        head, *rows = page.tables["scores"][0]
        means = metrics.aggregate(table)
        columns = {"prediction": "value", "floor": "floor", "control": "baseline_control", "repeat": "ceiling"}
        for row, name in zip(rows, means.index, strict=True):
            assert row[0].startswith(name)
            for shown, column in columns.items():
                text = row[head.index(shown)].lstrip("★▽ ").split(" ")[0]
                assert text == written.number(float(means.loc[name, column])), (name, shown)

    def test_best_and_worst_are_marked_in_words_too(self, page, table):
        head, *rows = page.tables["scores"][0]
        first, last = head.index("prediction"), head.index("prediction, at half")
        means = metrics.aggregate(table)
        columns = ["value", *(c for c in means if c.startswith("baseline_"))]
        shown = ["value" if h == "prediction" else f"baseline_{h.replace(' ', '_')}" for h in head[first:last]]
        names = [name for name in shown if name != "baseline_floor"]
        assert sorted(names) == sorted(columns)
        for row, name in zip(rows, means.index, strict=True):
            loss = means.loc[name, names].astype(float).map(metrics.registry.METRICS[name].loss)
            marked = [c for c, cell in zip(shown, row[first:last], strict=True) if cell.startswith("★")]
            assert marked == (list(loss.index[loss == loss.min()]) if loss.nunique() > 1 else [])

    def test_every_row_of_the_table_is_shown(self, page, table):
        head, *rows = page.tables["conditions"][0]
        assert len(rows) == len(table)
        for shown, (_, row) in zip(rows, table.iterrows(), strict=True):
            assert shown[:3] == [row["context"], row["perturbation"], row["metric"]]
            for name in ("value", "floor", "ceiling"):
                assert shown[head.index(name)] == written.number(float(row[name]))
            assert shown[head.index("two way")] == written.number(float(row["baseline_two_way"]))
            assert shown[head.index("n real")] == str(row["n_real"])

    def test_the_csv_has_all_digits(self, html, table):
        (data,) = re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]+)"', html)
        read = pd.read_csv(io.BytesIO(base64.b64decode(data)), keep_default_na=True)
        pd.testing.assert_frame_equal(read.fillna({"note": ""}), table, check_dtype=False, rtol=1e-12)

    def test_recovery_and_correlations_equal_the_table(self, page, table):
        at = table.set_index(["context", "perturbation", "metric"])["value"]
        head, *rows = page.tables["recovery"][0]
        assert len(rows) == 6
        for row in rows:
            for shown, name in (("precision", "de_precision"), ("recall", "de_recall"), ("F1", "de_f1")):
                assert row[head.index(shown)] == written.number(float(at[row[0], row[1], name]))
        head, *rows = page.tables["deltas"][0]
        for row in rows:
            assert row[head.index("r")] == written.number(float(at[row[0], row[1], "pearson_delta"]))

    def test_quality_is_of_equal_numbers_of_cells(self, cells):
        scored = read(cells)
        real, pred = scored.quality
        assert len(real.library) == len(pred.library) == 240
        counts = cells["pred"].X.toarray().astype(float)
        assert sorted(pred.library) == sorted(counts.sum(axis=1))
        assert pred.variance == pytest.approx(counts.var(axis=0, ddof=1))
        assert pred.zeros == pytest.approx((counts == 0).mean(axis=0))

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.12345, "0.123"),
            (-0.5, "-0.500"),
            (0.0, "0.000"),
            (2e-5, "2.0e-05"),
            (123.45, "123.5"),
            (12345.6, "12,346"),
        ]
        + [(float("nan"), "–"), (float("-inf"), "-∞"), (1234, "1,234")],
    )
    def test_numbers_for_readers(self, value, text):
        assert written.number(value) == text


def read(cells, **changes):
    settings = {"genes": "exact", "target_genes": TARGETS, "min_cells": 10, "n_components": 30, "pca_on": "reference"}
    settings |= {"allow_missing": False, "fdr": 0.05, "seed": 5, "layer": None, "input_type": "counts"}
    keys = Keys("target", ("<donor>",), CONTROL)
    return Scored.read(cells, keys, **{**settings, "size_factor_key": None, **changes})


class TestFigures:
    def test_plane_has_equal_numbers_of_disjoint_cells(self, cells, quick):
        scored = read(cells)
        places = scored.place()
        assert len(places.real) == len(places.repeat) == len(places.pred) == len(places.codes) == 120
        assert (np.bincount(places.codes) == 20).all()
        assert not set(map(tuple, places.real)) & set(map(tuple, places.repeat))

    @pytest.mark.slow
    def test_plane_of_real_umap_mixes_what_is_alike(self, cells):
        apart = make_cells(2, LABELS)
        apart.X = sp.csr_matrix(apart.X.toarray()[:, ::-1])
        places = read({**cells, "pred": apart}).place()
        assert np.isfinite(np.concatenate([places.real, places.repeat, places.pred])).all()
        mixed = metrics.one_nn_accuracy(places.real, places.repeat)
        assert mixed < 0.65
        assert metrics.one_nn_accuracy(places.real, places.pred) > mixed + 0.2

    def test_figures_of_simulated_cells_say_so_themselves(self, cells, quick):
        scored = read(cells)
        made, again, given = (written.tostring(parts.quality(scored, simulated)) for simulated in (True, True, False))
        assert made == again != given

    def test_shifts_are_drawn_for_every_gene(self, cells):
        scored = read(cells)
        with figures.drawing():
            figure = figures.deltas(scored, [0, 5])
        assert [ax.get_visible() for ax in figure.axes] == [True, True]
        drawn = sum(len(c.get_offsets()) for c in figure.axes[0].collections)
        assert drawn == len(GENES)
        named = {text.get_text() for text in figure.axes[0].texts}
        top = np.argsort(-np.maximum(np.abs(scored.shifts.real[0]), np.abs(scored.shifts.pred[0])))[:8]
        assert named == {figures.plain(GENES[gene], 16) for gene in top}

    def test_settings_of_the_session_stay(self, cells):
        import matplotlib

        before = dict(matplotlib.rcParams)
        with matplotlib.rc_context({"font.size": 3.0}), figures.drawing():
            assert matplotlib.rcParams["font.size"] == 9.0
        assert dict(matplotlib.rcParams) == before

    @pytest.mark.parametrize(
        ("label", "text"), [("a$b", r"a\$b"), ("_a", " _a"), ("a\nb", "a b"), ("x" * 40, "x" * 25 + "…")]
    )
    def test_labels_are_drawn_as_they_stand(self, label, text):
        assert figures.plain(label) == text


class TestUse:
    def test_same_input_same_file(self, cells, table, tmp_path, quick):
        options = {**cells, **KEYS, "table": table, "seed": 5}
        first, second = (metrics.report(path=tmp_path / f"{i}.html", **options).read_bytes() for i in range(2))
        assert first == second

    def test_makes_the_table_itself_and_passes_options_on(self, cells, tmp_path, quick):
        options = {"profile": "minimal", "baselines": ["additive"], "ceilings": False}
        made = metrics.report(path=tmp_path / "p.html", **cells, **KEYS, **options).read_text(encoding="utf-8")
        reader = Reader()
        reader.feed(made)
        head, *rows = reader.tables["scores"][0]
        assert "additive" in head
        assert "repeat" not in head
        expected = metrics.aggregate(metrics.evaluate(**cells, **KEYS, **options))
        shown = [row[head.index("prediction")].lstrip("★▽ ").split(" ")[0] for row in rows]
        assert shown == [written.number(float(value)) for value in expected["value"]]

    def test_without_training_cells_and_with_log_values(self, cells, tmp_path, quick):
        sides = {what: cells[what].copy() for what in ("real", "pred")}
        for side in sides.values():
            side.X = metrics.log_normalize(side.X)
        path = tmp_path / "p.html"
        metrics.report(path=path, **sides, **KEYS, input_type="lognorm", profile=["mse", "de_f1"])
        text = path.read_text(encoding="utf-8")
        assert "a seeded half of the real cells" in text
        assert all(f'<section id="{name}">' in text for name in SECTIONS)

    def test_some_conditions_and_no_context(self, cells, tmp_path, quick):
        sides = {what: side[side.obs["<donor>"] == "d2"].copy() for what, side in cells.items()}
        sides["pred"] = sides["pred"][sides["pred"].obs["target"] != ODD].copy()
        keys = {**KEYS, "context_keys": []}
        options = {"profile": ["pearson_delta"], "allow_missing": True, "show": [EVIL]}
        made = metrics.report(path=tmp_path / "p.html", **sides, **keys, **options).read_text(encoding="utf-8")
        reader = Reader()
        reader.feed(made)
        assert reader.tables["provenance"][-1][1:] == [[ODD, "40", "0", "not scored: not predicted"]]

    def test_a_file_is_replaced_only_when_asked(self, cells, table, tmp_path, quick):
        path = tmp_path / "p.html"
        path.write_text("mine")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            metrics.report(path=path, **cells, table=table, seed=5, **KEYS)
        assert path.read_text() == "mine"
        metrics.report(path=path, **cells, table=table, seed=5, overwrite=True, **KEYS)
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    def test_refuses_before_the_work(self, cells, table, tmp_path):
        started = time.perf_counter()
        for path, message in ((tmp_path / "p.pdf", "must end in .html"), (tmp_path / "no" / "p.html", "no folder")):
            with pytest.raises(DataError, match=message):
                metrics.report(path=path, **cells, table=table, **KEYS)
        with pytest.raises(DataError, match="would have no effect"):
            metrics.report(path=tmp_path / "p.html", **cells, table=table, profile="full", seed=5, **KEYS)
        assert time.perf_counter() - started < 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            (lambda t: t.drop(columns="floor"), {}, r"lacks \['floor'\]"),
            (lambda t: t, {"seed": 6}, "made with seed=5"),
            (lambda t: t.assign(n_real=3), {}, "not of these cells"),
            (lambda t: t[t["context"] != "d2"], {}, "not of these cells: 3 conditions"),
            (lambda t: t.assign(metric="best"), {}, "not known"),
            (lambda t: t, {"show": ["nobody"]}, "no scored perturbations"),
            (lambda t: t, {"show": []}, "name 1 to 24"),
            (lambda t: {"value": 1}, {}, "must come from metrics.evaluate"),
        ],
    )
    def test_tables_of_other_cells_are_refused(self, cells, table, tmp_path, quick, change, options, message):
        with pytest.raises(DataError, match=message):
            metrics.report(path=tmp_path / "p.html", **cells, table=change(table), **{"seed": 5, **KEYS, **options})
        assert not list(tmp_path.iterdir())

    def test_a_table_read_from_csv_will_do(self, cells, table, html, tmp_path, quick):
        read = pd.read_csv(io.StringIO(table.to_csv(index=False)))
        made = metrics.report(path=tmp_path / "p.html", **cells, table=read, seed=5, **KEYS)
        pages = [Reader(), Reader()]
        for reader, text in zip(pages, (html, made.read_text(encoding="utf-8")), strict=True):
            reader.feed(text)
        without_intervals = [re.sub(r" \[[^\]]*\]", "", str(reader.tables["scores"])) for reader in pages]
        assert without_intervals[0] == without_intervals[1]
        assert pages[0].tables["conditions"] == pages[1].tables["conditions"]

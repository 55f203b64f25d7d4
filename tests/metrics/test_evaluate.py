"""The table of all metrics: what stands in it, and the traps that such tables fall into."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scldm_cd4 import CD4Model, metrics
from scldm_cd4._errors import DataError, GeneMismatchError
from scldm_cd4.metrics import registry

CONTROL = "NTC"
KEYS = {"perturbation_key": "target", "context_keys": ["donor"], "control": CONTROL}
GENES = [f"g{i:02d}" for i in range(60)]
LABELS = ["g00", "g01", "g02", "g03", "g04", "g05"]  # knock-downs of these genes
DONORS = ["d1", "d2"]
ALL = [(donor, label) for donor in DONORS for label in [CONTROL, *LABELS]]


def make_cells(conditions, n=60, n_control=120, seed=0, strength=1.0, depth=300.0, effect_of=None):
    """Counts whose log mean is donor + effect; `effect_of` gives another label's effect."""
    truth, rng = np.random.default_rng(5), np.random.default_rng([6, seed])
    base = truth.normal(0, 1, len(GENES))
    donors = {donor: truth.normal(0, 0.5, len(GENES)) for donor in DONORS}
    effects = {label: truth.normal(0, 1.2, len(GENES)) * (truth.random(len(GENES)) < 0.25) for label in LABELS}
    effects[CONTROL] = np.zeros(len(GENES))
    blocks, rows = [], []
    for donor, label in conditions:
        size = n_control if label == CONTROL else n
        effect = strength * effects[(effect_of or {}).get(label, label)]
        mean = depth * np.exp(base + donors[donor] + effect) / np.exp(base).sum()
        blocks.append(rng.poisson(mean * rng.gamma(4, 0.25, (size, 1))))
        rows += [(donor, label)] * size
    obs = pd.DataFrame(rows, columns=["donor", "target"], index=[f"s{seed}c{i}" for i in range(len(rows))])
    return ad.AnnData(sp.csr_matrix(np.concatenate(blocks).astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


PERTURBED = [c for c in ALL if c[1] != CONTROL]


@pytest.fixture(scope="module")
def real():
    return make_cells(ALL, seed=1)


@pytest.fixture(scope="module")
def pred():
    return make_cells(PERTURBED, seed=2)


@pytest.fixture(scope="module")
def train():
    held = {("d1", "g00"), ("d2", "g01")}
    return make_cells([c for c in ALL if c not in held], seed=3)


def quick(real, pred, **options):
    """Evaluate without baselines and ceilings, all real cells scored."""
    defaults = {"baselines": [], "ceilings": False, "pca_on": "reference" if "train" in options else "scored"}
    return metrics.evaluate(real, pred, **{**defaults, **KEYS, **options})


def values(table, metric):
    rows = table[table["metric"] == metric]
    return rows.set_index(["context", "perturbation"])["value"]


@pytest.fixture(scope="module")
def full(real, pred, train):
    return metrics.evaluate(real, pred, train=train, profile="full", n_repeats=1, **KEYS)


class TestTable:
    def test_one_row_per_condition_and_metric(self, full):
        assert len(full) == len(PERTURBED) * len(registry.METRICS)
        assert not full.duplicated(["context", "perturbation", "metric"]).any()
        first = [
            "context",
            "donor",
            "perturbation",
            "metric",
            "value",
            "n_real",
            "n_pred",
            "n_ctrl",
            "floor",
            "ceiling",
        ]
        assert list(full.columns[: len(first)]) == first
        assert (full[["n_real", "n_pred"]] == 60).all().all()
        assert (full["n_ctrl"] == 120).all()
        for name in metrics.baselines.BASELINES:
            assert full[f"baseline_{name}"].notna().any()
            assert full[f"matched_baseline_{name}"].notna().any()

    def test_values_keep_to_their_ranges(self, full):
        for name, metric in registry.METRICS.items():
            low, high = metric.range
            rows = full[full["metric"] == name]
            found = rows[["value", "ceiling", *(c for c in rows if c.startswith("baseline_"))]]
            assert found.min().min() >= (-np.inf if low is None else low - 1e-9), name
            assert found.max().max() <= (np.inf if high is None else high + 1e-9), name

    def test_floors(self, full):
        r0 = metrics.chance_level(60, 120)
        assert full.loc[full["metric"] == "pearson_delta", "floor"].to_numpy() == pytest.approx(r0)
        assert (full.loc[full["metric"] == "discrimination_cosine", "floor"] == 0.5).all()
        distances = full[full["metric"] == "w2"]
        assert (distances["floor"] == distances["ceiling"]).all()

    def test_attrs_say_how_it_was_made(self, full):
        assert full.attrs["components_fitted_on"] == "the training cells"
        assert full.attrs["targets_left_out"] == len(PERTURBED)
        assert full.attrs["n_conditions"] == {"scored": len(PERTURBED), "not_scored": 0}

    def test_every_undefined_value_has_a_note(self, full):
        assert (full.loc[full["value"].isna(), "note"] != "").all()

    def test_seed_decides_and_global_generator_stays(self, real, pred, train):
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        options = {"train": train, "profile": "minimal", **KEYS}
        tables = [metrics.evaluate(real, pred, seed=seed, **options) for seed in (3, 3, 4)]
        pd.testing.assert_frame_equal(tables[0], tables[1])
        assert not tables[0]["ceiling"].equals(tables[2]["ceiling"])
        assert (np.random.get_state()[1] == before).all()  # noqa: NPY002

    def test_keys_come_from_generated_cells(self, real, pred):
        pred = pred.copy()
        pred.uns["scldm_cd4"] = {"perturbation_key": "target", "donor_key": "donor", "control": CONTROL}
        table = metrics.evaluate(real, pred, baselines=[], ceilings=False, pca_on="scored", profile=["mse"])
        pd.testing.assert_frame_equal(table, quick(real, pred, profile=["mse"]))
        del pred.uns["scldm_cd4"]
        with pytest.raises(DataError, match="perturbation_key is not known"):
            metrics.evaluate(real, pred)
        with pytest.raises(DataError, match="context_keys is not known"):
            metrics.evaluate(real, pred, perturbation_key="target", control=CONTROL)

    def test_no_context_is_one_context(self, real, pred):
        sides = [side[(side.obs["donor"] == "d1").to_numpy()] for side in (real, pred)]
        table = quick(*sides, context_keys=[], profile=["pearson_delta"])
        assert set(table["context"]) == {"all"}
        with_key = quick(*sides, profile=["pearson_delta"])
        np.testing.assert_allclose(table["value"], with_key["value"])


@pytest.fixture(scope="module")
def ladder(real, train):
    table = pd.DataFrame(PERTURBED, columns=["donor", "target"])
    mean, none = (metrics.baselines.predict(n, train, table, n_cells=60, **KEYS) for n in ("perturbed_mean", "control"))
    steps = {
        "self": real[(real.obs["target"] != CONTROL).to_numpy()].copy(),
        "fresh": make_cells(PERTURBED, seed=11),
        "half": make_cells(PERTURBED, seed=12, strength=0.5),
        "mean": mean,
        "control": none,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*equal a real cell")
        tables = {name: quick(real, cells, train=train, profile="full") for name, cells in steps.items()}
    return pd.DataFrame({name: metrics.aggregate(table)["value"] for name, table in tables.items()})


class TestLadder:
    """Self above a fresh draw above half the effect above the mean above the control."""

    @pytest.mark.parametrize("metric", ["pearson_delta", "de_f1", "de_pr_auc", "discrimination_cosine", "cosine_delta"])
    def test_agreement_falls(self, ladder, metric):
        row = ladder.loc[metric]
        assert row["self"] == pytest.approx(1.0)
        assert row["self"] >= row["fresh"] >= row["half"] > row["mean"] - 1e-9
        assert row["half"] > row["control"]

    @pytest.mark.parametrize("metric", ["energy_distance", "mmd2", "frechet_distance", "l2_delta", "wmse"])
    def test_distance_grows(self, ladder, metric):
        row = ladder.loc[metric]
        assert row["self"] < row["fresh"] < row["half"] < row["mean"]
        assert row["half"] < row["control"]

    def test_control_is_not_zero_with_shared_controls_but_is_with_disjoint_ones(self, ladder):
        shared, disjoint = (ladder.loc[name, "control"] for name in ("pearson_delta", "pearson_delta_disjoint"))
        assert shared > disjoint + 0.05
        assert abs(disjoint) < 0.15
        assert ladder.loc["de_recall", "control"] < 0.05


class TestCopies:
    def test_real_against_itself(self, real):
        same = real[(real.obs["target"] != CONTROL).to_numpy()].copy()
        with pytest.warns(UserWarning, match="720 predicted cells equal a real cell"):
            table = quick(real, same, profile="full", train=make_cells(ALL, seed=9))
        means = metrics.aggregate(table)["value"]
        assert means["w2"] <= 1e-6
        assert means["mmd2"] < 0
        assert means["energy_distance"] < 0
        assert means["precision"] == means["recall"] == 1.0
        assert means["one_nn_accuracy"] == 0.0
        assert means["mse"] == 0.0
        assert table.loc[table["metric"] == "w2", "note"].str.contains("60 predicted cells equal a real cell").all()

    def test_tiled_profiles_are_refused(self, real, pred):
        tiled = pred.copy()
        rows = (tiled.obs["target"] == "g02").to_numpy()
        counts = tiled.X.toarray()
        counts[rows] = counts[np.flatnonzero(rows)[0]]
        tiled.X = sp.csr_matrix(counts)
        with pytest.raises(DataError, match="same profile"):
            quick(real, tiled)

    def test_memorisation_is_told(self, real, train):
        table = pd.DataFrame(PERTURBED, columns=["donor", "target"])
        copies = metrics.baselines.predict("copy_training", train, table, n_cells=60, **KEYS)
        assert values(quick(real, copies, train=train, profile=["memorisation"]), "memorisation").max() < 1e-6
        fresh = values(
            quick(real, make_cells(PERTURBED, seed=4), train=train, profile=["memorisation"]), "memorisation"
        )
        assert fresh.mean() == pytest.approx(1.0, abs=0.1)


class TestAlignment:
    def test_order_of_genes_and_cells_dtype_and_sparsity_play_no_part(self, real, pred, train):
        rng = np.random.default_rng(0)
        other = pred[rng.permutation(pred.n_obs), rng.permutation(pred.n_vars)].copy()
        other = ad.AnnData(other.X.toarray().astype(np.int64), obs=other.obs, var=other.var)
        names = ["pearson_delta", "mse", "de_f1", "discrimination_cosine", "energy_distance", "r2_variance"]
        sides = [quick(real, side, train=train, profile=names) for side in (pred, other)]
        pd.testing.assert_frame_equal(*sides, rtol=1e-9)

    def test_backed_cells_and_views(self, real, pred, tmp_path):
        pred.copy().write_h5ad(tmp_path / "pred.h5ad")
        backed = ad.read_h5ad(tmp_path / "pred.h5ad", backed="r")
        found = quick(real[::1], backed, profile=["mse"])
        backed.file.close()
        np.testing.assert_allclose(found["value"], quick(real, pred, profile=["mse"])["value"])

    def test_inputs_are_not_changed(self, real, pred, train):
        copies = [side.copy() for side in (real, pred, train)]
        metrics.evaluate(real, pred, train=train, profile="minimal", **KEYS)
        for side, copy in zip((real, pred, train), copies, strict=True):
            assert (side.X != copy.X).nnz == 0
            pd.testing.assert_frame_equal(side.obs, copy.obs)

    def test_genes_must_be_the_same_or_the_intersection_asked_for(self, real, pred):
        fewer = pred[:, GENES[:50]]
        with pytest.raises(GeneMismatchError, match="pred: 10 genes of real are missing.*genes='intersection'"):
            quick(real, fewer)
        table = quick(real, fewer, genes="intersection", profile=["mse"])
        assert table.attrs["genes_left_out"] == {"real": 10, "pred": 0}
        assert quick(real, pred, genes=GENES[:55], profile=["mse"]).attrs["n_genes"] == 55
        with pytest.raises(GeneMismatchError, match="missing"):
            quick(real, pred, genes=["g00", "nope"])

    def test_duplicate_names_are_refused(self, real, pred):
        twice = pred.copy()
        twice.var_names = ["g00", "g00", *GENES[2:]]
        with pytest.raises(GeneMismatchError, match="occur more than once"):
            quick(real, twice)

    def test_labels_of_any_kind_match(self, real, pred):
        sides = []
        for side, kind in ((real, int), (pred, str)):
            number = side.obs["donor"].str[1:].astype(kind)
            sides.append(ad.AnnData(side.X, obs=side.obs.assign(donor=number), var=side.var))
        sides[0].obs["target"] = pd.Categorical(sides[0].obs["target"], [CONTROL, "unused", *LABELS])
        expected = quick(real, pred, profile=["mse"])
        np.testing.assert_allclose(quick(*sides, profile=["mse"])["value"], expected["value"])

    def test_missing_conditions_are_reported_on_each_side(self, real, pred):
        fewer = pred[(pred.obs["target"] != "g03").to_numpy()]
        with pytest.raises(DataError, match="2 real conditions were not predicted"):
            quick(real, fewer)
        with pytest.raises(DataError, match="1 predicted ones have no real cells"):
            quick(real[~((real.obs["target"] == "g03") & (real.obs["donor"] == "d1")).to_numpy()], pred)
        table = quick(real, fewer, allow_missing=True, profile=["mse"])
        lost = table[table["perturbation"] == "g03"]
        assert lost["value"].isna().all()
        assert (lost["note"] == "not scored: not predicted").all()
        assert table.attrs["n_conditions"] == {"scored": 10, "not_scored": 2}
        other = ad.AnnData(pred.X, obs=pred.obs.assign(donor="d" + pred.obs["donor"]), var=pred.var)
        with pytest.raises(DataError, match="no condition is on both sides"):
            quick(real, other)

    def test_few_cells_are_not_scored_and_say_so(self, real, pred):
        few = pred[np.flatnonzero(~((pred.obs["target"] == "g01") & (pred.obs["donor"] == "d1")).to_numpy())]
        some = pred[np.flatnonzero(((pred.obs["target"] == "g01") & (pred.obs["donor"] == "d1")).to_numpy())[:9]]
        table = quick(real, ad.concat([few, some]), profile=["mse"])
        row = table[(table["context"] == "d1") & (table["perturbation"] == "g01")].iloc[0]
        assert np.isnan(row["value"])
        assert row["n_pred"] == 9
        assert "min_cells=10" in row["note"]
        with pytest.raises(DataError, match="at most 60: lower min_cells"):
            quick(real, pred, min_cells=61)

    def test_targets_by_other_names(self, real, pred):
        sides = []
        for side in (real, pred):
            obs = side.obs.assign(target=side.obs["target"].replace({"g01": "KD1", "g02": "KD2"}))
            sides.append(ad.AnnData(side.X, obs=obs, var=side.var))
        with pytest.warns(UserWarning, match="targets of 2 of 6 perturbations"):
            quick(*sides, profile=["mse"])
        table = quick(*sides, profile=["mse"], target_genes={"KD1": "g01", "KD2": None})
        assert table.attrs["targets_left_out"] == 10
        assert not table["note"].str.contains("target").any()

    def test_no_target_found_is_noted_and_no_reason_to_warn(self, real, pred):
        var = pd.DataFrame(index=[f"ENS{gene}" for gene in GENES])
        sides = [ad.AnnData(side.X, obs=side.obs, var=var) for side in (real, pred)]
        metric = ["energy_distance", "mse", "discrimination_l1", "de_f1"]
        table = quick(*sides, profile=metric)
        assert table.attrs["targets_left_out"] == 0
        is_noted = table["note"].str.contains("its target is not among the genes")
        assert (is_noted == (table["metric"] != "energy_distance")).all()
        named = quick(*sides, profile=metric, target_genes={label: f"ENS{label}" for label in LABELS})
        pd.testing.assert_frame_equal(named, quick(real, pred, profile=metric))
        assert not named["note"].str.contains("target").any()

    def test_discrimination_where_most_genes_are_targets(self, real, pred):
        """Leaving out all targets would leave no gene, or too few to tell effects apart."""
        names = ["discrimination_cosine", "discrimination_l1", "discrimination_l2"]
        some = {n: quick(real[:, GENES[:n]], pred[:, GENES[:n]], profile=names) for n in (6, 7, 25, 26)}
        for n, table in some.items():
            assert table["value"].between(0, 1).all(), n
            assert table["note"].str.contains("targets of other conditions not left out").all() == (n < 26), n
            assert (table["note"] == "").all() == (n == 26), n


class TestValues:
    def test_kinds_of_values_must_agree(self, real, pred):
        normalised = [ad.AnnData(metrics.log_normalize(side), obs=side.obs, var=side.var) for side in (real, pred)]
        with pytest.raises(DataError, match="pred: .* values are no counts"):
            quick(real, normalised[1])
        with pytest.raises(DataError, match="look like counts"):
            quick(real, normalised[1], input_type="lognorm")
        names = ["pearson_delta", "de_f1", "energy_distance"]
        expected = quick(real, pred, profile=names)
        found = quick(*normalised, input_type="lognorm", profile=names)
        np.testing.assert_allclose(found["value"], expected["value"])

    def test_layers(self, real, pred):
        sides = []
        for side in (real, pred):
            moved = ad.AnnData(metrics.log_normalize(side), obs=side.obs, var=side.var, layers={"counts": side.X})
            sides.append(moved)
        found = quick(*sides, layer="counts", profile=["mse"])
        np.testing.assert_allclose(found["value"], quick(real, pred, profile=["mse"])["value"])
        with pytest.raises(DataError, match="layer='counts'.*input_type='lognorm'"):
            quick(*sides, profile=["mse"])
        mixed = quick(sides[0], pred, layer="counts", profile=["mse"])  # of cells without the layer it is X
        np.testing.assert_allclose(mixed["value"], found["value"])
        with pytest.raises(DataError, match="no layer 'count'. Near matches: 'counts'"):
            quick(*sides, layer="count", profile=["mse"])

    def test_counts_and_genes_are_where_they_were_declared(self, real, pred, train):
        """Generated cells carry no declaration: X and var_names."""
        sides = []
        for side in (real, train):
            var = pd.DataFrame({"id": GENES}, index=[f"symbol{i}" for i in range(60)])
            moved = ad.AnnData(metrics.log_normalize(side), obs=side.obs, var=var, layers={"counts": side.X})
            moved = moved[:, ::-1].copy()
            CD4Model.setup_anndata(moved, perturbation_key="target", layer="counts", gene_id_key="id")
            sides.append(moved)
        made = pred.copy()
        made.uns["scldm_cd4"] = {"perturbation_key": "target", "donor_key": "donor", "control": CONTROL}
        names = ["mse", "de_f1", "pearson_delta"]
        expected = quick(real[:, ::-1], pred, train=train, profile=names)
        for layer in (None, "counts"):
            found = metrics.evaluate(
                sides[0], made, train=sides[1], layer=layer, profile=names, baselines=[], ceilings=False
            )
            pd.testing.assert_frame_equal(found, expected)
        convention = metrics.compat.evaluate(sides[0], made, "scldm")
        plain = metrics.compat.evaluate(real[:, ::-1], pred, "scldm", **KEYS)
        np.testing.assert_allclose(convention["value"], plain["value"])
        normalised = ad.AnnData(metrics.log_normalize(pred), obs=pred.obs, var=pred.var)
        lognorm = quick(sides[0], normalised, input_type="lognorm", profile=["w1"])  # X, not the counts
        np.testing.assert_allclose(lognorm["value"], quick(real, pred, profile=["w1"])["value"])
        del sides[0].layers["counts"]
        with pytest.raises(DataError, match="real: setup_anndata declared .* which is not there any more"):
            quick(sides[0], pred)

    def test_own_totals_and_library_size_as_a_metric_of_its_own(self, real, pred):
        double = pred.copy()
        double.X = pred.X * 2
        names = ["pearson_delta", "energy_distance", "library_log2_ratio"]
        single, twice = (quick(real, side, profile=names) for side in (pred, double))
        for name in names[:2]:
            np.testing.assert_allclose(values(single, name), values(twice, name), atol=1e-9)
        np.testing.assert_allclose(values(twice, names[2]) - values(single, names[2]), 1.0)

    def test_size_factors_hold_on_both_sides(self, real, pred):
        sides = [side.copy() for side in (real, pred)]
        for side in sides:
            side.obs["total"] = np.asarray(side.X.sum(axis=1)).ravel()
        names = ["mse", "pearson_delta"]
        expected = quick(real, pred, profile=names)
        found = quick(*sides, size_factor_key="total", profile=names)
        np.testing.assert_allclose(found["value"], expected["value"])
        sides[1].obs["total"] *= 2
        assert not np.allclose(quick(*sides, size_factor_key="total", profile=names)["value"], expected["value"])
        sides[1].obs["total"] = 0.0
        with pytest.raises(DataError, match="totals above 0"):
            quick(*sides, size_factor_key="total")

    def test_no_effect_to_recover_is_undefined_and_silence_is_zero(self, real):
        none = dict.fromkeys(LABELS, CONTROL)
        flat = make_cells(PERTURBED, seed=21, effect_of=none)
        null = ad.concat(
            [real[(real.obs["target"] == CONTROL).to_numpy()], make_cells(PERTURBED, seed=22, effect_of=none)]
        )
        table = quick(null, make_cells(PERTURBED, seed=23), profile=["de_f1"])
        undefined = table["value"].isna()
        assert undefined.mean() > 0.5
        assert table.loc[undefined, "note"].str.contains("no significant gene").all()
        silent = values(quick(real, flat, profile=["de_f1", "de_precision"]), "de_precision")
        assert silent.notna().all()
        assert (silent == 0).mean() > 0.6

    def test_rank_tests_take_equal_numbers(self, real, pred):
        rows = np.concatenate(
            [np.flatnonzero((pred.obs["donor"] == d) & (pred.obs["target"] == p))[:30] for d, p in PERTURBED]
        )
        few, many = pred[rows], ad.concat([pred, make_cells(PERTURBED, seed=31)])
        table = quick(real, few, profile=["de_recall"])
        assert (table["note"] == "tested at 30 cells").all()
        table = quick(real, many, profile=["de_precision", "mse"])
        assert (table.loc[table["metric"] == "de_precision", "note"] == "tested at 60 cells").all()
        assert (table.loc[table["metric"] == "mse", "note"] == "").all()


class TestControls:
    def test_predicted_controls_play_no_part(self, real, pred):
        wrong = make_cells([(d, CONTROL) for d in DONORS], seed=41, effect_of={CONTROL: "g02"})
        names = ["pearson_delta", "de_f1", "discrimination_cosine"]
        expected, found = (quick(real, side, profile=names) for side in (pred, ad.concat([pred, wrong])))
        pd.testing.assert_frame_equal(expected, found)

    def test_controls_are_those_of_the_context(self, real, pred):
        # against controls of another donor the donor looks like an effect, which any cells of the donor then "predict"
        own = real[((real.obs["donor"] == "d2") & (real.obs["target"] != CONTROL)).to_numpy()]
        flat = make_cells([c for c in PERTURBED if c[0] == "d2"], seed=42, effect_of=dict.fromkeys(LABELS, CONTROL))
        controls = real[(real.obs["target"] == CONTROL).to_numpy()]
        cells = ad.concat([own, controls])
        kept = values(quick(cells, flat, profile=["cosine_delta"]), "cosine_delta").mean()
        pooled = values(quick(cells, flat, context_keys=[], profile=["cosine_delta"]), "cosine_delta").mean()
        assert pooled > kept + 0.2

    def test_context_without_controls(self, real, pred, train):
        lost = real[~((real.obs["target"] == CONTROL) & (real.obs["donor"] == "d2")).to_numpy()]
        with pytest.raises(DataError, match="no real control cells"):
            quick(lost, pred)
        table = quick(lost, pred, train=train, profile=["pearson_delta"])
        second = table[table["context"] == "d2"]
        assert (second["n_ctrl"] == 60).all()
        assert second["note"].str.contains("half of the training controls").all()
        assert (table.loc[table["context"] == "d1", "n_ctrl"] == 120).all()

    def test_few_controls_are_named_and_give_no_ceiling(self, real, pred):
        lone = np.flatnonzero(((real.obs["target"] == CONTROL) & (real.obs["donor"] == "d1")).to_numpy())[1:]
        cells = real[np.setdiff1d(np.arange(real.n_obs), lone)]
        table = quick(cells, pred, profile=["pearson_delta"], ceilings=True, n_repeats=1)
        first = (table["context"] == "d1").to_numpy()
        assert (table.loc[first, "note"] == "only 1 control cells").all()
        assert table.loc[first, "ceiling"].isna().all()
        assert table.loc[~first, "ceiling"].notna().all()

    def test_discrimination_ranks_within_context(self, real):
        # the same profile for all perturbations of a donor: between donors it would find the right donor
        same = dict.fromkeys(LABELS, "g00")
        table = quick(real, make_cells(PERTURBED, seed=43, effect_of=same), profile=["discrimination_cosine"])
        assert values(table, "discrimination_cosine").mean() == pytest.approx(0.5, abs=0.15)


class TestReference:
    def test_components_are_fitted_on_cells_that_are_not_scored(self, real, pred, train):
        assert quick(real, pred, profile=["w2"], train=train).attrs["components_fitted_on"] == "the training cells"
        table = quick(real, pred, profile=["w2"], pca_on="reference")
        assert "not scored" in table.attrs["components_fitted_on"]
        assert (table["n_real"] == 30).all()
        scored = quick(real, pred, profile=["w2"])
        assert scored.attrs["components_fitted_on"] == "the scored real cells"
        assert (scored["n_real"] == 60).all()

    def test_without_training_cells_baselines_are_nan_and_say_so(self, real, pred):
        table = metrics.evaluate(real, pred, profile="minimal", n_repeats=1, **KEYS)
        assert table["baseline_control"].isna().all()
        assert table["note"].str.contains("no training cells").all()
        with pytest.raises(DataError, match="pass train="):
            metrics.evaluate(real, pred, baselines=["control"], **KEYS)

    def test_baselines_never_see_the_real_cells(self, real, pred, train):
        options = {"train": train, "profile": ["library_log2_ratio"], "baselines": ["additive"], "ceilings": False}
        plain = metrics.evaluate(real, pred, **options, **KEYS)
        deep = real.copy()
        deep.X = real.X * 4
        changed = metrics.evaluate(deep, pred, **options, **KEYS)
        # the real side is deeper by 2 on the scale of log2, the baseline has not followed
        np.testing.assert_allclose(plain["baseline_additive"] - changed["baseline_additive"], 2.0, atol=0.05)

    def test_ceiling_is_reached_by_a_fresh_draw_in_its_place(self, full):
        means = metrics.aggregate(full)
        for name in ("pearson_delta", "de_f1", "discrimination_cosine", "energy_distance"):
            repeat, fresh, none = means.loc[name, ["ceiling", "matched_value", "matched_baseline_control"]]
            assert abs(repeat - fresh) < 0.25 * abs(repeat - none), name

    def test_unknown_options_are_named(self, real, pred, train):
        for options, message in (
            ({"profile": "huge"}, "profiles are minimal"),
            ({"profile": ["mse", "magic"]}, "metrics are mmd2"),
            ({"pca_on": "all"}, "'reference' or 'scored'"),
            ({"input_type": "tpm"}, "'counts' or 'lognorm'"),
            ({"genes": "union"}, "'exact', 'intersection'"),
        ):
            with pytest.raises((DataError, GeneMismatchError), match=message):
                quick(real, pred, **options)
        with pytest.raises(DataError, match="baselines are control"):
            metrics.evaluate(real, pred, train=train, baselines=["magic"], **KEYS)


def test_registry_is_complete_and_consistent():
    for name, metric in registry.METRICS.items():
        low, high = metric.range
        assert metric.name == name
        assert metric.title
        assert low is None or low <= metric.best
        assert high is None or metric.best <= high or metric.family == "distribution"
        assert metric.space in ("pcs", "mean_log", "log_sum", "cells")
        assert metric.family in (*registry.RANKED, "quality")
        assert metric.loss(metric.best) <= metric.loss(metric.best + 0.5) or metric.direction == "higher"
    assert set(registry.PROFILES["minimal"]) <= set(registry.PROFILES["paper"]) <= set(registry.PROFILES["full"])
    for profile in ("minimal", "paper"):
        families = {registry.METRICS[name].family for name in registry.PROFILES[profile]}
        assert families == set(registry.RANKED), "no family may hide behind the others"

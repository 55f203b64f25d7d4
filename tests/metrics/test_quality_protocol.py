"""The scoring protocol of the benchmarks with stand-ins for a model."""

import importlib
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scldm_cd4 import metrics

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark(name: str):
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of this copy of the project")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def protocol():
    return benchmark("protocol")


@pytest.fixture(scope="module")
def quality():
    return benchmark("quality")


def simulate(seed: int, n: int) -> ad.AnnData:
    """Cells of a strong, a silent and a control group in two donors; genes 0 and 1 are their targets."""
    rng = np.random.default_rng(seed)
    genes = ["strong", "silent", *(f"g{i}" for i in range(58))]
    rate = np.random.default_rng(99).gamma(1.0, 2.0, len(genes)) + 0.2
    rate[:2] = 3.0, 0.02  # the target of the silent one is hardly there to be lost
    blocks, rows = [], []
    for donor, lift in (("a", 1.0), ("b", 1.4)):
        for name, size in (("ctrl", 3 * n), ("strong", n), ("silent", n)):
            mean = rate.copy()
            mean[30:] *= lift
            if name == "strong":
                mean[5:20] *= 2.0
            if name != "ctrl":
                mean[genes.index(name)] = 0.01
            blocks.append(rng.poisson(mean * rng.lognormal(0, 0.3, (size, 1))))
            rows += [(name, donor)] * size
    obs = pd.DataFrame(rows, columns=["pert", "donor"], index=[str(i) for i in range(len(rows))])
    return ad.AnnData(sp.csr_matrix(np.vstack(blocks).astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


KEYS = {"perturbation_key": "pert", "context_key": "donor", "control": "ctrl"}


@pytest.fixture(scope="module")
def cells() -> tuple[ad.AnnData, ad.AnnData]:
    return simulate(1, 120), simulate(2, 30)


@pytest.fixture(scope="module")
def scorer(protocol, cells):
    return protocol.ConditionScorer(*cells, n_redraws=8, n_w2=2, **KEYS)


def relabelled_controls(cells: ad.AnnData) -> ad.AnnData:
    """Give control cells under every label: a model that knows nothing of the perturbations."""
    control = cells[cells.obs["pert"] == "ctrl"]
    parts = []
    for name in ("ctrl", "strong", "silent"):
        part = control.copy()
        part.obs["pert"] = name
        parts.append(part)
    return ad.concat(parts, index_unique="-")


def scores_of(scores: pd.DataFrame, name: str) -> pd.DataFrame:
    return scores[scores["perturbation"] == name].set_index("metric")


def test_a_repeat_scores_one_and_controls_score_zero(protocol, scorer):
    repeat = scores_of(scorer.score(simulate(3, 90)), "strong")
    controls = scores_of(scorer.score(relabelled_controls(simulate(4, 60))), "strong")
    for metric in protocol.ANCHORED:
        assert repeat.loc[metric, "counted"]
        assert repeat.loc[metric, "counted_single"]
        assert repeat.loc[metric, "score"] == pytest.approx(1, abs=0.2)
        assert controls.loc[metric, "score"] == pytest.approx(0, abs=0.2)
    assert repeat.loc["w2", "ceiling"] > 0
    assert np.isnan(repeat.loc["w2", "score"])


def test_silent_perturbations_do_not_count_and_false_genes_show(protocol, scorer):
    good = scorer.score(simulate(3, 60))
    table = protocol.no_effect(good)
    assert table.index.tolist() == ["silent"]
    assert table.loc["silent", "within"]
    assert not scores_of(good, "silent")["counted_single"].any()
    wrong = simulate(3, 60)
    x = wrong.X.toarray()
    x[(wrong.obs["pert"] == "silent").to_numpy(), 40:50] *= 3
    wrong.X = sp.csr_matrix(x)
    assert not protocol.no_effect(scorer.score(wrong)).loc["silent", "within"]


def test_summary_names_who_falls_short(protocol, scorer):
    summary = protocol.summarise(scorer.score(relabelled_controls(simulate(4, 60))), "counted_single")
    assert (summary["n_counted"] == 1).all()
    assert (summary["below_0.4"] == "strong").all()
    assert (summary["repeat_minimum"] > 0.4).all()


def test_target_gene_is_not_tested(protocol, cells, scorer):
    kept = protocol.ConditionScorer(*cells, n_redraws=8, n_w2=0, target_genes={"strong": "not a gene"}, **KEYS)
    with_target, without = (scores_of(x.score(None), "strong") for x in (kept, scorer))
    assert with_target.loc["n_de", "n_de_real"] == without.loc["n_de", "n_de_real"] + 1
    assert with_target.loc["pearson_delta", "ceiling"] != without.loc["pearson_delta", "ceiling"]


def test_genes_go_by_name_and_results_repeat(protocol, cells, scorer):
    generated = simulate(3, 60)
    first = scorer.score(generated)
    pd.testing.assert_frame_equal(first, scorer.score(generated[:, ::-1].copy()))
    again = protocol.score_conditions(*cells, generated, n_redraws=8, n_w2=2, **KEYS)
    pd.testing.assert_frame_equal(first, again)


def test_refusals(scorer):
    generated = simulate(3, 60)
    with pytest.raises(ValueError, match="generate more"):
        scorer.score(generated[generated.obs["donor"] == "a"].copy())
    with pytest.raises(ValueError, match="training genes are not in the cells"):
        scorer.score(generated[:, 3:].copy())
    tiled = generated.copy()
    tiled.X = sp.csr_matrix(np.tile(generated.X[0].toarray(), (generated.n_obs, 1)))
    with pytest.raises(ValueError, match="same profile"):
        scorer.score(tiled)
    stranger = generated.copy()
    stranger.obs["donor"] = "z"
    with pytest.raises(ValueError, match="do not occur in the real cells"):
        scorer.score(stranger)


def test_counts_are_checked_against_a_floor(quality, scorer):
    good = quality.count_checks(scorer, simulate(3, 60))
    assert abs(good["zero_fraction_difference"]) < 0.02
    assert good["library_ks"] < 0.15
    assert good["library_ks_floor"] > 0
    double = simulate(3, 60)
    double.X = double.X * 2
    assert quality.count_checks(scorer, double)["library_ks"] > 0.4


def test_contexts_without_controls_are_left_out(protocol, cells):
    train, test = (part[~((part.obs["donor"] == "b") & (part.obs["pert"] == "ctrl"))].copy() for part in cells)
    scores = protocol.ConditionScorer(train, test, n_redraws=2, n_w2=0, **KEYS).score(None)
    assert scores.set_index("perturbation").loc["strong", "n"].unique().tolist() == [30]


def test_strong_knockouts_count_on_real_cells(protocol, shared_dir):
    path = shared_dir / "data" / "papalexi_dev.h5ad"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    adata = ad.read_h5ad(path)
    adata = adata[adata.obs["perturbation"].isin(["NT", "JAK2", "IFNGR2", "CAV1"])].copy()
    held = np.random.default_rng(0).random(adata.n_obs) < 0.2
    scores = protocol.score_conditions(
        adata[~held].copy(),
        adata[held].copy(),
        None,
        perturbation_key="perturbation",
        context_key="replicate",
        control="NT",
        n_redraws=5,
        n_w2=0,
    )
    strong = scores[scores["metric"].isin(protocol.ANCHORED) & (scores["perturbation"] != "CAV1")]
    assert strong["counted"].all()
    assert not scores_of(scores, "CAV1")["counted_single"].any()


class Resampler:
    """Stand-in for a trained model: gives training cells back, embeds by principal components."""

    def __init__(self, train: ad.AnnData):
        self.train, self.projection = train, metrics.fit_projection(metrics.log_normalize(train), 10)

    def generate(self, conditions: pd.DataFrame, guidance: float, seed: int) -> ad.AnnData:
        rng, obs = np.random.default_rng(seed), self.train.obs
        rows = []
        for row in conditions.itertuples():
            pool = np.flatnonzero((obs["pert"] == row.pert) & (obs["donor"] == row.donor))
            rows.append(rng.choice(pool, row.n_cells, replace=False))
        return self.train[np.concatenate(rows)].copy()

    def get_latent(self, adata: ad.AnnData) -> np.ndarray:
        return self.projection.apply(metrics.log_normalize(adata))

    def get_normalized_expression(self, adata: ad.AnnData) -> np.ndarray:
        return np.maximum(np.expm1(self.get_latent(adata) @ self.projection.components + self.projection.mean), 1.0)

    def get_reconstruction_error(self, adata: ad.AnnData) -> float:
        share = self.get_normalized_expression(adata)
        library = np.asarray(adata.X.sum(axis=1))
        return metrics.nb_error(adata, library * share / share.sum(axis=1, keepdims=True), np.full(adata.n_vars, 50.0))


def test_the_benchmark_prints_every_table(quality, tmp_path, monkeypatch, capsys):
    data = quality.Dataset(simulate(5, 150), "pert", "donor", "ctrl", "pert", ("strong", "ctrl"), n_genes=50)
    monkeypatch.setattr(quality, "load", lambda name, shared: data)
    monkeypatch.setattr(quality, "train_model", lambda train, data, seed, options: (Resampler(train), 1.0))
    out = tmp_path / "quality.json"
    quality.main(["--data", "papalexi", "--seeds", "0", "1", "--blocks", "2", "--out", str(out)])
    text = capsys.readouterr().out
    assert "1200 training, 300 held-out cells, 50 genes" in text
    runs = json.loads(out.read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    probe = runs[0]["linear probe"]
    assert probe["latent"] > probe["chance"] == 0.5
    errors = {row["what"]: row for row in runs[0]["reconstruction of held-out cells"]}
    assert errors["model"]["mse"] < errors["intercept-only NB"]["mse"]
    scores = pd.DataFrame(runs[1]["scores"]).set_index(["perturbation", "metric"])
    assert scores.loc[("strong", "de_f1"), "score"] == pytest.approx(1, abs=0.2)


def test_held_out_cells_are_a_share_of_every_condition(quality):
    adata = simulate(6, 50)
    train, test = quality.hold_out(quality.Dataset(adata, "pert", "donor", "ctrl", "pert"), seed=3)
    assert not set(train.obs_names) & set(test.obs_names)
    sizes = [part.obs.groupby(["pert", "donor"], observed=True).size() for part in (test, adata)]
    assert (sizes[0] == sizes[1] * 0.2).all()

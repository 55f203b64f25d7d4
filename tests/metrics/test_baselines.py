"""Baselines: what they see, what they predict, and that they emit cells that look like cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scldm_cd4 import CD4Model, metrics
from scldm_cd4._errors import DataError
from scldm_cd4.metrics import baselines
from scldm_cd4.metrics.baselines import shifts
from scldm_cd4.metrics.baselines.counts import emit_counts
from scldm_cd4.metrics.baselines.training import Training
from scldm_cd4.metrics.cells.samples import Keys, read_sample

CONTROL = "NTC"
KEYS = {"perturbation_key": "target", "context_keys": ["donor"], "control": CONTROL}
GENES = [f"g{i:02d}" for i in range(40)]
LABELS = ["A", "B", "C", "D", "E", "F"]
DONORS = ["d1", "d2", "d3"]


def make_cells(conditions, n=60, seed=0, depth=400.0):
    """Cells whose log mean is donor + perturbation, so that additive transfer is right."""
    truth, rng = np.random.default_rng(3), np.random.default_rng([4, seed])
    base = truth.normal(0, 1, len(GENES))
    donors = {donor: truth.normal(0, 0.3, len(GENES)) for donor in DONORS}
    effects = {label: truth.normal(0, 1.0, len(GENES)) * (truth.random(len(GENES)) < 0.3) for label in LABELS}
    effects[CONTROL] = np.zeros(len(GENES))
    blocks, rows = [], []
    for donor, label in conditions:
        share = np.exp(base + donors[donor] + effects[label])
        mean = depth * share / np.exp(base).sum()
        blocks.append(rng.poisson(mean * rng.gamma(4, 0.25, (n, 1))))
        rows += [(donor, label)] * n
    obs = pd.DataFrame(rows, columns=["donor", "target"], index=[f"c{i}" for i in range(len(rows))])
    counts = sp.csr_matrix(np.concatenate(blocks).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


HELD = [("d1", "A"), ("d2", "B")]
ALL = [(donor, label) for donor in DONORS for label in [CONTROL, *LABELS]]


@pytest.fixture(scope="module")
def train():
    return make_cells([c for c in ALL if c not in HELD])


@pytest.fixture(scope="module")
def wanted():
    return pd.DataFrame(HELD, columns=["donor", "target"])


def test_counts_and_genes_are_where_they_were_declared(train, wanted):
    var = pd.DataFrame({"id": GENES}, index=[f"symbol{i}" for i in range(len(GENES))])
    moved = ad.AnnData(metrics.log_normalize(train), obs=train.obs, var=var, layers={"counts": train.X})
    CD4Model.setup_anndata(moved, perturbation_key="target", layer="counts", gene_id_key="id")
    sides = [baselines.predict("additive", cells, wanted, n_cells=5, **KEYS) for cells in (train, moved)]
    assert list(sides[1].var_names) == GENES
    assert (sides[0].X != sides[1].X).nnz == 0


def test_every_baseline_emits_whole_counts_and_says_what_it_uses(train, wanted):
    for name, baseline in baselines.BASELINES.items():
        cells = baselines.predict(name, train, wanted, n_cells=50, **KEYS)
        assert cells.shape == (100, len(GENES)), name
        data = cells.X.data
        assert (data > 0).all(), name
        assert (data == np.round(data)).all(), name
        assert cells.uns["baseline"]["uses"] == list(baseline.uses), name
        assert baseline.uses, name
        assert baseline.source, name
        zeros = 1 - cells.X.nnz / np.prod(cells.shape)
        assert abs(zeros - (1 - train.X.nnz / np.prod(train.shape))) < 0.1, name


def test_copies_are_training_cells_and_only_of_the_context(train, wanted):
    asked = pd.concat([wanted, pd.DataFrame([("d3", "C")], columns=wanted.columns)])
    copies = baselines.predict("copy_training", train, asked, n_cells=40, **KEYS)
    where = [
        {row.tobytes() for row in train[own.to_numpy()].X.toarray()}
        for own in (
            (train.obs["donor"] == "d1") & (train.obs["target"] != CONTROL),
            (train.obs["donor"] == "d2") & (train.obs["target"] != CONTROL),
            (train.obs["donor"] == "d3") & (train.obs["target"] == "C"),
        )
    ]
    for label, known in zip(("A", "B", "C"), where, strict=True):
        own = copies[(copies.obs["target"] == label).to_numpy()].X.toarray()
        assert all(row.tobytes() in known for row in own)


def test_cells_do_not_depend_on_what_else_is_asked_for(train, wanted):
    for name in baselines.BASELINES:
        both = baselines.predict(name, train, wanted, n_cells=30, seed=2, **KEYS)
        one = baselines.predict(name, train, wanted.iloc[1:], n_cells=30, seed=2, **KEYS)
        own = both[(both.obs["target"] == "B").to_numpy()]
        assert (own.X != one.X).nnz == 0, name


def test_gene_order_plays_no_part_in_means(train, wanted):
    order = np.random.default_rng(0).permutation(len(GENES))
    sides = [baselines.predict("two_way", t, wanted, n_cells=400, **KEYS) for t in (train, train[:, order])]
    means = [pd.Series(np.asarray(s.X.mean(axis=0)).ravel(), s.var_names)[GENES] for s in sides]
    np.testing.assert_allclose(*means, rtol=0.2, atol=0.15)


def test_additive_transfer_is_right_where_effects_add_up(train, wanted):
    truth = make_cells(HELD, n=400, seed=5)
    expected = np.asarray(truth[truth.obs["target"] == "A"].X.sum(axis=0)).ravel()
    errors = {}
    for name in ("control", "perturbed_mean", "global_shift", "additive", "additive_shrunk", "two_way"):
        cells = baselines.predict(name, train, wanted.iloc[:1], n_cells=400, **KEYS)
        found = np.asarray(cells.X.sum(axis=0)).ravel()
        errors[name] = np.abs(np.log((found + 1) / found.sum()) - np.log((expected + 1) / expected.sum())).mean()
    assert errors["additive"] < 0.15
    assert errors["additive"] < 0.5 * min(errors[n] for n in ("control", "perturbed_mean", "global_shift"))
    assert errors["additive_shrunk"] < 0.6 * errors["control"]
    assert errors["two_way"] < errors["global_shift"]


@pytest.fixture(scope="module")
def training(train):
    keys = Keys.resolve(None, "target", ["donor"], CONTROL)
    return Training(read_sample(train, keys, np.array(GENES, dtype=object), "train"), CONTROL)


def test_two_way_equals_the_ridge_solution(training):
    keys = training.perturbed_keys
    donors, labels = sorted({k[0] for k in keys}), sorted({k[1] for k in keys})
    design = np.zeros((len(keys), 1 + len(donors) + len(labels)))
    design[:, 0] = 1
    for row, (donor, label) in enumerate(keys):
        design[row, 1 + donors.index(donor)] = 1
        design[row, 1 + len(donors) + labels.index(label)] = 1
    penalty = np.diag([0.0] + [shifts.RIDGE] * (design.shape[1] - 1))
    weights = np.linalg.solve(design.T @ design + penalty, design.T @ training.shifts)
    np.testing.assert_allclose(shifts.two_way(training, keys), design @ weights, atol=1e-10)


def test_shrinkage_is_the_least_squares_factor(training):
    keys, own = training.perturbed_keys, training.shifts
    above = below = 0.0
    for row, (donor, label) in enumerate(keys):
        others = [i for i, (d, p) in enumerate(keys) if p == label and d != donor]
        if others:
            mean = own[others].mean(axis=0)
            above, below = above + mean @ own[row], below + mean @ mean
    assert shifts.shrinkage(training) == pytest.approx(above / below)
    assert 0.5 < shifts.shrinkage(training) < 1


def test_means_that_cannot_be_known_are_nan(training):
    assert np.isnan(shifts.nearest_context(training, [("d1", "unseen")])).all()
    assert np.isnan(shifts.ridge_bilinear(training, [("d9", "A")])).all()
    assert np.isfinite(shifts.additive(training, [("d1", "unseen")])).all()


def test_bilinear_beats_the_control_where_effects_are_shared(training):
    truth = make_cells([("d1", CONTROL), ("d1", "A")], n=600, seed=8)
    keys = Keys.resolve(None, "target", ["donor"], CONTROL)
    other = Training(read_sample(truth, keys, np.array(GENES, dtype=object), "truth"), CONTROL)
    guess = shifts.ridge_bilinear(training, [("d1", "A")])[0]
    assert np.corrcoef(guess, other.shifts[0])[0, 1] > 0.3


def test_emitted_cells_have_the_wanted_mean_and_keep_the_library():
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.negative_binomial(2, 0.2, (4000, 12)).astype(np.float32))
    base = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    base /= base.sum()
    target = base * np.exp(rng.normal(0, 1, 12))
    target /= target.sum()
    out = emit_counts(counts, base, target, rng)
    found = np.asarray(out.sum(axis=0)).ravel()
    np.testing.assert_allclose(found / found.sum(), target, rtol=0.05)
    assert out.sum() == pytest.approx(counts.sum(), rel=0.02)
    # a gene that nobody expresses can appear
    nothing = counts.copy().tolil()
    nothing[:, 0] = 0
    nothing = nothing.tocsr()
    share = np.asarray(nothing.sum(axis=0), dtype=np.float64).ravel()
    appeared = emit_counts(nothing, share / share.sum(), np.full(12, 1 / 12), rng)
    assert appeared[:, 0].mean() == pytest.approx(nothing.sum(axis=1).mean() / 12, rel=0.1)


def test_unchanged_mean_leaves_cells_as_they_are():
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(2.0, (50, 9)).astype(np.float32))
    share = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    share /= share.sum()
    assert (emit_counts(counts, share, share, np.random.default_rng(2)) != counts).nnz == 0


def test_conditions_are_read_as_cells_are(train, wanted):
    doses = {label: float(i) for i, label in enumerate([CONTROL, *LABELS])}
    obs = train.obs.assign(time=8.0, target=train.obs["target"].map(doses))
    keys = {"perturbation_key": "target", "context_keys": ["donor", "time"], "control": 0.0}
    asked = obs[obs["target"] == doses["C"]].drop_duplicates().assign(n_cells=3.0)
    cells = baselines.predict("control", ad.AnnData(train.X, obs=obs, var=train.var), asked, **keys)
    assert cells.n_obs == 9
    assert set(cells.obs["time"]) == {"8"}
    for n in (2.7, 0, np.nan):
        with pytest.raises(DataError, match=f"whole number of at least 1, got {n} in row 1 of conditions"):
            baselines.predict("control", train, wanted.assign(n_cells=[3, n]), **KEYS)
        with pytest.raises(DataError, match="whole number of at least 1"):
            baselines.predict("control", train, wanted, n_cells=n, **KEYS)


def test_mistakes_are_named(train, wanted):
    with pytest.raises(DataError, match="baselines are control"):
        baselines.predict("magic", train, wanted, **KEYS)
    with pytest.raises(DataError, match=r"lacks the columns \['donor'\]"):
        baselines.predict("control", train, wanted[["target"]], **KEYS)
    elsewhere = pd.DataFrame([("d7", "A")], columns=["donor", "target"])
    with pytest.raises(DataError, match="cannot predict 1 conditions"):
        baselines.predict("additive", train, elsewhere, **KEYS)
    some = baselines.predict("additive", train, pd.concat([wanted, elsewhere]), allow_missing=True, n_cells=5, **KEYS)
    assert some.uns["baseline"]["missing"] == ["d7|A"]
    assert some.n_obs == 10
    normalised = ad.AnnData(metrics.log_normalize(train), obs=train.obs, var=train.var)
    with pytest.raises(DataError, match="no counts"):
        baselines.predict("control", normalised, wanted, **KEYS)

"""Standard errors, intervals, ranks and p values on scores of known distribution."""

import numpy as np
import pytest

from scldm_cd4.ranking.uncertainty import Spread, assess, false_discovery_rates, joint_df, moderate, p_values


def simulate(
    rng: np.random.Generator, truth: np.ndarray, n_folds: int, n_donors: int, sd: tuple[float, float]
) -> Spread:
    """Scores that are means over folds of cells in donors, with independent errors of both."""
    k = len(truth)
    donor = sd[1] * rng.normal(size=(k, n_donors)) if n_donors > 1 else np.zeros((k, 1))
    values = truth[:, None, None] + donor[:, :, None] + sd[0] * rng.normal(size=(k, donor.shape[1], n_folds))
    total = values.mean(axis=(1, 2))
    folds = [(v.sum() - v.sum(axis=0)) / (v.size - v.shape[0]) for v in values]
    outside = (
        (values.sum(axis=(1, 2))[:, None] - values.sum(axis=2)) / ((n_donors - 1) * n_folds) if n_donors > 1 else 0
    )
    return Spread(total, tuple(folds), np.asarray(outside) if n_donors > 1 else np.full((k, 1), np.nan))


@pytest.mark.parametrize(("n_donors", "donor_sd"), [(1, 0.0), (2, 0.3), (4, 0.0), (4, 0.5), (20, 0.5)])
def test_intervals_cover(n_donors: int, donor_sd: float) -> None:
    rng = np.random.default_rng(n_donors)
    truth = rng.normal(size=300)
    spread = simulate(rng, truth, 20, n_donors, (1.0, donor_sd))
    found = assess(spread, n_boot=100, top_k=20, seed=0)
    cells = 1.0 / np.sqrt(20 * n_donors)
    assert np.sqrt(np.mean(found.se_cells**2)) == pytest.approx(cells, rel=0.1)
    covered = ((found.lo <= truth) & (truth <= found.hi)).mean()
    if n_donors == 2:  # too few donors for an interval over donors: it holds cells only
        assert np.isnan(found.se_donors).all()
        assert covered < 0.85
        return
    assert 0.85 < covered < 0.96
    if n_donors > 2:
        assert np.sqrt(np.mean(found.se_total**2)) == pytest.approx(
            np.sqrt(cells**2 + donor_sd**2 / n_donors), rel=0.15
        )


def test_ranks_of_clear_and_of_equal_scores() -> None:
    rng = np.random.default_rng(0)
    clear = assess(simulate(rng, np.arange(30.0), 20, 4, (0.1, 0.1)), n_boot=200, top_k=5, seed=0)
    np.testing.assert_array_equal(clear.rank_lo, np.arange(30, 0, -1))
    np.testing.assert_array_equal(clear.rank_hi, np.arange(30, 0, -1))
    np.testing.assert_array_equal(clear.p_top_k, np.arange(30) >= 25)
    equal = assess(simulate(rng, np.zeros(30), 20, 1, (1.0, 0.0)), n_boot=400, top_k=5, seed=0)
    assert np.median(equal.rank_hi - equal.rank_lo) > 10
    assert equal.p_top_k.sum() == pytest.approx(5)
    assert equal.p_top_k.max() < 0.99


def test_shared_noise_does_not_blur_ranks() -> None:
    noise = np.random.default_rng(1).normal(size=20)
    folds = tuple(x + noise for x in (0.0, 0.01, 0.02))
    found = assess(Spread(np.array([0, 0.01, 0.02]), folds, np.full((3, 1), np.nan)), n_boot=100, top_k=1, seed=0)
    assert found.se_cells.min() > 1
    np.testing.assert_array_equal(found.p_top_k, [0, 0, 1])


def test_replicates_are_seeded() -> None:
    spread = simulate(np.random.default_rng(2), np.zeros(10), 20, 4, (1.0, 0.5))
    one, same, other = (assess(spread, n_boot=50, top_k=3, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.p_top_k, same.p_top_k)
    assert (one.p_top_k != other.p_top_k).any()
    np.testing.assert_array_equal(one.lo, other.lo)


def test_moderated_variances() -> None:
    rng = np.random.default_rng(3)
    equal = 2.0 * rng.chisquare(3, 2000) / 3
    found, df = moderate(equal, 3)
    assert df[0] > 100
    np.testing.assert_allclose(found, 2.0, rtol=0.1)
    true = 4 * 2.0 / rng.chisquare(4, 5000)  # scaled inverse chi-square prior with 4 degrees of freedom
    found, df = moderate(true * rng.chisquare(3, 5000) / 3, 3)
    assert df[0] == pytest.approx(3 + 4, rel=0.1)
    few = np.array([1.0, 2.0])
    np.testing.assert_array_equal(moderate(few, 3)[0], few)


def test_p_values_are_uniform_by_chance_and_rates_are_monotone() -> None:
    rng = np.random.default_rng(4)
    p = p_values(rng.normal(size=4000), np.ones(4000), np.full(4000, 1e6))
    assert abs(np.quantile(p, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03
    assert np.isnan(p_values(np.array([np.nan]), np.ones(1), np.ones(1))).all()
    assert p_values(np.array([1.0, -1.0, 0.0]), np.zeros(3), np.ones(3)).tolist() == [0, 1, 1]
    q = false_discovery_rates(np.array([0.01, 0.02, np.nan, 0.9]))
    np.testing.assert_allclose(q, [0.03, 0.03, np.nan, 0.9])


def test_errors_of_few_and_of_many_degrees_of_freedom_have_those_of_their_sum() -> None:
    first, second = np.array([1.0, 1.0, 1e-4, 0.0]), np.array([0.0, 1.0, 1.0, 1.0])
    df = joint_df(first, np.full(4, 3.0), second, 500)
    np.testing.assert_allclose(df, [3, 4 / (1 / 3 + 1 / 500), 500, 500], rtol=1e-2)
    rng = np.random.default_rng(
        0
    )  # an error of variance 1/4 + 3/4, its parts estimated with 3 and 500 degrees of freedom
    few, many = 0.25 * rng.chisquare(3, 20_000) / 3, 0.75 * rng.chisquare(500, 20_000) / 500
    p = p_values(rng.normal(size=20_000), np.sqrt(few + many), joint_df(few, np.full(20_000, 3.0), many, 500))
    assert abs(np.mean(p < 0.01) - 0.01) < 0.003

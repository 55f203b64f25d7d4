"""Behaviour of the distribution metrics: chance levels, copies, edges, invariances, ordering."""

import itertools
import tracemalloc
import warnings

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError

KERNELS = ("braycurtis", "ruzicka", "tanimoto")


def normal(n: int, d: int = 5, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def counts(n: int, genes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.5, 2.0, (n, genes))) + np.eye(n, genes)


class TestIdenticalDistributions:
    def test_unbiased_statistics_are_zero_on_average_and_may_be_negative(self):
        real, pred = ([normal(25, seed=2 * i + side) for i in range(400)] for side in (0, 1))
        table = metrics.distribution_table(real, pred, metrics=("mmd2", "mmd2_multi", "energy_distance"))
        for name in ("mmd2", "mmd2_multi", "energy_distance"):
            values = table[name]
            assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values)), name
            assert (values < 0).mean() > 0.3, name

    def test_biased_statistics_have_a_floor(self):
        x, y = normal(40, seed=0), normal(40, seed=1)
        sigma = metrics.median_distance(x)
        within = [np.exp(-np.square(np.linalg.norm(a[:, None] - a, axis=2)) / (2 * sigma**2)) for a in (x, y)]
        between = np.exp(-np.square(np.linalg.norm(x[:, None] - y, axis=2)) / (2 * sigma**2))
        assert metrics.mmd2(x, y, biased=True) == pytest.approx(sum(k.mean() for k in within) - 2 * between.mean())
        assert metrics.mmd2(x, y, biased=True) > metrics.mmd2(x, y)
        assert metrics.energy_distance(x, y, biased=True) > metrics.energy_distance(x, y)

    def test_one_nn_is_one_half_at_any_sizes(self):
        values = [metrics.one_nn_accuracy(normal(40, seed=i), normal(400, seed=99 + i)) for i in range(30)]
        assert np.mean(values) == pytest.approx(0.5, abs=0.05)

    def test_frechet_floor_falls_with_the_number_of_cells(self):
        def mean(n):
            return np.mean([metrics.frechet_distance(normal(n, 6, i), normal(n, 6, 50 + i)) for i in range(20)])

        few, many = mean(50), mean(500)
        assert 5 < few / many < 15
        assert many == pytest.approx(6 * 6 / 500, rel=0.5)

    def test_precision_recall_density_coverage(self):
        scores = [metrics.prdc(normal(300, 8, i), normal(300, 8, 77 + i)) for i in range(4)]
        mean = {name: np.mean([score[name] for score in scores]) for name in scores[0]}
        assert mean["density"] == pytest.approx(1.0, abs=0.1)
        assert mean["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)
        assert min(mean["precision"], mean["recall"]) > 0.85

    def test_permutation_p_is_uniform(self):
        p = [
            metrics.permutation_test(normal(12, 3, i), normal(15, 3, 500 + i), n_permutations=99)[1] for i in range(200)
        ]
        assert np.mean(p) == pytest.approx(0.5, abs=0.08)
        assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.07)


class TestCopies:
    def test_a_copy(self):
        x = normal(30)
        copy = x[::-1].copy()
        assert metrics.mmd2(x, copy, biased=True) == pytest.approx(0, abs=1e-14)
        assert metrics.energy_distance(x, copy, biased=True) == pytest.approx(0, abs=1e-12)
        assert metrics.mmd2(x, copy) < 0
        assert metrics.energy_distance(x, copy) < 0
        for method in ("exact", "sinkhorn"):
            assert metrics.wasserstein(x, copy, method=method) == pytest.approx(0, abs=1e-3)
        assert metrics.wasserstein(x, copy) <= 1e-6
        assert metrics.frechet_distance(x, copy) == pytest.approx(0, abs=1e-10)
        scores = metrics.prdc(x, copy)
        assert (scores["precision"], scores["recall"], scores["coverage"]) == (1, 1, 1)
        with pytest.warns(UserWarning, match="30 predicted cells are equal to a real cell"):
            assert metrics.one_nn_accuracy(x, copy) == 0
        assert metrics.distribution_table([x], [copy])["n_shared"] == [30]

    def test_copies_far_from_the_origin_are_found(self):
        x = normal(40, 30) + 1e4
        with pytest.warns(UserWarning, match="40 predicted cells"):
            metrics.one_nn_accuracy(x, x)

    def test_ties_count_half(self):
        x, y = np.array([[0.0], [1.0]]), np.array([[-1.0], [5.0]])
        # 0 has its own label and the other at distance 1; 1 has its own; -1 has the other; 5 has the other
        assert metrics.one_nn_accuracy(x, y) == pytest.approx((0.5 + 1 + 0 + 0) / 4)

    def test_negative_values_have_no_root(self):
        x, y = normal(20), normal(20, seed=1)
        with pytest.raises(DataError, match="biased=True"):
            metrics.mmd2(x, y, root=True)
        assert metrics.mmd2(x, y, biased=True, root=True) ** 2 == pytest.approx(metrics.mmd2(x, y, biased=True))


class TestMMD:
    def test_range_and_scales(self):
        x, far = normal(20), normal(20, shift=100.0)
        scales = metrics.MULTI_SCALES
        assert metrics.mmd2(x, far, scales=(0.25,), biased=True) <= 2
        assert metrics.mmd2(x, far, scales=scales, biased=True) <= 2
        sigma = metrics.median_distance(x)
        y = normal(15, seed=1, shift=0.5)
        single = [metrics.mmd2(x, y, bandwidth=sigma * scale) for scale in scales]
        assert metrics.mmd2(x, y, scales=scales) == pytest.approx(np.mean(single), rel=1e-12)
        assert metrics.mmd2(x, y, scales=(0.3, 1.7)) == pytest.approx(
            np.mean([metrics.mmd2(x, y, bandwidth=sigma * scale) for scale in (0.3, 1.7)])
        )

    def test_the_bandwidth_is_that_of_the_real_cells(self):
        x, y = normal(30), 50 * normal(30, seed=1)
        assert metrics.mmd2(x, y) == metrics.mmd2(x, y, bandwidth=metrics.median_distance(x))
        assert metrics.mmd2(x, y) > metrics.mmd2(x, y, bandwidth=metrics.median_distance(np.vstack([x, y])))
        assert np.isnan(metrics.mmd2(np.zeros((5, 2)), normal(5, 2)))
        with pytest.raises(DataError, match="must be positive"):
            metrics.mmd2(x, y, bandwidth=-1.0)
        with pytest.raises(DataError, match="'rbf'"):
            metrics.mmd2(x, y, kernel="linear")

    def test_squared_energy_sees_only_the_means(self):
        x, y = normal(30), 3 * normal(20, seed=1, shift=1)
        gap = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
        assert metrics.energy_distance(x, y, squared=True, biased=True) == pytest.approx(2 * gap)
        with pytest.raises(DataError, match="not squared"):
            metrics.energy_distance(x, y, squared=True, within_x=1.0)

    @pytest.mark.parametrize("kernel", ["rbf", "energy", *KERNELS])
    def test_permutation(self, kernel):
        x, y = counts(15, 12), counts(12, 12, 1)
        value, p = metrics.permutation_test(x, y, kernel=kernel, n_permutations=199, seed=1)
        direct = metrics.energy_distance(x, y) if kernel == "energy" else metrics.mmd2(x, y, kernel=kernel)
        assert value == pytest.approx(direct, abs=1e-12)
        assert (value, p) == metrics.permutation_test(x, y, kernel=kernel, n_permutations=199, seed=1)
        assert metrics.permutation_test(x, y + 50, kernel=kernel, n_permutations=199)[1] == pytest.approx(1 / 200)

    def test_permutation_limits(self):
        assert np.isnan(metrics.permutation_test(normal(1), normal(9))).all()
        with pytest.raises(DataError, match="too many"):
            metrics.permutation_test(np.zeros((3000, 2)), np.zeros((3000, 2)))


class TestCompositionalKernels:
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_positive_definite_bounded_and_one_for_equal_profiles(self, kernel):
        from scldm_cd4.metrics.distribution.compositional import compositional_kernel

        x = counts(40, 60)
        matrix = compositional_kernel(x, x, kernel)
        np.testing.assert_allclose(np.diag(matrix), 1)
        assert matrix.min() >= 0
        assert matrix.max() <= 1 + 1e-12
        assert np.linalg.eigvalsh(matrix).min() > -1e-10

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_sparse_input_of_any_kind(self, kernel):
        x, y = counts(300, 40), counts(10, 40, 1)
        wanted = metrics.mmd2(x, y, kernel=kernel)
        for form in (sp.csr_matrix, sp.csc_matrix, lambda a: a.astype(np.float32), lambda a: a.astype(int)):
            assert metrics.mmd2(form(x), form(y), kernel=kernel) == pytest.approx(wanted, abs=1e-12)
        assert metrics.mmd2(sp.csr_matrix(x), y, kernel=kernel) == pytest.approx(wanted, abs=1e-12)

    def test_signed_values_and_empty_cells_are_refused(self):
        x = counts(6, 8)
        for kernel in KERNELS:
            with pytest.raises(DataError, match="not principal components"):
                metrics.mmd2(x, x - 1, kernel=kernel)
        x[2] = 0
        with pytest.raises(DataError, match="without any count"):
            metrics.mmd2(x, x, kernel="ruzicka")

    @pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
    def test_no_array_of_cells_by_cells_by_genes(self, form):
        n, genes = 150, 800
        x, y = form(counts(n, genes)), form(counts(n, genes, 1))
        metrics.mmd2(x[:5], y[:5], kernel="ruzicka")  # imports
        tracemalloc.start()
        metrics.mmd2(x, y, kernel="ruzicka")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < n * n * genes * 8 / 10

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_the_order_of_genes_does_not_matter(self, kernel):
        x, y, order = counts(20, 30), counts(20, 30, 1), np.random.default_rng(2).permutation(30)
        assert metrics.mmd2(x[:, order], y[:, order], kernel=kernel) == pytest.approx(
            metrics.mmd2(x, y, kernel=kernel), abs=1e-12
        )


class TestMemory:
    @pytest.mark.parametrize(
        "metric",
        [metrics.mmd2, metrics.energy_distance, metrics.one_nn_accuracy, metrics.prdc, metrics.frechet_distance],
    )
    def test_distances_are_never_kept_all_at_once(self, metric):
        n = 3000
        x, y = normal(n, 3), normal(n, 3, 1)
        metric(x[:50], y[:50])  # imports
        tracemalloc.start()
        metric(x, y)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < n * n * 8 / 2


class TestWasserstein:
    def test_order_one_in_one_dimension(self):
        from scipy.stats import wasserstein_distance

        x, y = normal(30, 1), normal(41, 1, 1, 0.3)
        assert metrics.wasserstein(x, y, p=1) == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), abs=1e-10)
        assert metrics.wasserstein(x, y, p=1, method="sliced") == pytest.approx(
            metrics.wasserstein(x, y, p=1), abs=1e-6
        )

    def test_sinkhorn_does_not_depend_on_the_scale_and_tends_to_the_exact_value(self):
        x, y = normal(40, 6), normal(50, 6, 1, 1.0)
        value = metrics.wasserstein(x, y, method="sinkhorn")
        for scale in (1e-4, 1e5):
            assert metrics.wasserstein(scale * x, scale * y, method="sinkhorn") == pytest.approx(
                scale * value, rel=1e-6
            )
        exact = metrics.wasserstein(x, y)
        close = metrics.wasserstein(x, y, method="sinkhorn", regularisation=0.01, max_iterations=50_000)
        assert 0 < value < close < exact
        assert close == pytest.approx(exact, rel=0.05)

    def test_sinkhorn_that_does_not_converge_is_nan(self):
        with pytest.warns(UserWarning, match="did not converge"):
            value = metrics.wasserstein(normal(30), normal(30, seed=1), method="sinkhorn", max_iterations=10)
        assert np.isnan(value)

    def test_outliers_do_not_underflow(self):
        x, y = normal(30), normal(30, seed=1)
        x[0] += 1e4
        exact, value = metrics.wasserstein(x, y), metrics.wasserstein(x, y, method="sinkhorn", max_iterations=50_000)
        assert value == pytest.approx(exact, rel=0.05)

    def test_limits(self):
        big = np.zeros((6000, 1))
        with pytest.raises(DataError, match="max_cells=2000"):
            metrics.wasserstein(big, big)
        x = normal(300)
        assert metrics.wasserstein(x, x + 1, max_cells=50, seed=1) == metrics.wasserstein(
            x, x + 1, max_cells=50, seed=1
        )
        assert metrics.wasserstein(x, x + 1, max_cells=50, seed=1) != metrics.wasserstein(
            x, x + 1, max_cells=50, seed=2
        )
        with pytest.raises(DataError, match="p=3"):
            metrics.wasserstein(x, x, p=3)
        with pytest.raises(DataError, match="'tree'"):
            metrics.wasserstein(x, x, method="tree")


class TestFrechet:
    def test_closed_form(self):
        x = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
        # equal axes: squared difference of the standard deviations, summed
        wanted = 9 + np.square(np.sqrt(x.var(axis=0, ddof=1)) * (1 - 3)).sum()
        found = metrics.frechet_distance(x, 3 * x + np.array([3.0, 0]))
        assert found == pytest.approx(wanted)
        assert metrics.frechet_distance(x, 3 * x + np.array([3.0, 0]), rooted=True) == pytest.approx(np.sqrt(wanted))

    def test_few_cells_warn_and_one_is_nan(self):
        with pytest.warns(UserWarning, match="at least 20 cells"):
            value = metrics.frechet_distance(normal(8, 10), normal(8, 10, 1))
        assert value > 0
        assert np.isnan(metrics.frechet_distance(normal(1), normal(9)))


class TestEdges:
    def test_too_few_cells_are_nan(self):
        one, some = normal(1), normal(9)
        for pair in ((one, some), (some, one), (np.empty((0, 5)), some)):
            values = metrics.distribution_table([pair[0]], [pair[1]])
            for name in set(metrics.DISTRIBUTION_METRICS) - {"w1", "w2"}:
                assert np.isnan(values[name][0]), name
            for function in (metrics.mmd2, metrics.energy_distance, metrics.one_nn_accuracy):
                assert np.isnan(function(*pair))
            assert np.isnan(list(metrics.prdc(*pair).values())).all()
        assert np.isnan(metrics.prdc(normal(5), normal(9), k=5)["precision"])
        assert not np.isnan(metrics.prdc(normal(6), normal(9), k=5)["precision"])
        with pytest.raises(DataError, match="k=0"):
            metrics.prdc(some, some, k=0)

    def test_values_that_are_not_finite(self):
        bad = normal(9)
        bad[3, 2] = np.nan
        for function in (metrics.mmd2, metrics.energy_distance, metrics.wasserstein, metrics.one_nn_accuracy):
            with pytest.raises(DataError, match="not finite"):
                function(normal(9), bad)
        with pytest.raises(DataError, match="predicted condition 1"):
            metrics.distribution_table([normal(9)] * 2, [normal(9), bad])

    def test_genes_are_matched_by_name(self):
        names = [f"g{i}" for i in range(6)]
        real = ad.AnnData(counts(20, 6).astype(np.float32))
        pred = ad.AnnData(counts(20, 6, 1).astype(np.float32))
        real.var_names = pred.var_names = names
        shuffled = pred[:, names[::-1]].copy()
        for function in (metrics.mmd2, metrics.energy_distance, metrics.wasserstein, metrics.r2_mean, metrics.mse):
            assert function(real, shuffled) == pytest.approx(function(real, pred), abs=1e-12)
        projection = metrics.fit_projection(real, 3)
        np.testing.assert_allclose(projection.apply(shuffled), projection.apply(pred), atol=1e-12)
        assert projection.n_cells == 20
        with pytest.raises(DataError, match="1 are missing"):
            metrics.mmd2(real, pred[:, 1:])
        with pytest.raises(DataError, match="1 are missing"):
            projection.apply(pred[:, 1:])
        pred.var_names = ["g0", *names[:5]]
        with pytest.raises(DataError, match="'g0' occurs more than once"):
            metrics.mmd2(real, pred)


class TestInvariance:
    @settings(max_examples=25, deadline=None)
    @given(n=st.integers(7, 25), m=st.integers(7, 25), d=st.integers(1, 6), seed=st.integers(0, 10_000))
    def test_order_position_rotation_and_type(self, n, m, d, seed):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(n, d)), rng.normal(0.5, 2, size=(m, d))
        rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
        wanted = self.values(x, y)
        others = {
            "cells": (x[rng.permutation(n)], y[rng.permutation(m)]),
            "position and rotation": (x @ rotation + 3, y @ rotation + 3),
            "sparse": (sp.csr_matrix(x), sp.csr_matrix(y)),
        }
        for what, (a, b) in others.items():
            np.testing.assert_allclose(self.values(a, b), wanted, atol=1e-7, err_msg=what)
        single = self.values(x.astype(np.float32), y.astype(np.float32))
        np.testing.assert_allclose(single, wanted, atol=1e-3)

    @staticmethod
    def values(x, y):
        return np.array(
            [metrics.mmd2(x, y), metrics.energy_distance(x, y), metrics.wasserstein(x, y)]
            + list(metrics.prdc(x, y, equal_n=False).values())
        )


class TestTable:
    sizes = [(20, 20), (3, 30), (0, 5), (1, 4), (60, 60), (9, 8), (60, 58), (2, 2), (700, 650)]

    def blocks(self):
        real = [normal(n, 4, i) for i, (n, _) in enumerate(self.sizes)]
        pred = [normal(m, 4, 50 + i, 0.3) for i, (_, m) in enumerate(self.sizes)]
        return real, pred

    def test_equals_the_functions_condition_by_condition(self):
        real, pred = self.blocks()
        sigma = metrics.median_distance(np.vstack(real))
        table = metrics.distribution_table(real, pred)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few cells for a covariance
            for i, (x, y) in enumerate(zip(real, pred, strict=True)):
                wanted = {
                    "mmd2": metrics.mmd2(x, y, bandwidth=sigma),
                    "mmd2_multi": metrics.mmd2(x, y, bandwidth=sigma, scales=metrics.MULTI_SCALES),
                    "energy_distance": metrics.energy_distance(x, y),
                    "w1": metrics.wasserstein(x, y, p=1),
                    "w2": metrics.wasserstein(x, y),
                    "frechet_distance": metrics.frechet_distance(x, y),
                    "one_nn_accuracy": metrics.one_nn_accuracy(x, y),
                    **metrics.prdc(x, y),
                }
                assert wanted.keys() == set(metrics.DISTRIBUTION_METRICS)
                for name, value in wanted.items():
                    np.testing.assert_allclose(table[name][i], value, rtol=1e-9, atol=1e-10, err_msg=f"{name} {i}")
        assert table["n_real"].tolist() == [n for n, _ in self.sizes]
        assert table["n_pred"].tolist() == [m for _, m in self.sizes]

    def test_the_reference_serves_many_predictions_and_any_order(self):
        real, pred = self.blocks()
        reference = metrics.DistributionReference(real)
        first = metrics.distribution_table(reference, pred)
        again = metrics.distribution_table(reference, [y + 1 for y in pred], metrics=("mmd2",))
        assert again.keys() & set(metrics.DISTRIBUTION_METRICS) == {"mmd2"}
        np.testing.assert_array_equal(reference.compare(pred)["mmd2"], first["mmd2"])
        backwards = metrics.distribution_table(real[::-1], pred[::-1], bandwidth=reference.bandwidth)
        for name in metrics.DISTRIBUTION_METRICS:
            np.testing.assert_allclose(backwards[name][::-1], first[name], rtol=1e-9, atol=1e-10, err_msg=name)

    def test_more_cells_than_the_limit_are_drawn_from_and_counted(self):
        real, pred = [normal(80)], [normal(90, seed=1)]
        table = metrics.DistributionReference(real, max_cells=30, max_cells_kernel=40).compare(pred)
        assert (table["n_real"][0], table["n_real_used"][0], table["n_pred_used"][0]) == (80, 30, 30)
        whole = metrics.distribution_table(real, pred)
        assert table["w2"][0] != whole["w2"][0]
        assert table["mmd2"][0] != whole["mmd2"][0]
        assert table["frechet_distance"][0] == whole["frechet_distance"][0]

    def test_no_conditions(self):
        table = metrics.distribution_table([], [])
        assert {len(values) for values in table.values()} == {0}
        assert metrics.memorisation_table([], [], normal(5)).size == 0

    def test_refusals(self):
        x = [normal(9)]
        with pytest.raises(DataError, match="1 real and 2 predicted"):
            metrics.distribution_table(x, x * 2)
        with pytest.raises(DataError, match=r"\[4, 5\] features"):
            metrics.distribution_table(x, [normal(9, 4)])
        with pytest.raises(DataError, match="unknown metrics"):
            metrics.distribution_table(x, x, metrics=("mmd",))
        with pytest.raises(DataError, match="bandwidth already"):
            metrics.distribution_table(metrics.DistributionReference(x), x, bandwidth=1.0)


class TestMemorisation:
    def test_none_copies_and_near_copies(self):
        train, held_out, fresh = normal(400, 10), normal(150, 10, 1), normal(150, 10, 2)
        assert metrics.memorisation(held_out, fresh, train) == pytest.approx(1, abs=0.06)
        assert metrics.memorisation(held_out, train[:100], train) == 0
        near = train[:100] + 0.1 * normal(100, 10, 3)
        assert 0 < metrics.memorisation(held_out, near, train) < 0.5
        assert metrics.memorisation(held_out, fresh + 4, train) > 1.5
        assert np.isnan(metrics.memorisation(train[:50], fresh, train))
        assert np.isnan(metrics.memorisation(held_out, fresh[:0], train))
        with pytest.raises(DataError, match="no training cells"):
            metrics.memorisation(held_out, fresh, train[:0])

    def test_the_share_sees_few_copies(self):
        train, held_out, fresh = normal(400, 10), normal(400, 10, 1), normal(400, 10, 2)
        assert metrics.memorised_share(held_out, fresh, train) == pytest.approx(0.05, abs=0.04)
        mixed = np.vstack([fresh[:300], train[:100]])
        assert metrics.memorisation(held_out, mixed, train) > 0.8
        assert metrics.memorised_share(held_out, mixed, train) > 0.25
        with pytest.raises(DataError, match="between 0 and 1"):
            metrics.memorised_share(held_out, fresh, train, quantile=1.0)

    def test_distances_and_table(self):
        train, a, b = normal(50) + 1e3, normal(12, seed=1) + 1e3, normal(7, seed=2) + 1e3
        brute = np.linalg.norm(a[:, None] - train, axis=2).min(axis=1)
        np.testing.assert_allclose(metrics.nearest_distance(a, train), brute, rtol=1e-12)
        table = metrics.memorisation_table([a, b, a[:0]], [b, a, a], train)
        expected = [metrics.memorisation(a, b, train), metrics.memorisation(b, a, train), np.nan]
        np.testing.assert_allclose(table, expected)


class TestMoments:
    def test_variance_of_sparse_cells_and_edges(self):
        x, y = counts(30, 20), counts(25, 20, 1)
        wanted = metrics.r2_variance(x, y)
        assert metrics.r2_variance(sp.csr_matrix(x), sp.csc_matrix(y)) == pytest.approx(wanted, rel=1e-12)
        assert metrics.r2_mean(x, x) == 1
        assert np.isnan(metrics.r2_variance(x[:1], y))
        assert np.isnan(metrics.r2(np.full(5, 0.1), np.arange(5.0)))
        rows = metrics.r2(np.stack([x[0], x[1]]), np.stack([y[0], y[1]]))
        np.testing.assert_allclose(rows, [metrics.r2(x[0], y[0]), metrics.r2(x[1], y[1])])
        with pytest.raises(DataError, match="same shape"):
            metrics.r2(x[0], y[0][:3])

    def test_no_change_scores_high_on_means_and_zero_on_deltas(self):
        rng = np.random.default_rng(0)
        control = rng.gamma(0.5, 2.0, 300)
        delta = 0.1 * rng.normal(size=300)
        assert metrics.r2(control + delta, control) > 0.95
        assert metrics.r2(delta, np.zeros(300)) <= 0


class TestProjectionTrap:
    def test_components_fitted_on_few_scored_cells_see_a_repeat_as_different(self):
        rng = np.random.default_rng(0)
        genes, loading = 1500, rng.normal(size=(3, 1500))

        def draw(n):
            return rng.normal(size=(n, 3)) @ loading + 3 * rng.normal(size=(n, genes))

        train, scored, repeat = draw(500), draw(40), draw(40)
        honest, overfitted = metrics.fit_projection(train, 20), metrics.fit_projection(scored, 20)
        fair = metrics.energy_distance(honest.apply(scored), honest.apply(repeat))
        unfair = metrics.energy_distance(overfitted.apply(scored), overfitted.apply(repeat))
        assert abs(fair) < 1
        assert unfair > 5 * max(fair, 1)

    def test_projection_without_the_mean_would_show(self):
        x, y = 8 + normal(60, 10), 8 + normal(60, 10, 1)
        projection = metrics.fit_projection(x, 4)
        right = metrics.wasserstein(projection.apply(x), projection.apply(y))
        wrong = metrics.wasserstein(projection.apply(x), y @ projection.components.T)
        assert wrong > 3 * right


def test_ladder_of_predictions():
    """Self, a fresh draw, half the effect, the mean of all effects and no effect come in this order."""
    rng = np.random.default_rng(1)
    genes, n, n_perturbations = 200, 80, 6
    base = rng.gamma(0.6, 1.5, genes)
    shared, own = 0.5 * rng.normal(size=genes), rng.normal(size=(n_perturbations, genes))
    effects = shared + own * (rng.random((n_perturbations, genes)) < 0.3)

    def draw(effect, cells=n):
        mean = base * np.exp(effect)
        return metrics.log_normalize(rng.poisson(rng.gamma(2.0, mean / 2.0, (cells, genes))) + 1e-9)

    train = sp.vstack([draw(effect, 150) for effect in (*effects, 0 * shared)])
    projection = metrics.fit_projection(train, 15)
    real = [projection.apply(draw(effect)) for effect in effects]
    mean_effect = np.log(np.exp(effects).mean(axis=0))
    ladder = {
        "self": real,
        "oracle": [projection.apply(draw(effect)) for effect in effects],
        "half": [projection.apply(draw(effect / 2)) for effect in effects],
        "perturbed mean": [projection.apply(draw(mean_effect)) for _ in effects],
        "control": [projection.apply(draw(0 * shared)) for _ in effects],
    }
    reference = metrics.DistributionReference(real)
    names = ("mmd2", "mmd2_multi", "energy_distance", "w1", "w2", "frechet_distance")
    tables = {name: reference.compare(pred, names) for name, pred in ladder.items()}
    for metric in names:
        values = {name: table[metric].mean() for name, table in tables.items()}
        for better, worse in itertools.pairwise(("self", "oracle", "half", "control")):
            assert values[better] < values[worse], (metric, values)
        assert values["oracle"] < values["perturbed mean"] < values["control"], (metric, values)

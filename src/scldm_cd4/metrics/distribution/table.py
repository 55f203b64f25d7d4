"""All distribution metrics of many conditions, the real side computed once."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.distribution.energy import energy_of
from scldm_cd4.metrics.distribution.frechet import frechet_of, gaussians
from scldm_cd4.metrics.distribution.mmd import MULTI_SCALES, median_distance, mmd2_of, rbf_bandwidths
from scldm_cd4.metrics.distribution.neighbours import NEIGHBOURS, Neighbours, neighbour_scores, neighbours_within
from scldm_cd4.metrics.distribution.pair_means import PairMeans, cross_means, within_means
from scldm_cd4.metrics.distribution.pairwise import check_blocks, equal_sizes, subset
from scldm_cd4.metrics.distribution.wasserstein import wasserstein

KERNEL_METRICS = ("mmd2", "mmd2_multi", "energy_distance")
NEIGHBOUR_METRICS = ("one_nn_accuracy", "precision", "recall", "density", "coverage")
DISTRIBUTION_METRICS = (*KERNEL_METRICS, "w1", "w2", "frechet_distance", *NEIGHBOUR_METRICS)
"""The columns that a table of distribution metrics may have."""


class DistributionReference:
    """Real cells of many conditions, against which predictions are compared.

    What depends on the real cells only (bandwidth, within-terms, neighbours, covariances) is computed once, on first
    use, for all predictions.

    Parameters
    ----------
    real
        One block of cells x features per condition, in the space to compare in (:class:`Projection`).
    bandwidth
        Sigma of the RBF kernels of all conditions; by default the median distance of the pooled real cells.
    k
        Neighbours that span a ball of precision, recall, density and coverage.
    max_cells
        Cells of a condition that W1, W2 and the neighbour metrics take; more are drawn from.
    max_cells_kernel
        The same for MMD^2 and the energy distance.
    seed
        Seed of the draws.

    Raises
    ------
    DataError
        If the features differ between conditions, or a value is not finite.

    Examples
    --------
    >>> reference = metrics.DistributionReference([x[:40], x[40:80]])
    >>> reference.compare([y[:40], y[40:80]], metrics=("mmd2", "energy_distance"))["mmd2"].shape
    (2,)
    """

    def __init__(
        self,
        real: Sequence[Any],
        *,
        bandwidth: float | None = None,
        k: int = NEIGHBOURS,
        max_cells: int = 2000,
        max_cells_kernel: int = 10_000,
        seed: int = 0,
    ) -> None:
        blocks = check_blocks(real, "real condition")
        self.k, self.seed, self.max_cells, self.max_cells_kernel = k, seed, max_cells, max_cells_kernel
        self.n_cells = np.array([len(block) for block in blocks], dtype=np.int64)
        self._kernel_blocks = [subset(block, max_cells_kernel, seed, 0) for block in blocks]
        self._blocks = [subset(block, max_cells, seed, 0) for block in blocks]
        self._gaussians = gaussians(blocks)
        if bandwidth is None and blocks:
            bandwidth = median_distance(np.vstack(blocks), seed=seed)
        self.bandwidth = float("nan") if bandwidth is None else float(bandwidth)
        rbf_bandwidths(self.bandwidth, MULTI_SCALES)  # refuse a negative one here

    @cached_property
    def _within(self) -> PairMeans:
        return within_means(self._kernel_blocks, rbf_bandwidths(self.bandwidth, MULTI_SCALES), distance=True)

    @cached_property
    def _neighbours(self) -> Neighbours:
        return neighbours_within(self._blocks, self.k)

    def compare(self, pred: Sequence[Any], metrics: Sequence[str] = DISTRIBUTION_METRICS) -> dict[str, np.ndarray]:
        """Compute distribution metrics of all conditions.

        Parameters
        ----------
        pred
            One block of cells x features per condition, in the order of the real ones.
        metrics
            Which of :data:`DISTRIBUTION_METRICS`: ``mmd2`` (RBF, unbiased), ``mmd2_multi`` (mean over
            :data:`MULTI_SCALES`), ``energy_distance`` (unbiased), ``w1`` and ``w2`` (exact), ``frechet_distance`` (not
            rooted), and the neighbour metrics, at equal numbers of cells.

        Returns
        -------
        One array (conditions,) per metric, NaN where undefined, and the numbers of cells ``n_real`` and ``n_pred``,
        those that W1 and W2 took after the draw (``n_real_used``, ``n_pred_used``; the neighbour metrics take the
        lesser of both on each side), and ``n_shared``: of the predicted cells that the neighbour metrics took, those
        equal to a real one; NaN without neighbour metrics.

        Raises
        ------
        DataError
            If a metric is unknown, or conditions or features do not fit the real ones.
        """
        from threadpoolctl import threadpool_limits

        unknown = set(metrics) - set(DISTRIBUTION_METRICS)
        if unknown:
            raise DataError(f"unknown metrics {sorted(unknown)}; use some of {DISTRIBUTION_METRICS}")
        blocks = check_blocks(pred, "predicted condition")
        if len(blocks) != len(self._blocks):
            raise DataError(f"{len(self._blocks)} real and {len(blocks)} predicted conditions; give one block of each")
        check_blocks([*self._blocks[:1], *blocks[:1]])
        used = [subset(block, self.max_cells, self.seed, 1) for block in blocks]
        out: dict[str, np.ndarray] = {}
        # the products are small: threads would wait for each other
        with threadpool_limits(limits=1, user_api="blas"):
            if set(metrics) & set(KERNEL_METRICS):
                out |= self._kernels(blocks, MULTI_SCALES if "mmd2_multi" in metrics else (1.0,))
            if "frechet_distance" in metrics:
                out["frechet_distance"] = frechet_of(self._gaussians, gaussians(blocks))
            for name, p in (("w1", 1), ("w2", 2)):
                if name in metrics:
                    values = [wasserstein(a, b, p=p) for a, b in zip(self._blocks, used, strict=True)]
                    out[name] = np.array(values, dtype=np.float64)
            near = self._near(used) if set(metrics) & set(NEIGHBOUR_METRICS) else {}
        out |= near
        chosen = {name: out[name] for name in DISTRIBUTION_METRICS if name in metrics}
        return {
            **chosen,
            "n_real": self.n_cells.copy(),
            "n_pred": np.array([len(block) for block in blocks], dtype=np.int64),
            "n_real_used": np.array([len(block) for block in self._blocks], dtype=np.int64),
            "n_pred_used": np.array([len(block) for block in used], dtype=np.int64),
            "n_shared": near.get("n_shared", np.full(len(blocks), np.nan)),
        }

    def _kernels(self, pred: list[np.ndarray], scales: Sequence[float]) -> dict[str, np.ndarray]:
        blocks = [subset(block, self.max_cells_kernel, self.seed, 1) for block in pred]
        bandwidths = rbf_bandwidths(self.bandwidth, scales)
        known = [MULTI_SCALES.index(scale) for scale in scales]
        x = PairMeans(self._within.kernel[:, known], self._within.distance)
        y = within_means(blocks, bandwidths, distance=True)
        between = cross_means(self._kernel_blocks, blocks, bandwidths, distance=True)
        sizes = (np.array([len(block) for block in side]) for side in (self._kernel_blocks, blocks))
        by_scale = mmd2_of(x, y, between, *sizes)
        return {
            "mmd2": by_scale[:, list(scales).index(1.0)],
            "mmd2_multi": by_scale.mean(axis=1),
            "energy_distance": energy_of(x, y, between),
        }

    def _near(self, pred: list[np.ndarray]) -> dict[str, np.ndarray]:
        pairs = [equal_sizes(a, b, self.seed) for a, b in zip(self._blocks, pred, strict=True)]
        real = [a for a, _ in pairs]
        drawn = [i for i, a in enumerate(real) if a is not self._blocks[i]]
        known = self._neighbours
        again = neighbours_within([real[i] for i in drawn], self.k)
        nearest, radius = list(known.nearest), list(known.radius)
        for i, low, high in zip(drawn, again.nearest, again.radius, strict=True):
            nearest[i], radius[i] = low, high
        return neighbour_scores(real, [b for _, b in pairs], k=self.k, real_neighbours=Neighbours(nearest, radius))


def distribution_table(
    real: Sequence[Any] | DistributionReference,
    pred: Sequence[Any],
    *,
    metrics: Sequence[str] = DISTRIBUTION_METRICS,
    bandwidth: float | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Compute distribution metrics of many conditions; see :meth:`DistributionReference.compare`.

    Parameters
    ----------
    real
        One block of cells x features per condition, or the reference made of them, which serves many predictions.
    pred
        One block per condition, in the same order.
    metrics
        Which metrics.
    bandwidth, seed
        As in :class:`DistributionReference`; not with a reference that is given.

    Returns
    -------
    One array (conditions,) per metric, and numbers of cells.

    Raises
    ------
    DataError
        As in :meth:`DistributionReference.compare`, or if a bandwidth is given with a reference.

    Examples
    --------
    >>> table = metrics.distribution_table([x[:40], x[40:80]], [y[:40], y[40:80]], metrics=("energy_distance",))
    >>> table["energy_distance"].shape
    (2,)
    """
    if isinstance(real, DistributionReference):
        if bandwidth is not None:
            raise DataError("the reference has its bandwidth already; give the bandwidth where it is made")
        return real.compare(pred, metrics)
    return DistributionReference(real, bandwidth=bandwidth, seed=seed).compare(pred, metrics)

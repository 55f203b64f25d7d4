"""Write distribution.json: distribution metrics as other packages compute them.

Run with a Python that has cell-eval==0.8.2, scperteval==0.2.0, POT==0.9.7.post1, prdc==0.2, scipy==1.17.1 and
scikit-learn==1.9.1::

    python tests/metrics/goldens/make_distribution.py

Knows nothing of this package. The inputs are stored beside the values.
"""

import contextlib
import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("cell-eval", "scperteval", "POT", "prdc", "scipy", "scikit-learn", "numpy")
TARGET = Path(__file__).with_name("distribution.json")
SINKHORN_SHARE = 0.05


def cases() -> dict[str, dict[str, np.ndarray]]:
    """Make the inputs: principal components of equal and unequal numbers of cells, and counts."""
    rng = np.random.default_rng(20)
    out = {}
    for name, n, m, d, shift in (("equal", 30, 30, 4, 0.5), ("unequal", 18, 33, 6, 0.2), ("far", 20, 20, 3, 9.0)):
        scale = np.linspace(3.0, 0.5, d)
        out[name] = {
            "real": rng.normal(size=(n, d)) * scale,
            "pred": rng.normal(size=(m, d)) * scale + shift,
        }
    out["counts"] = {
        "real": rng.poisson(rng.gamma(0.7, 2.0, (12, 25))).astype(float),
        "pred": rng.poisson(rng.gamma(0.7, 1.5, (15, 25))).astype(float),
    }
    for block in out.values():
        for side in block:
            block[side] = np.round(block[side], 6)
    return out


def reference(real: np.ndarray, pred: np.ndarray) -> dict[str, Any]:
    """Compute the metrics of one pair of populations with the other packages."""
    import ot
    import prdc
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import cdist, pdist
    from scperteval.protocols import metrics
    from sklearn.metrics import r2_score

    with contextlib.redirect_stdout(io.StringIO()):
        neighbours = prdc.compute_prdc(real, pred, nearest_k=5)
    a, b = ot.unif(len(real)), ot.unif(len(pred))
    first, second = np.cov(real.T), np.cov(pred.T)
    gap = np.square(real.mean(axis=0) - pred.mean(axis=0)).sum()
    return {
        "mmd2_pooled_bandwidth": metrics.unbiased_mmd_median(real, pred, None),
        "energy_distance": 2 * cdist(real, pred).mean() - pdist(real).mean() - pdist(pred).mean(),
        "energy_distance_scperteval": metrics.energy_distance(real, pred, None),
        "w1": float(ot.emd2(a, b, cdist(real, pred))),
        "w2": float(np.sqrt(ot.emd2(a, b, cdist(real, pred, "sqeuclidean")))),
        "sinkhorn_w2": sinkhorn(real, pred),
        "sliced_w2": float(ot.sliced_wasserstein_distance(real, pred, n_projections=50, p=2, seed=3)),
        "frechet": float(gap + np.trace(first + second - 2.0 * np.real(sqrtm(first @ second)))),
        **{name: float(value) for name, value in neighbours.items()},
        "r2_mean": float(r2_score(real.mean(axis=0), pred.mean(axis=0))),
        "r2_variance": float(r2_score(real.var(axis=0, ddof=1), pred.var(axis=0, ddof=1))),
    }


def perturbations() -> dict[str, list[np.ndarray]]:
    """Make real and predicted cells of a control and four perturbations of growing strength."""
    rng = np.random.default_rng(21)
    strengths = {"real": (0.0, 0.5, 1.0, 2.0, 3.0), "pred": (0.1, 0.9, 0.7, 2.2, 2.5)}
    return {
        side: [np.round(rng.normal(shift, 1.0, (int(rng.integers(8, 20)), 5)), 6) for shift in shifts]
        for side, shifts in strengths.items()
    }


def edistance() -> float:
    """Correlate the energy distances to the control as cell-eval does, each side with its own control."""
    import anndata as ad
    from cell_eval._types import PerturbationAnndataPair
    from cell_eval.metrics._anndata import edistance as reference_edistance

    sides = {}
    for side, blocks in perturbations().items():
        labels = np.repeat(["control", "p1", "p2", "p3", "p4"], [len(block) for block in blocks])
        sides[side] = ad.AnnData(np.vstack(blocks), obs={"target": labels})
    data = PerturbationAnndataPair(real=sides["real"], pred=sides["pred"], pert_col="target", control_pert="control")
    return float(reference_edistance(data))


def sinkhorn(real: np.ndarray, pred: np.ndarray) -> float:
    """Debiased divergence from POT's logarithmic iterations, the entropy relative to the product of the marginals."""
    import ot
    from scipy.spatial.distance import cdist

    epsilon = SINKHORN_SHARE * np.median(cdist(real, pred, "sqeuclidean"))

    def regularised(x: np.ndarray, y: np.ndarray) -> float:
        cost, a, b = cdist(x, y, "sqeuclidean"), ot.unif(len(x)), ot.unif(len(y))
        plan = ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=100_000, stopThr=1e-8)
        density = plan / np.outer(a, b)
        entropy = np.sum(plan * np.log(np.where(density > 0, density, 1.0)))
        return float(np.sum(plan * cost) + epsilon * entropy)

    return float(np.sqrt(regularised(real, pred) - 0.5 * regularised(real, real) - 0.5 * regularised(pred, pred)))


def compositional(real: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    """Unbiased MMD2 of kernels written as in their definitions, gene by gene."""
    from scipy.spatial.distance import cdist

    def tanimoto(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / (x @ x + y @ y - x @ y))

    def ruzicka(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.minimum(x, y).sum() / np.maximum(x, y).sum())

    kernels = {
        "braycurtis": lambda x, y: 1.0 - cdist(x, y, "braycurtis"),
        "ruzicka": lambda x, y: cdist(x, y, ruzicka),
        "tanimoto": lambda x, y: cdist(x, y, tanimoto),
    }
    n, m = len(real), len(pred)
    out = {}
    for name, kernel in kernels.items():
        within = [
            (k.sum() - np.trace(k)) / (s * (s - 1)) for k, s in ((kernel(real, real), n), (kernel(pred, pred), m))
        ]
        out[f"mmd2_{name}"] = float(sum(within) - 2.0 * kernel(real, pred).mean())
    return out


def values() -> dict[str, dict[str, float]]:
    """Compute all reference values."""
    return {name: compositional(**block) if name == "counts" else reference(**block) for name, block in cases().items()}


def main() -> None:
    """Write the file."""
    inputs = {name: {side: block.tolist() for side, block in case.items()} for name, case in cases().items()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    blocks = {side: [block.tolist() for block in blocks] for side, blocks in perturbations().items()}
    panel = {"inputs": blocks, "pearson_edistance": edistance()}
    content = {"versions": versions, "inputs": inputs, "values": values(), "panel": panel}
    TARGET.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

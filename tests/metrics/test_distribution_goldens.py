"""Distribution metrics against scperteval, POT, prdc, scipy and scikit-learn: frozen, and live where installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scldm_cd4 import metrics

GOLDENS = Path(__file__).parent / "goldens"
FROZEN = json.loads((GOLDENS / "distribution.json").read_text())
CASES = ("equal", "unequal", "far")
# the Sinkhorn divergence stops at a marginal error; sqrtm works on an unsymmetric product; scperteval takes the root of
# rounding errors on the diagonal, so scipy's distances are the sharper test of the energy distance
TOLERANCE = {"sinkhorn_w2": 1e-5, "frechet": 1e-7, "energy_distance_scperteval": 1e-8, "energy_distance": 1e-12}


def ours(real: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    sigma = metrics.median_distance(np.vstack([real, pred]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # few cells for a covariance
        frechet = metrics.frechet_distance(real, pred)
    energy = metrics.energy_distance(real, pred)
    return {
        "mmd2_pooled_bandwidth": metrics.mmd2(real, pred, bandwidth=sigma),
        "energy_distance": energy,
        "energy_distance_scperteval": energy,
        "w1": metrics.wasserstein(real, pred, p=1),
        "w2": metrics.wasserstein(real, pred),
        "sinkhorn_w2": metrics.wasserstein(real, pred, method="sinkhorn"),
        "sliced_w2": metrics.wasserstein(real, pred, method="sliced", n_projections=50, seed=3),
        "frechet": frechet,
        **metrics.prdc(real, pred, equal_n=False),
        "r2_mean": metrics.r2_mean(real, pred),
        "r2_variance": metrics.r2_variance(real, pred),
    }


def check(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        limit = TOLERANCE.get(name, 1e-9)
        assert found[name] == pytest.approx(value, rel=limit, abs=limit), name


def arrays(case: str) -> dict[str, np.ndarray]:
    return {side: np.array(block) for side, block in FROZEN["inputs"][case].items()}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_references(case):
    check(ours(**arrays(case)), FROZEN["values"][case])


def test_compositional_kernels_equal_their_definitions():
    block, wanted = arrays("counts"), FROZEN["values"]["counts"]
    check({f"mmd2_{k}": metrics.mmd2(**block, kernel=k) for k in ("braycurtis", "ruzicka", "tanimoto")}, wanted)


def test_energy_correlation_equals_cell_eval():
    panel = FROZEN["panel"]
    (real_control, *real), (pred_control, *pred) = (
        [np.array(block) for block in panel["inputs"][side]] for side in ("real", "pred")
    )
    value = metrics.energy_correlation(real, pred, real_control, pred_control=pred_control, biased=True)
    assert value == pytest.approx(panel["pearson_edistance"], abs=1e-9)
    distances = metrics.control_distances(real, real_control)
    wanted = [metrics.energy_distance(block, real_control) for block in real]
    np.testing.assert_allclose(distances, wanted, rtol=1e-9)
    assert metrics.energy_correlation(real, real, real_control) == pytest.approx(1)
    assert np.isnan(metrics.energy_correlation(real[:1], pred[:1], real_control))


@pytest.mark.parametrize("case", CASES)
def test_table_equals_the_references(case):
    block, wanted = arrays(case), FROZEN["values"][case]
    sigma = metrics.median_distance(np.vstack(list(block.values())))
    table = metrics.distribution_table([block["real"]], [block["pred"]], bandwidth=sigma)
    names = {"mmd2": "mmd2_pooled_bandwidth", "frechet_distance": "frechet", "energy_distance": "energy_distance"}
    names |= {name: name for name in ("w1", "w2")}
    if case != "unequal":  # the table compares equal numbers
        names |= {name: name for name in ("precision", "recall", "density", "coverage")}
    for name, key in names.items():
        assert table[name][0] == pytest.approx(wanted[key], rel=1e-7 if key == "frechet" else 1e-9, abs=1e-9), name


@pytest.mark.slow
def test_references_live():
    for package in ("cell_eval", "scperteval", "prdc"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra test-ref)")
    spec = importlib.util.spec_from_file_location("make_distribution", GOLDENS / "make_distribution.py")
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    assert module.edistance() == pytest.approx(FROZEN["panel"]["pearson_edistance"], abs=1e-9)
    values = module.values()
    for case, block in module.cases().items():
        for side, cells in block.items():
            np.testing.assert_array_equal(cells, np.array(FROZEN["inputs"][case][side]))
        check(values[case], FROZEN["values"][case])
        if case != "counts":
            check(ours(**block), values[case])

"""Fixtures shared by all tests."""

import os
from pathlib import Path
from typing import Any

import pytest

# the networks of the tests are too small for several threads, which on a busy machine wait for each other; numba's are
# torch's as soon as scanpy starts them
for _threads in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference material beside the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference material is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def simulated() -> Any:
    """Small simulated cells, declared: 2 donors, 2 time points, 3 perturbations and the control."""
    from scldm_cd4 import CD4Model, datasets

    adata = datasets.synthetic_cd4(300, 50, n_perturbations=3, n_donors=2, n_timepoints=2, seed=0)
    CD4Model.setup_anndata(
        adata, perturbation_key="perturbation", donor_key="donor_id", timepoint_key="timepoint", control="NTC"
    )
    return adata


@pytest.fixture(scope="session")
def quick() -> dict[str, Any]:
    """Changes of the preset ``tiny`` that make a model which trains in a second."""
    stage = {"batch_size": 32, "target_steps": 30, "ema_decay": 0.9}
    return {
        "vae": {"width": 16, "n_tokens": 4, "n_channels": 4, "n_heads": 2, "n_cross_heads": 2},
        "flow": {"width": 32, "n_layers": 1, "n_heads": 2},
        "train_vae": stage,
        "train_flow": stage,
    }


@pytest.fixture(scope="session")
def trained(simulated: Any, quick: dict[str, Any]) -> Any:
    """A model trained for a few steps; tests must not change it."""
    import warnings

    from scldm_cd4 import CD4Model

    model = CD4Model(simulated, "tiny", **quick)
    first = next(level for level in model.perturbations if level != "NTC")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        hold_out = [{"perturbation": first, "donor_id": "CE0008162"}]
        model.train(seed=0, split={"conditions": hold_out})
    return model

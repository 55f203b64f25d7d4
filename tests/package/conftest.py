"""The names that examples of docstrings and pages share; ``docs/api/index.md`` lists them."""

import warnings
from pathlib import Path
from typing import Any

import pytest

HELD_OUT = [
    {"perturbation": "GATA3", "donor_id": "CE0008162"},
    {"perturbation": "IFNGR1", "donor_id": "CE0010866", "timepoint": "Rest"},
]
LABELS = ["donor_id", "timepoint", "perturbation"]


def _train(quick: dict[str, Any]) -> tuple[Any, Any]:
    from scldm_cd4 import CD4Model, datasets

    adata = datasets.synthetic_cd4(640, 60, n_perturbations=4, n_donors=2, n_timepoints=2, seed=0)
    CD4Model.setup_anndata(
        adata, perturbation_key="perturbation", donor_key="donor_id", timepoint_key="timepoint", control="NTC"
    )
    model = CD4Model(adata, "tiny", **quick)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        model.train(seed=0, split={"conditions": HELD_OUT, "test": 0.2})
    return adata, model


def _plain(adata: Any) -> Any:
    """Train a model of nothing but the released architecture, small and short."""
    from scldm_cd4 import CD4Model

    vae = {"n_tokens": 4, "n_channels": 4, "width": 16, "n_layers": 1, "n_heads": 2, "n_cross_heads": 2}
    model = CD4Model(adata, config="cd4", vae=vae, flow={"width": 32, "n_layers": 1, "n_heads": 2})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        model.train(max_epochs=1, batch_size=128, seed=0)
    return model


def _numbers(real: Any, cells: Any, train: Any) -> dict[str, Any]:
    """Return what the metrics are made of."""
    import numpy as np

    from scldm_cd4 import metrics

    values = metrics.log_normalize(real)
    codes, keys = metrics.condition_codes(real.obs[LABELS])
    controls = metrics.control_ranks(values, codes, keys, control="NTC")
    guess_values = metrics.log_normalize(cells)
    guess_codes, guess_keys = metrics.condition_codes(cells.obs[LABELS])
    projection = metrics.fit_projection(metrics.log_normalize(train), n_components=5)
    rng = np.random.default_rng(0)
    truth = np.arange(20.0)
    return {
        "values": values,
        "codes": codes,
        "keys": keys,
        "controls": controls,
        "bulks": metrics.pseudobulks(values, codes, keys, counts=real.X),
        "guess_bulks": metrics.pseudobulks(guess_values, guess_codes, guess_keys, counts=cells.X),
        "tests": metrics.de_tests(values, codes, keys, controls, control="NTC"),
        "guess_tests": metrics.de_tests(guess_values, guess_codes, guess_keys, controls, control="NTC"),
        "x": projection.apply(values),
        "y": projection.apply(guess_values),
        "z": projection.apply(metrics.log_normalize(train)),
        "truth": truth,
        "guess": truth + rng.normal(0, 4, 20),
    }


@pytest.fixture(scope="session")
def names(quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Cells, a trained model and what is made of them, by the names that examples use."""
    import numpy as np
    import pandas as pd

    import scldm_cd4
    from scldm_cd4 import CD4Model, config, datasets, metrics, pl, pp, ranking, settings

    adata, model = _train(quick)
    train, held = adata[model.train_indices].copy(), adata[model.test_indices].copy()
    conditions = held.obs[LABELS].drop_duplicates().sort_values(LABELS)
    cells = model.generate(conditions=conditions.assign(n_cells=20), seed=0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few cells
        table = metrics.evaluate(held, cells, train=train, profile="minimal", min_cells=5, allow_missing=True)
        signature = datasets.true_log2fc(adata, "GATA3")
        ranked = model.rank_perturbations(signature, n_cells=20, seed=0)
    return {
        "np": np, "pd": pd, "scldm_cd4": scldm_cd4, "CD4Model": CD4Model, "config": config, "datasets": datasets,
        "metrics": metrics, "pl": pl, "pp": pp, "ranking": ranking, "settings": settings,
        "adata": adata, "model": model, "plain": _plain(adata), "train": train, "real": held, "cells": cells,
        "conditions": conditions,
        "saved": str(folder), "table": table, "ranked": ranked, "signature": signature,
        **_numbers(held, cells, train),
    }  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that examples write to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

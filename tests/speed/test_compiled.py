"""Compiled generation: the same cells to rounding, one shape, and what happens without a compiler."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from scldm_cd4 import CD4Model, DataError, sampling, settings
from scldm_cd4._compile import compiler_error

ASKED: dict[str, Any] = {"perturbation": ["GATA3", "NTC"], "n_cells": 70, "seed": 0, "output": "latent"}


@pytest.fixture
def asked(trained: CD4Model) -> dict[str, Any]:
    return ASKED | {"perturbation": list(trained.perturbations[:2])}


def test_a_compiled_network_sees_passes_of_one_shape(
    trained: CD4Model, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()

    def fake(function: Any, *, dynamic: bool) -> Any:
        def call(*args: torch.Tensor) -> Any:
            shapes.add(tuple(a.shape for a in args))
            return function(*args)

        assert not dynamic
        return call

    plain = trained.generate(**asked)
    monkeypatch.setattr(sampling, "compiler_error", lambda device: None)
    monkeypatch.setattr(torch, "compile", fake)
    with settings.override(compile=True):
        cells = trained.generate(**asked, guidance=2.0)
        assert len(shapes) == 1  # both halves of the guidance in one pass
        same = trained.generate(**asked)
        assert len(shapes) == 2
        trained.rank_perturbations(pd.Series(range(10), index=trained.registry["genes"][:10]), n_cells=20, seed=0)
        assert len(shapes) == 2  # the same pass
    assert cells.uns["scldm_cd4"]["compiled"]
    assert not plain.uns["scldm_cd4"]["compiled"]
    np.testing.assert_array_equal(np.asarray(same.X), np.asarray(plain.X))


def test_without_a_compiler_cells_are_made_and_a_warning_says_so(
    trained: CD4Model, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "compiler_error", lambda device: "no C++ compiler")
    plain = trained.generate(**asked)
    with settings.override(compile=True), pytest.warns(UserWarning, match=r"without: no C\+\+ compiler"):
        cells = trained.generate(**asked)
    np.testing.assert_array_equal(np.asarray(cells.X), np.asarray(plain.X))
    assert not cells.uns["scldm_cd4"]["compiled"]
    with pytest.raises(DataError, match="'compile' takes bool"):
        settings.compile = 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself, about its own code
def test_compiled_cells_are_the_same_to_rounding(trained: CD4Model, asked: dict[str, Any]) -> None:
    if (error := compiler_error("cpu")) is not None:
        pytest.skip(f"torch.compile cannot work here: {error}")
    plain = np.asarray(trained.generate(**asked).X)
    with settings.override(compile=True):
        cells = trained.generate(**asked)
        first = trained.generate(**{**asked, "n_cells": 5})
    assert cells.uns["scldm_cd4"]["compiled"]
    np.testing.assert_allclose(np.asarray(cells.X), plain, atol=1e-5 * np.abs(plain).max())
    np.testing.assert_array_equal(np.asarray(first.X), np.asarray(cells[first.obs_names].X))

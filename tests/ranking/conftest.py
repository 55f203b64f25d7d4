"""A model of four donors, and a source of effects with known truth."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from scldm_cd4.noise import stream
from scldm_cd4.ranking.effects import Change, Context, Control, Side, Summariser, leave_one_out, n_folds


@pytest.fixture(scope="session")
def four_donors() -> Any:
    """Simulated cells of four donors, two time points and eight perturbations, with a held-out condition of each."""
    from scldm_cd4 import CD4Model, datasets

    adata = datasets.synthetic_cd4(2400, 80, n_perturbations=8, n_donors=4, n_timepoints=2, seed=0)
    CD4Model.setup_anndata(
        adata, perturbation_key="perturbation", donor_key="donor_id", timepoint_key="timepoint", control="NTC"
    )
    return adata


@pytest.fixture(scope="session")
def ranked(four_donors: Any, quick: dict[str, Any]) -> Any:
    """A model of them, trained for a few steps; tests must not change it."""
    from scldm_cd4 import CD4Model

    short = {name: quick[name] | {"target_steps": 10} for name in ("train_vae", "train_flow")}
    model = CD4Model(four_donors, "tiny", **(quick | short))
    names = [level for level in model.perturbations if level != "NTC"]
    donors = model.donors
    hold_out = [
        {"perturbation": name, "donor_id": donors[i % 4], "timepoint": time}
        for i, name in enumerate(names)
        for time in ("Rest", "Stim8hr")
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        model.train(seed=0, split={"conditions": hold_out})
    return model


@dataclass
class Simulator:
    """Effects along one direction of Gaussian log expression, drawn as counts are too slow for many candidates."""

    truth: dict[str, float]
    direction: np.ndarray
    noise: float = 1.0
    name: str = "simulated"
    drawn: int = field(default=0)
    """Perturbed cells that were asked for."""

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        rng = stream(0, ("control",), n_cells, "simulator")
        counts = rng.poisson(50.0, size=(2 * n_cells, len(self.direction)))
        from scipy import sparse

        control = Summariser().control(sparse.csr_matrix(counts), 2 * n_folds(n_cells))
        return dict.fromkeys(contexts, control)

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        folds = n_folds(n_cells)
        rows = leave_one_out(folds)
        for name in names:
            out = {}
            for context, control in controls.items():
                rng = stream(0, (name, *context), n_cells, "simulator")
                error = rng.normal(size=(folds, len(self.direction))) * self.noise * np.sqrt(folds / n_cells)
                delta = self.truth[name] * self.direction + rows @ error / rows.sum(axis=1, keepdims=True)
                side = Side.of(np.hstack([rows, np.zeros_like(rows)]), control.arm)
                out[context] = Change(delta, side.distances[:, :, None].repeat(2, 2), 2 / n_cells, n_cells)
                self.drawn += n_cells
            yield out


@pytest.fixture
def simulator() -> type[Simulator]:
    """The class of sources with known truth."""
    return Simulator

"""What the tutorials share: simulated cells, and one model trained on them.

The first tutorial that runs trains the model, about a minute on one core; the others load it
from the folder ``.model`` beside this file. Delete that folder to train again.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4 import CD4Model, datasets

FOLDER = Path(__file__).resolve().parent / ".model"
KEYS = {
    "perturbation_key": "perturbation",
    "donor_key": "donor_id",
    "timepoint_key": "timepoint",
    "control": "NTC",
}
HELD_OUT = [
    (perturbation, donor, timepoint)
    for perturbation, first, second in (
        ("GATA3", "CE0008162", "CE0010866"),
        ("IFNGR1", "CE0008162", "CE0008678"),
        ("STAT6", "CE0010866", "CE0008678"),
        ("STAT1", "CE0008678", "CE0008162"),
        ("IL4R", "CE0010866", "CE0008162"),
        ("JAK2", "CE0008678", "CE0010866"),
    )
    for donor, timepoint in ((first, "Stim8hr"), (second, "Stim48hr"))
]
"""Conditions that the model never saw; perturbation and context were seen, but not together."""


def simulated_cells() -> Any:
    """Draw counts of 3 donors, 2 time points and 12 knock-downs, with a column ``split``."""
    adata = datasets.synthetic_cd4(4500, 200, n_donors=3, seed=0)
    adata = adata[adata.obs["timepoint"] != "Rest"].copy()
    adata.obs["timepoint"] = adata.obs["timepoint"].cat.remove_unused_categories()
    condition = list(
        zip(
            adata.obs["perturbation"],
            adata.obs["donor_id"],
            adata.obs["timepoint"],
            strict=True,
        )
    )
    split = np.random.default_rng(0).choice(
        ["train", "validation", "test"], adata.n_obs, p=[0.75, 0.1, 0.15]
    )
    split[[c in HELD_OUT for c in condition]] = "test"
    adata.obs["split"] = split
    return adata


def trained_model(adata: Any) -> Any:
    """Return the model of the tutorials, trained now if it has not been."""
    CD4Model.setup_anndata(adata, **KEYS)
    if not FOLDER.exists():
        model = CD4Model(adata, config="tiny")
        model.train(split="split", max_epochs={"vae": 10, "flow": 25}, seed=0)
        model.save(FOLDER)
    return CD4Model.load(FOLDER, adata)

"""Write the tiny saved model of a release, which the tests then load for ever. Run it once at each release.

python tests/checkpoint/make_saved.py: writes tests/checkpoint/saved/<version>/, and refuses to replace one.
"""

import json
import warnings
from pathlib import Path

import numpy as np

from scldm_cd4 import CD4Model, __version__, datasets

SAVED = Path(__file__).parent / "saved"
REQUEST = {"perturbation": ["IFNGR1", "NTC"], "n_cells": 2, "seed": 7}
STAGE = {"batch_size": 32, "target_steps": 40, "ema_decay": 0.9}
SIZES = {
    "vae": {"width": 8, "n_tokens": 2, "n_channels": 4, "n_heads": 2, "n_cross_heads": 1, "linear_rank": 4},
    "flow": {"width": 8, "n_layers": 1, "n_heads": 2},
}


def main() -> None:
    """Train, save, and record what the model gives."""
    folder = SAVED / __version__
    adata = datasets.synthetic_cd4(240, 24, n_perturbations=2, n_donors=2, n_timepoints=2, seed=0)
    names = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint"}
    CD4Model.setup_anndata(adata, **names, control="NTC")
    model = CD4Model(adata, "tiny", **SIZES, train_vae=STAGE, train_flow=STAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(seed=0, accelerator="cpu")
    model.save(folder / "model")
    mean = model.generate(**REQUEST, output="mean")
    values = {"mean": np.asarray(mean.X).round(5).tolist(), "obs_names": mean.obs_names.tolist()}
    (folder / "expected.json").write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()

"""scVI on the same cells and one thread: training and sampling cells per CPU second, to set beside `sampling whole`.

    OMP_NUM_THREADS=1 python -m benchmarks scvi_tools --data cells.h5ad --batch-key replicate

Needs scvi-tools, best in an environment of its own.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Train and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch-key")
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    import anndata as ad
    import scvi
    import torch

    torch.set_num_threads(1)
    cells = ad.read_h5ad(options.data)[: options.cells].copy()
    scvi.model.SCVI.setup_anndata(cells, batch_key=options.batch_key)
    model = scvi.model.SCVI(cells, n_layers=2, n_hidden=128, gene_likelihood="nb")
    how: dict[str, Any] = {"batch_size": 256, "train_size": 1.0, "accelerator": "cpu", "logger": False}
    model.train(max_epochs=1, enable_progress_bar=False, **how)
    start = time.process_time()
    model.train(max_epochs=options.epochs, enable_progress_bar=False, **how)
    trained = time.process_time()
    model.posterior_predictive_sample(n_samples=1, batch_size=256)
    sampled = time.process_time()
    row = {
        "scvi": scvi.__version__,
        "cells": cells.n_obs,
        "genes": cells.n_vars,
        "train_cells_per_cpu_second": round(options.epochs * cells.n_obs / (trained - start)),
        "sample_cells_per_cpu_second": round(cells.n_obs / (sampled - trained)),
        "load": [round(x, 1) for x in os.getloadavg()],
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()

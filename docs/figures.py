"""Make the figure of the README and the front page: ``python docs/figures.py`` (SIMULATED cells, some minutes)."""

import sys
from pathlib import Path

from scldm_cd4 import pl

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tutorials"))
from _shared import simulated_cells, trained_model  # noqa: E402 - found by the line above

OUT = HERE / "_static" / "real_vs_generated_SIMULATED.png"
LABELS = ["perturbation", "donor_id", "timepoint"]


def main() -> None:
    """Draw held-out and generated cells of a few knock-downs in a UMAP that training cells have shaped."""
    adata = simulated_cells()
    model = trained_model(adata)
    held, train = (adata[adata.obs["split"] == part] for part in ("test", "train"))
    wanted = held.obs.groupby(LABELS, observed=True).size().rename("n_cells").reset_index()
    cells = model.generate(conditions=wanted, seed=0)
    pl.overlay(held, cells, reference=train, title="SIMULATED cells: held out from training, and generated").savefig(
        OUT, dpi=60
    )


if __name__ == "__main__":
    main()

"""Make the figure of the README and the front page: ``python docs/figures.py`` (SIMULATED cells, some minutes)."""

import sys
from pathlib import Path

from scldm_cd4 import metrics, pl

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tutorials"))
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
    projection = metrics.fit_projection(metrics.log_normalize(train), n_components=20)
    planes = [projection.apply(metrics.log_normalize(x)) for x in (train, held, cells)]
    real, generated = pl.embed_like(*planes, seed=0)
    figure = pl.real_vs_generated(
        real,
        generated,
        held.obs["timepoint"],
        cells.obs["timepoint"],
        named=["Stim8hr", "Stim48hr"],
        group_title="time point",
        title="SIMULATED cells: held out from training, and generated",
    )
    figure.savefig(OUT, dpi=80)


if __name__ == "__main__":
    main()

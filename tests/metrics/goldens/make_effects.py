"""Write effects.json: what cell-eval 0.8.2, cell-eval2 0.20.0, pdex, illico and scperteval make of the same cells.

Run in an environment with the extra ``test-ref``: ``python tests/metrics/goldens/make_effects.py``. The prediction is
scored against its own control cells by cell-eval, and against the real ones by cell-eval2.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from effects_cells import CONTROL, GENES, effect_cells

PACKAGES = ("cell-eval", "cell-eval2", "pdex", "illico", "scperteval", "numpy", "scipy")


def _adata(side: str, *, log: bool) -> ad.AnnData:
    counts, labels = effect_cells(side)
    values = np.log1p(counts * 1e4 / counts.sum(axis=1, keepdims=True)) if log else counts
    obs = pd.DataFrame({"target": labels}, index=[f"{side}{i}" for i in range(len(labels))])
    return ad.AnnData(values, obs=obs, var=pd.DataFrame(index=GENES))


def _columns(table: Any) -> dict[str, dict[str, float]]:
    frame = table.to_pandas()
    if "metric" in frame.columns:
        frame = frame.pivot(index="perturbation", columns="metric", values="value").reset_index()
    frame = frame.set_index("perturbation")
    return {name: {key: float(value) for key, value in frame[name].items()} for name in frame.columns}


def cell_eval_v1() -> dict[str, dict[str, float]]:
    """Metrics of cell-eval, on log-normalised values, control of each side's own."""
    from cell_eval import MetricsEvaluator

    with tempfile.TemporaryDirectory() as folder:
        evaluator = MetricsEvaluator(
            adata_pred=_adata("pred", log=True),
            adata_real=_adata("real", log=True),
            control_pert=CONTROL,
            pert_col="target",
            num_threads=1,
            outdir=folder,
        )
        results, _ = evaluator.compute(profile="full", write_csv=False, skip_metrics=["clustering_agreement"])
    return _columns(results)


def cell_eval_v2(side: str) -> dict[str, dict[str, float]]:
    """Metrics of cell-eval2 by its preset of 2026, on counts, real control on both sides."""
    from cell_eval2 import compute_metrics
    from cell_eval2.config import EvalConfig

    config = EvalConfig.from_preset("vcc2026")
    table = compute_metrics(
        _adata(side, log=False), _adata("real", log=False), config=config, device="cpu", cache_strict=False
    )
    return _columns(table)


def p_values() -> dict[str, Any]:
    """P values of pdex and illico for the real cells of the first perturbation."""
    from illico import asymptotic_wilcoxon
    from pdex import pdex

    real = _adata("real", log=True)
    frame = pdex(adata=real, groupby="target", mode="ref", reference=CONTROL, is_log1p=True).to_pandas()
    frame = frame[frame["target"] == GENES[0]].set_index("feature").loc[GENES]
    table = asymptotic_wilcoxon(real, group_keys="target", reference=CONTROL, is_log1p=True, n_threads=1)
    return {"pdex": frame["p_value"].tolist(), "illico": table.loc[GENES[0]].loc[GENES, "p_value"].tolist()}


def weighted() -> dict[str, float]:
    """Weighted error of scperteval for the first perturbation, from Welch's t against all other perturbed cells."""
    from scipy.stats import ttest_ind
    from scperteval.blocks.de import mejia_weights
    from sklearn.metrics import r2_score

    real, pred = _adata("real", log=True), _adata("pred", log=True)
    own, other = (real.obs["target"] == GENES[0]), ~real.obs["target"].isin([GENES[0], CONTROL])
    t = ttest_ind(real.X[own], real.X[other], equal_var=False).statistic
    weights = mejia_weights(t, exp=2.0)
    control = real.X[real.obs["target"] == CONTROL].mean(axis=0)
    x, y = real.X[own].mean(axis=0) - control, pred.X[pred.obs["target"] == GENES[0]].mean(axis=0) - control
    return {"wmse": float((weights * (x - y) ** 2).sum()), "wr2": float(r2_score(x, y, sample_weight=weights))}


def main() -> None:
    """Write the file."""
    goldens = {
        "versions": {name: version(name) for name in PACKAGES},
        "cell_eval": cell_eval_v1(),
        "cell_eval2": cell_eval_v2("pred"),
        "cell_eval2_flat": cell_eval_v2("flat"),
        "p_values": p_values(),
        "scperteval": weighted(),
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("effects.json")
    path.write_text(json.dumps(goldens, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

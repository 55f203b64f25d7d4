"""Plots; nothing is shown by itself outside a notebook, and matplotlib and umap are imported where used.

A plot of one panel returns its Axes and takes ``ax=``, one of several panels returns the Figure; all take ``save=``.
"""

from scldm_cd4.pl._effects import de_volcano, delta_scatter
from scldm_cd4.pl._embedding import embed_like, embedding, real_vs_generated
from scldm_cd4.pl._overlay import overlay
from scldm_cd4.pl._ranking import candidate_card, ranking_heatmap, waterfall
from scldm_cd4.pl._scores import metric_bars, qc
from scldm_cd4.pl._training import training_history

__all__ = [
    "candidate_card",
    "de_volcano",
    "delta_scatter",
    "embed_like",
    "embedding",
    "metric_bars",
    "overlay",
    "qc",
    "ranking_heatmap",
    "real_vs_generated",
    "training_history",
    "waterfall",
]

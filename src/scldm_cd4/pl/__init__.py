"""Plots; every function returns what it drew and shows nothing. matplotlib and umap are imported where used."""

from scldm_cd4.pl._embedding import embed_like, embedding, real_vs_generated
from scldm_cd4.pl._ranking import candidate_card, ranking_heatmap, waterfall

__all__ = ["candidate_card", "embed_like", "embedding", "ranking_heatmap", "real_vs_generated", "waterfall"]

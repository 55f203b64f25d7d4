"""Plots; every function returns what it drew and shows nothing. matplotlib and umap are imported where used."""

from scldm_cd4.pl._embedding import embed_like, embedding, real_vs_generated

__all__ = ["embed_like", "embedding", "real_vs_generated"]

"""What a scanpy pipeline needs around a model, and scanpy does not have; scanpy itself is imported where used."""

from scldm_cd4.pp._concat import concat_generated
from scldm_cd4.pp._panel import select_panel
from scldm_cd4.pp._perturb_seq import read_perturb_seq
from scldm_cd4.pp._query import QueryReport, prepare_query_anndata

__all__ = ["QueryReport", "concat_generated", "prepare_query_anndata", "read_perturb_seq", "select_panel"]

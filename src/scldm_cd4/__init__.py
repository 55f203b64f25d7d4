"""Generate and rank CD4+ T cell perturbation responses with a latent flow-matching transformer."""

__version__ = "0.1.0"

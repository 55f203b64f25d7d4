"""Saved models: this package's folder format, and the weights of the reference implementation."""

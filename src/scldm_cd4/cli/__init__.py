"""The command line."""

from scldm_cd4.cli._main import main

__all__ = ["main"]

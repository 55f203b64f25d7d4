"""Random numbers of training: each draw is keyed by what it is for, and the global generators stay untouched."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key_seed(seed: int, *keys: int) -> int:
    """Return a 63-bit seed from a seed and non-negative keys, such as epoch and batch."""
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keyed_generator(seed: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator that depends on seed and keys alone: a resume then needs no stored state."""
    return torch.Generator(device=device).manual_seed(key_seed(seed, *keys))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generator of torch inside the block and put all global generators back after it.

    For code that cannot take a generator: the initialisation of networks, dropout layers, Lightning.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(key_seed(seed))
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002

"""Memory that a training keeps from step to step.

The tensors of a step are freed at its end. The C library then gives the memory back to the system and asks for it again
in the next step, and the system clears every page of it: a fifth of the time of a small step on a CPU.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h: free memory that is given back; size of blocks that come from the system each time."""
KEPT = 2**31 - 1
MMAP_MAX = 32 * 2**20
"""What glibc's thresholds rise to by themselves in a process that frees large blocks; twice that for the first."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process inside the block, and give it back at its end.

    Afterwards glibc's thresholds are those that it rises to by itself. Nothing is done with other C libraries, or where
    the environment sets thresholds (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, KEPT)
    if not libc.mallopt(M_MMAP_THRESHOLD, KEPT):  # releases before 2.35 take no more than this
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_MAX)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MMAP_MAX)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_MAX)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library where it is glibc and the user has not set it up."""
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    if "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018 musl has none of them
    except (OSError, AttributeError):
        return None
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc

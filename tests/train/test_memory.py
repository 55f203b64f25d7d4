"""Memory that training keeps from step to step."""

import subprocess
import sys

import pytest

from scldm_cd4.train import memory
from scldm_cd4.train.memory import MMAP_MAX, kept_memory

FAULTS = """
import resource, sys
import numpy as np
from scldm_cd4.train.memory import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        parts = [np.ones(2**20, np.float32) for _ in range(20)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
outside = faults()
with kept_memory():
    faults()
    inside = faults()
    held = int(open("/proc/self/statm").read().split()[1])
after = int(open("/proc/self/statm").read().split()[1])
print(outside, inside, held - after)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or memory._glibc() is None, reason="needs glibc")
def test_pages_are_cleared_once_and_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    outside, inside, given_back = map(int, done.stdout.split())
    assert inside < outside / 10
    assert given_back * 4096 > 40 * 2**20


class Libc:
    """Takes note of the thresholds."""

    def __init__(self, largest: int) -> None:
        self.largest, self.calls = largest, []

    def mallopt(self, name: int, value: int) -> int:
        self.calls.append((name, value))
        return int(value <= self.largest or name == memory.M_TRIM_THRESHOLD)

    def malloc_trim(self, pad: int) -> None:
        self.calls.append(("trim", pad))


@pytest.mark.parametrize("largest", [MMAP_MAX, 2**31])
def test_thresholds_end_where_glibc_would_raise_them_also_after_an_error(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc(largest)
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    inside = {}

    def fail() -> None:
        with kept_memory():
            inside.update(libc.calls)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == {memory.M_TRIM_THRESHOLD: 2**31 - 1, memory.M_MMAP_THRESHOLD: min(largest, 2**31 - 1)}
    assert dict(libc.calls) == {memory.M_TRIM_THRESHOLD: 2 * MMAP_MAX, memory.M_MMAP_THRESHOLD: MMAP_MAX, "trim": 0}


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_what_the_user_has_set_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert memory._glibc() is None
    with kept_memory():
        pass

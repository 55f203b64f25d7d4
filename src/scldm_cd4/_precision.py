"""Which arithmetic the networks use on a device, and the context in which it holds.

`torch.set_float32_matmul_precision` is one setting for the whole process. It is changed only while a network computes,
counted over threads, and put back when the last one is done.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch

from scldm_cd4._errors import DataError

Kind = Literal["fp32", "tf32", "bf16"]
KINDS: dict[str, Kind] = {
    "fp32": "fp32",
    "32": "fp32",
    "32-true": "fp32",
    "tf32": "tf32",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
}
"""What a user may ask for beside ``auto``, under our names and those of Lightning."""
ONEDNN_ERROR = 2e-6
"""Relative error of a matrix product up to which the oneDNN route counts as single precision."""


@dataclass(frozen=True)
class Precision:
    """The arithmetic of network passes on one kind of device."""

    kind: Kind
    device: str
    matmul: str
    """Setting of `torch.set_float32_matmul_precision`."""

    @property
    def name(self) -> str:
        """What was chosen: ``fp32``, ``fp32-onednn``, ``tf32`` or ``bf16``."""
        return "fp32-onednn" if self.device == "cpu" and self.matmul == "medium" else self.kind

    @contextmanager
    def matmuls(self) -> Iterator[None]:
        """Compute the fp32 matrix products of this process in the chosen way; for training, where Lightning casts."""
        _enter(self.matmul)
        try:
            yield
        finally:
            _leave()

    @contextmanager
    def context(self) -> Iterator[None]:
        """Compute the networks of this thread in the chosen way: `matmuls`, and autocast for bf16."""
        cast: Any = torch.autocast(self.device, dtype=torch.bfloat16) if self.kind == "bf16" else nullcontext()
        with self.matmuls(), cast:
            yield


def choose(precision: Any, device: torch.device) -> Precision:
    """Return the arithmetic meant by a user's word on a device.

    Parameters
    ----------
    precision
        ``auto`` is bf16 on a CUDA device that has it, else fp32. ``fp32`` on a CPU takes oneDNN in place of MKL where
        that is faster and as exact. ``tf32`` rounds the factors of fp32 products to 10 bits, on CUDA only. ``bf16``
        computes most products in bf16; the state of the flow, norms, the softmax over genes and likelihoods stay fp32.

    Raises
    ------
    DataError
        The word is unknown, or the device cannot do it.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if str(precision) not in KINDS:
        raise DataError(f"precision must be 'auto', 'fp32', 'tf32' or 'bf16', got {precision!r}")
    kind = KINDS[str(precision)]
    if kind == "tf32" and device.type != "cuda":
        raise DataError(f"precision='tf32' needs a CUDA device, the model is on {device.type!r}; use 'fp32'")
    if device.type == "cpu" and kind == "fp32":
        return Precision(kind, "cpu", "medium" if onednn_route() else "highest")
    return Precision(kind, device.type, "high" if kind == "tf32" else "highest")


@cache
def onednn_route() -> bool:
    """Return whether fp32 products go through oneDNN on this CPU.

    With ``medium``, torch hands fp32 products to oneDNN, with leave to round to bf16. On AMD's AVX-512 CPUs it does not
    round and was 1.9 times as fast as MKL; on Intel's it was 0.9 times as fast (docs/performance.md). The maker
    decides, not a timing, which could come out differently from run to run and change the last bits of all cells. The
    error is looked at once, because CPUs with bf16 matrix units do round.
    """
    if _cpu_maker() != "AuthenticAMD" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    with Precision("fp32", "cpu", "medium").matmuls():
        return matmul_error() <= ONEDNN_ERROR


def matmul_error() -> float:
    """Return the relative error (RMS) of fp32 matrix products as torch is set now."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    return float(((a @ b.T).double() - exact).norm() / exact.norm())


def _cpu_maker() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()  # Windows: "... AuthenticAMD"
    return next((maker for maker in ("AuthenticAMD", "GenuineIntel") if maker in text), "")


_lock = Lock()
_inside: list[str] = []
_before: str | None = None


def _enter(setting: str) -> None:
    """Set the matrix products of the process; what is inside already stands until all have left."""
    global _before
    with _lock:
        if not _inside:
            try:
                _before = torch.get_float32_matmul_precision()
            except (
                RuntimeError
            ):  # set for each backend by the user, which torch does not let us read as one: theirs stands
                _before = None
            else:
                torch.set_float32_matmul_precision(setting)
        _inside.append(setting)


def _leave() -> None:
    with _lock:
        _inside.pop()
        if not _inside and _before is not None:
            torch.set_float32_matmul_precision(_before)

"""Arrays through a network in passes of a constant number of rows, on any device."""

import warnings
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scldm_cd4._errors import DataError
from scldm_cd4._precision import Precision

ALIGN = 8
"""Rows of a pass are a multiple of this. Rows of one pass came out equal to the bit wherever they stood, with MKL and
oneDNN at widths 64 to 512; passes of another number of rows differ in the last bits."""
CPU_TOKENS = 1024
"""Latent tokens of a pass on a CPU: more are hardly faster, and a few cells would wait for many padding rows."""


def pass_rows(n_tokens: int, device: torch.device, batch_size: int) -> int:
    """Return the cells of a network pass, fixed by the model's latent tokens, the device and the batch size."""
    if device.type != "cpu":
        return batch_size
    return min(batch_size, max(ALIGN, CPU_TOKENS // n_tokens // ALIGN * ALIGN))


def chunks(n: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Positions 0 to n - 1, `size` at a time."""
    for start in range(0, n, size):
        yield np.arange(start, min(n, start + size))


class Passes:
    """Computes rows in passes of constant shape; where the memory of a device does not hold one, in smaller ones.

    Parameters
    ----------
    rows
        Rows of a pass, a multiple of `ALIGN`.
    device, precision
        Where and in which arithmetic.
    """

    def __init__(self, rows: int, device: torch.device, precision: Precision) -> None:
        self.rows, self.device, self.precision = rows, device, precision
        self._lock = Lock()

    @torch.inference_mode()
    def __call__(
        self, compute: Callable[..., torch.Tensor], *inputs: NDArray[Any], at_most: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """Yield what `compute` gives for inputs (n, ...), pass by pass; the last is padded with its first row.

        Parameters
        ----------
        compute
            Takes a tensor (rows, ...) for each input, and gives one.
        inputs
            Arrays of equal length.
        at_most
            Rows of a pass, where fewer are better than `rows`.

        Raises
        ------
        DataError
            The device has no memory for `ALIGN` rows.
        """
        n, done = len(inputs[0]), 0
        while done < n:
            rows = min(self.rows, at_most or self.rows)
            index = np.arange(done, done + rows)
            index[index >= n] = done
            try:
                with self.precision.context():
                    out = compute(*(torch.from_numpy(values[index]).to(self.device) for values in inputs))
                    part = out[: n - done].float().cpu().numpy()
            except torch.cuda.OutOfMemoryError:
                self._halve(rows)
                continue
            yield part
            done += rows

    def _halve(self, rows: int) -> None:
        """Go on with half the rows, after a pass of `rows` did not fit the memory of the device."""
        with self._lock:
            if self.rows < rows:  # another thread was first
                return
            if rows <= ALIGN:
                raise DataError(f"{self.device} has no memory for {rows} cells at once: use device='cpu'")
            self.rows = ALIGN * max(1, rows // (2 * ALIGN))
            torch.cuda.empty_cache()
            warnings.warn(
                f"{self.device} has no memory for {rows} cells at once: going on with {self.rows}. Pass "
                f"batch_size={self.rows} to begin with that",
                UserWarning,
                stacklevel=2,
            )

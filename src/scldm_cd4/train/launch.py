"""The processes of a training: how many there are, and how they wait for each other."""

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist

from scldm_cd4._errors import DataError


def processes() -> tuple[int, int]:
    """Return number of this process and how many there are, from RANK and WORLD_SIZE, as torchrun sets them.

    Raises
    ------
    DataError
        There are several, and no number.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and "RANK" not in os.environ:
        raise DataError(f"WORLD_SIZE is {world} but RANK is not set: start the processes with torchrun or srun")
    return int(os.environ.get("RANK", 0)) if world > 1 else 0, world


def require_launcher(devices: Any) -> None:
    """Refuse several devices in one process.

    Raises
    ------
    DataError
        Says how to start one process for each device.
    """
    n = len(devices) if isinstance(devices, list | tuple) else devices
    if not isinstance(n, int):
        return
    if processes()[1] == 1 and (n > 1 or n == -1):
        raise DataError(
            f"devices={devices!r}: each device needs a process of its own, and this is one process, as a notebook is. "
            "Write the training into a script and start it with torchrun --nproc-per-node N script.py, without devices="
        )


def idle_devices() -> str | None:
    """Return a sentence where one process has several GPUs, of which it uses one."""
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes()[1] > 1 or n < 2:
        return None
    return f"one of {n} GPUs is used; torchrun --nproc-per-node {n} script.py uses all"


def connect(accelerator: str) -> None:
    """Join the processes; Lightning takes the group that it finds."""
    if processes()[1] > 1 and not dist.is_initialized():
        cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()

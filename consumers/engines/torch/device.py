"""The device of one rank of a `torch` engine: opened once, before anything is put on it.

Owns nothing. On a CPU it does nothing at all.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from weightbus.consumers.errors import PlanError

__all__ = ("GROUP_BACKENDS", "computing_on", "open_device")

GROUP_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Type of a device -> what the ranks of an engine add up with."""


def open_device(name: str) -> torch.device:
    """A device that this process may use; a GPU is made current for this thread.

    Raises:
        PlanError: there is no such device here.
    """
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise PlanError(
                "device", name, f"torch {torch.__version__} finds no GPU that it can use"
            )
        if device.index >= count:
            raise PlanError("device", name, f"this process sees {count} GPUs, numbered from 0")
        torch.cuda.set_device(device)
    return device


def computing_on(device: torch.device) -> AbstractContextManager[object]:
    """Within it, new tensors are made on the device unless they are asked for elsewhere.

    Never around an update: what is read of a checkpoint stays in main memory.
    """
    return nullcontext() if device.type == "cpu" else device

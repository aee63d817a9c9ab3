"""What goes wrong on a device, as our errors. Does no I/O.

Torch and Triton raise what they like, and a fault of a kernel shows in a later call than the one
that caused it. Two things must be told apart: the device refused something and goes on (memory, a
kernel that cannot be built), or it does nothing for this process any more: after an illegal access
every call fails, until the process ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from weightbus.consumers.errors import DeviceFailed, DeviceLost
from weightbus.consumers.reload.host import ModelHost
from weightbus.schemas.errors import WeightBusError

__all__ = ("is_cpu", "our_error", "settle", "settling")

_DEVICE_ERRORS: Final = tuple(
    kind
    for name in ("AcceleratorError", "OutOfMemoryError")
    if isinstance(kind := getattr(torch, name, None), type)
)
"""Classes that this torch has for them; older ones raise a bare RuntimeError."""

_SAID: Final = (
    "CUDA error",
    "CUDA driver error",
    "CUDA out of memory",
    "NCCL error",
    "Triton Error",
)
"""How errors begin that are of no such class."""

_FOREIGN: Final = ("triton", "torch.distributed")
"""Modules whose errors are a device's, whatever they are called."""


def is_cpu(device: str) -> bool:
    """Whether nothing runs there beside the calling thread."""
    return device.partition(":")[0] == "cpu"


def settle(host: ModelHost) -> None:
    """Return when nothing is under way on the device any more, however it ended.

    A device cannot be told to stop: what it was asked to write, it writes. So there is no deadline
    here: whoever waits for this process gives it up, and ends it.

    Raises:
        DeviceLost: the device does nothing for this process any more.
    """
    if is_cpu(host.device):
        return
    try:
        host.synchronize()
    except Exception as error:
        raise DeviceLost(host.device, _reason(error)) from error


@contextmanager
def settling(host: ModelHost) -> Iterator[None]:
    """If it is left by an error, nothing is under way on the device any more.

    Raises:
        DeviceLost: in place of the error.
    """
    try:
        yield
    except BaseException:
        settle(host)
        raise


def our_error(error: Exception, device: str) -> Exception:
    """An error as it is to be told: as it is, unless a device's library raised it."""
    if isinstance(error, WeightBusError) or is_cpu(device):
        return error
    module = type(error).__module__
    is_foreign = any(module == name or module.startswith(f"{name}.") for name in _FOREIGN)
    if isinstance(error, _DEVICE_ERRORS) or is_foreign or str(error).startswith(_SAID):
        return DeviceFailed(device, type(error).__name__, _reason(error))
    return error


def _reason(error: Exception) -> str:
    """What an error says first: CUDA's go on with advice to whoever writes kernels."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

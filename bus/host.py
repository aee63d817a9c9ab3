"""Which host this is: who shares its memory has the same id. Reads /proc and /dev/shm once each."""

from __future__ import annotations

import os
from pathlib import Path

from weightbus.bus.errors import HostUnknown

__all__ = ("host_id",)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHARED_MEMORY = "/dev/shm"


def host_id() -> str:
    """The kernel's boot id and the device number of /dev/shm.

    Two containers of one machine that do not share /dev/shm are two hosts.

    Raises:
        HostUnknown: the system does not tell.
    """
    try:
        boot_id = _BOOT_ID.read_text("ascii").strip()
        device = os.stat(_SHARED_MEMORY).st_dev
    except (OSError, UnicodeDecodeError) as error:
        raise HostUnknown(str(error)) from None
    return f"{boot_id}:{device:x}"

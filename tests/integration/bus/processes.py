"""Waiting for processes that are not our children to end."""

from __future__ import annotations

import os
import select

__all__ = ("assert_ends", "is_running")


def assert_ends(pid: int, within_s: float = 10.0) -> None:
    """Waits for the kernel to say that a process has ended; a zombie has."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        assert poller.poll(within_s * 1000), f"process {pid} is alive after {within_s:g} s"
    finally:
        os.close(process)


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

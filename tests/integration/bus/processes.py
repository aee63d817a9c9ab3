"""Waiting for processes that are not our children to end."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

__all__ = ("assert_ends", "halt", "is_running")


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


def halt(pid: int, within_s: float = 10.0) -> None:
    """Stops a process that SIGCONT shall continue; returns once every thread of it stands still."""
    os.kill(pid, signal.SIGSTOP)
    give_up = time.monotonic() + within_s
    while any(_state(stat) != "T" for stat in Path(f"/proc/{pid}/task").glob("*/stat")):
        assert time.monotonic() < give_up, f"process {pid} goes on after {within_s:g} s"


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return _state(Path(f"/proc/{pid}/stat")) != "Z"
    except FileNotFoundError:
        return False


def _state(stat: Path) -> str:
    """The kernel's letter for what a process or a thread does."""
    return stat.read_text("ascii").rpartition(")")[2].split()[0]

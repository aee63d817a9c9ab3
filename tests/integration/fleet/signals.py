"""Processes that are stopped, and go on or are killed: SIGSTOP holds a rank exactly where it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ("kill", "stopped")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does not run, from here to the end; it may be killed meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)

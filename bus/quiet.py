"""Keeps what a library says while it starts away from the terminal of whoever runs a command.

Owns file descriptors 1 and 2 while `quietly` runs. Blocking, and brief. Libraries in C++ write to
them past `sys.stderr` and `logging`. What was written is not lost: what looks like the library's
own log is told at level DEBUG, and everything else, such as what another thread has printed
meanwhile, goes to where it was meant to go.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

__all__ = ("quietly",)

_STREAMS: Final = (1, 2)

_GLOG: Final = re.compile(
    rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+:\d+\] |WARNING: Logging before "
)
"""How a line of Google's logging library begins."""

MAX_BYTES: Final = 2**20
"""Read back from a stream at most; the rest is dropped."""

_turn = threading.Lock()


@contextmanager
def quietly(logger: logging.Logger) -> Iterator[None]:
    """Whatever the body raises, the descriptors are what they were. One at a time per process.

    Args:
        logger: of whoever uses the library.
    """
    with _turn, ExitStack() as stack:
        for fd in _STREAMS:
            stack.enter_context(_captured(fd, logger))
        yield


@contextmanager
def _captured(fd: int, logger: logging.Logger) -> Iterator[None]:
    _flush()
    try:
        kept = os.dup(fd)
    except OSError:  # it is closed: nobody sees what is written there
        yield
        return
    memory = os.memfd_create(f"weightbus-fd{fd}")
    try:
        os.dup2(memory, fd)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, fd)
            _sort(os.pread(memory, MAX_BYTES, 0), fd, logger)
    finally:
        os.close(memory)
        os.close(kept)


def _flush() -> None:
    """What Python holds back belongs to what came before."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            stream.flush()


def _sort(said: bytes, fd: int, logger: logging.Logger) -> None:
    others = []
    for line in said.splitlines(keepends=True):
        if _GLOG.match(line):
            logger.debug("%s", line.decode(errors="replace").rstrip())
        else:
            others.append(line)
    rest = b"".join(others)
    with suppress(OSError):  # a terminal that is gone, or does not take more now
        while rest:
            rest = rest[os.write(fd, rest) :]

"""Trace and span ids, from the kernel's entropy, or from what is published. Does no other I/O.

Never from `random`: trainers seed it alike in every process, and would share their ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from weightbus.schemas.checkpoint import CheckpointReady

__all__ = ("derived_trace_id", "in_trace", "new_span_id", "new_trace_id")

_given: ContextVar[int] = ContextVar("weightbus_trace_id", default=0)


def new_trace_id() -> int:
    """128 random bits, never 0: 0 is no id. Within `in_trace` its id."""
    return _given.get() or int.from_bytes(os.urandom(16), "big") or 1


def new_span_id() -> int:
    """64 random bits, never 0."""
    return int.from_bytes(os.urandom(8), "big") or 1


@contextmanager
def in_trace(trace_id: int) -> Iterator[None]:
    """Traces that are begun within have this id."""
    before = _given.set(trace_id)
    try:
        yield
    finally:
        _given.reset(before)


def derived_trace_id(ready: CheckpointReady) -> str:
    """The trace of a version whose publisher began none: the same for every engine that hears of
    it. The first 16 bytes, in hexadecimal, of the SHA-256 of
    `weightbus/{model}/{version}/{producer}/{created_ns}`.
    """
    said = f"weightbus/{ready.model}/{ready.version}/{ready.producer}/{ready.created_ns}"
    return hashlib.sha256(said.encode()).hexdigest()[:32]

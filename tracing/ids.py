"""Trace and span ids, from the kernel's entropy. Does no other I/O.

Never from `random`: trainers seed it alike in every process, and would share their ids.
"""

from __future__ import annotations

import os

__all__ = ("new_span_id", "new_trace_id")


def new_trace_id() -> int:
    """128 random bits, never 0: 0 is no id."""
    return int.from_bytes(os.urandom(16), "big") or 1


def new_span_id() -> int:
    """64 random bits, never 0."""
    return int.from_bytes(os.urandom(8), "big") or 1

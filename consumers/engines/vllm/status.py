"""What each of vLLM's workers says of our end in it: a small file beside the consumer's socket.

Owns nothing. It is written within a call of vLLM's, since such a call must not raise: where there
are several workers, vLLM (0.26, 0.32) stops at the first that failed and leaves the answers of the
others unread, and from then on every call gets their answers to the one before it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

__all__ = ("WorkerStatus", "forget_statuses", "read_status", "write_status")


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """Of one worker, since it was last opened."""

    rank: int
    session: bool = False
    """A session of vLLM's weight transfer is open."""
    asleep: tuple[str, ...] = ()
    """Parts of the engine that were not in the memory of its device when this was written, as vLLM
    tags them."""
    discards: int = 0
    """How often vLLM has discarded the weights, since the worker's process began."""
    error: str = ""
    """Why the worker cannot be opened; empty: it is."""


def write_status(directory: Path, status: WorkerStatus) -> None:
    """Whole; or not at all, and then what was said before is withdrawn.

    Raises:
        OSError: it cannot be written.
    """
    path = _path(directory, status.rank)
    beside = path.with_suffix(".new")
    try:
        beside.write_bytes(msgspec.json.encode(status))
        os.replace(beside, path)
    except OSError:
        for stale in (path, beside):
            with suppress(OSError):
                stale.unlink(missing_ok=True)
        raise


def read_status(directory: Path, rank: int) -> WorkerStatus | None:
    """None: the worker has said nothing that can be read."""
    try:
        return msgspec.json.decode(_path(directory, rank).read_bytes(), type=WorkerStatus)
    except (OSError, msgspec.DecodeError):
        return None


def forget_statuses(directory: Path, ranks: int) -> None:
    """What is read from now on was written from now on."""
    for rank in range(ranks):
        with suppress(OSError):
            _path(directory, rank).unlink(missing_ok=True)


def _path(directory: Path, rank: int) -> Path:
    return directory / f"worker-{rank}.json"

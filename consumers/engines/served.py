"""What an engine that is not ours served last, kept beside its sockets for the next consumer.

Owns one file in the engine's directory. Such an engine outlives its consumers, and cannot itself
tell whether all that its workers hold was ever proven.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from weightbus.consumers.errors import EngineUnavailable

__all__ = ("Held", "Served", "instances_of", "read_served", "write_served")

_logger = logging.getLogger(__name__)


class Held(Struct, frozen=True):
    """What one rank holds, as it last said."""

    instance: str
    version: int
    touched: bool
    updates: int


class Served(Struct, frozen=True):
    """What was served last, and how every rank was then."""

    version: int
    ranks: tuple[Held, ...]


def instances_of(ranks: Sequence[Held]) -> list[str]:
    """The workers' processes."""
    return [rank.instance for rank in ranks]


def read_served(path: Path) -> Served | None:
    """None: nothing was served yet, or what was written cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Served)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        _logger.warning("what was served last is not known: %s: %s", path, error)
        return None


def write_served(path: Path, served: Served) -> None:
    """Whole or not at all.

    Raises:
        EngineUnavailable: it cannot be written.
    """
    beside = path.with_suffix(".new")
    try:
        beside.write_bytes(msgspec.json.encode(served))
        os.replace(beside, path)
    except OSError as error:
        raise EngineUnavailable(str(path), f"cannot be written: {error.strerror}") from None

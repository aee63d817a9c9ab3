"""What an engine that is not ours holds, and served last, kept beside its sockets for the next
consumer.

Owns one file in the engine's directory. Such an engine outlives its consumers, and cannot itself
tell whether all that its workers hold was ever proven.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from weightbus.consumers.engines.asking import Outcomes
from weightbus.consumers.engines.channel import WorkerChannel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.turns import TurnEngine
from weightbus.consumers.errors import EngineUnavailable
from weightbus.schemas.worker import Applied, Attached, Inspected, Prepared

__all__ = ("SERVED_FILE", "Held", "Served", "ServingEngine", "instances_of", "write_served")

SERVED_FILE: Final = "served.json"

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


def _read_served(path: Path) -> Served | None:
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


class ServingEngine(TurnEngine):
    """A `TurnEngine` that knows what its ranks hold, as far as their answers tell."""

    def __init__(
        self, channel: WorkerChannel, place: EngineDirectory, roots: Sequence[str], host_id: str
    ) -> None:
        super().__init__(channel, str(place.path), roots, host_id)
        self._place = place
        self._paused = False
        self._held: dict[int, Inspected] = {}
        """What every rank last said of itself, and what followed from its answers since."""
        self._sure: set[int] = set()
        """Ranks of which that still holds: nothing is under way, and what was has ended well."""
        self._served = _read_served(place.path / SERVED_FILE)
        self._error = ""

    def _begin(self, ranks: Iterable[int]) -> None:
        """An update of these ranks begins: until they say what they hold, it counts as touched.

        Raises:
            EngineUnavailable: the engine is not paused.
        """
        if not self._paused:
            reason = "it is not paused: its weights must not change"
            raise EngineUnavailable(self._name, reason)
        for rank in ranks:
            self._sure.discard(rank)
            if (held := self._held.get(rank)) is not None:
                self._held[rank] = msgspec.structs.replace(held, touched=True)

    async def _check_held(self, version: int, deadline_s: float) -> None:
        """
        Raises:
            EngineUnavailable: a rank does not hold this version whole.
        """
        if len(self._held) < self.ranks:
            await self.inspect(None, deadline_s)
        for rank, held in sorted(self._held.items()):
            if held.touched or held.version != version:
                what = "a part of an update after" if held.touched else "version"
                reason = f"rank {rank} holds {what} {held.version}, not version {version}"
                raise EngineUnavailable(self._name, reason)

    def _learn(self, outcomes: Outcomes) -> None:
        """What ranks hold, as far as their answers tell."""
        for rank, outcome in outcomes.items():
            known = self._held.get(rank)
            match outcome:
                case Inspected():
                    if known is not None and known.instance != outcome.instance:
                        self._error = "its workers were started anew"
                        self._on_new_workers()
                    self._held[rank] = msgspec.structs.replace(
                        outcome, cell_digests=b"", unreadable=()
                    )
                    self._sure.add(rank)
                case Applied() if known is not None:
                    self._held[rank] = msgspec.structs.replace(
                        known,
                        version=outcome.version,
                        touched=False,
                        updates=known.updates + 1 if outcome.updates is None else outcome.updates,
                        proven=outcome.proven or (),
                    )
                    if None not in (outcome.proven, outcome.updates):
                        self._sure.add(rank)
                case Attached() | Prepared():
                    pass
                case _:  # it failed, or a new layout took the place of one that was known
                    self._sure.discard(rank)

    def _on_new_workers(self) -> None:
        """The workers are other processes than before."""

    def _ranks_held(self) -> tuple[Held, ...]:
        return tuple(
            Held(held.instance, held.version, held.touched, held.updates)
            for _, held in sorted(self._held.items())
        )

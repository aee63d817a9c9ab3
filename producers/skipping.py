"""Says on the bus that a version does not come: `CheckpointSkipped`.

Owns nothing. Invariants: nothing is said of a version that readers may know of, and the bus keeps
it once for a version, whichever ranks fail with it: a rank that fails by itself says so at once; of
a version that is skipped, and where ranks wait for others in vain, rank 0 does, with who was not
heard of; and where that is rank 0 itself, the others do. All is best effort, within a deadline: an
error is on its way up already.

A rank that is cancelled (its trainer ends), or gives up, waits a moment before it looks who is
missing: where a launcher ends all ranks since one has died, the living say so in that time; the
dead one is left.
"""

from __future__ import annotations

import logging
from typing import Final

import anyio

from weightbus.producers.announcing import Announcer
from weightbus.producers.errors import SealFailed, SlotBusy, VersionSkipped
from weightbus.producers.group import RankGroup
from weightbus.schemas.checkpoint import CheckpointPart, CheckpointSkipped, SkipCause
from weightbus.schemas.errors import WeightBusError

__all__ = ("SkipTeller", "cause_of")

_logger = logging.getLogger(__name__)

TELL_TIMEOUT_S: Final = 3.0
"""With all pauses; less than what a publisher's end waits for what still runs."""

RANK_0_LOOKS_AFTER_S: Final = 0.5
OTHERS_LOOK_AFTER_S: Final = 1.0
"""After a cancellation. Rank 0 is first: it has heard the others."""

REASON_CHARACTERS: Final = 4096
"""Limit of `schemas.base.Reason`."""


def cause_of(error: BaseException) -> SkipCause:
    """What kind of failure of `publish` it is."""
    if isinstance(error, SlotBusy | VersionSkipped):
        return "busy"
    return "ranks" if isinstance(error, SealFailed) else "failed"


class SkipTeller:
    """One rank's."""

    def __init__(self, announcer: Announcer, rank: int, group: RankGroup | None) -> None:
        """`group`: None if this rank is alone."""
        self._announcer, self._rank, self._group = announcer, rank, group

    def is_own(self, error: BaseException) -> bool:
        """Whether it is for this rank to say at once that the version does not come, and why."""
        if self._group is None:
            return True
        if isinstance(error, VersionSkipped):  # every rank may find it out by itself
            return self._rank == 0
        return isinstance(error, Exception) and not isinstance(error, SealFailed)

    async def tell(self, version: int, error: BaseException, waited_s: float) -> None:
        """The version failed, and it is for this rank to say so: see `is_own`."""
        with anyio.move_on_after(TELL_TIMEOUT_S, shield=True):
            await self._say(version, cause_of(error), _reason(error), (), waited_s)

    async def tell_of_others(self, mine: CheckpointPart, error: BaseException) -> None:
        """The version failed by others' fault, who may have said so, or is cancelled or given up.

        Called after this rank has given its own part up.
        """
        assert self._group is not None
        if isinstance(error, VersionSkipped):
            return  # rank 0 says it
        is_sealing = isinstance(error, SealFailed)
        missing = error.missing if isinstance(error, SealFailed) else ()
        with anyio.move_on_after(TELL_TIMEOUT_S, shield=True):
            if not missing and (not is_sealing or self._rank == 0):
                await anyio.sleep(RANK_0_LOOKS_AFTER_S if self._rank == 0 else OTHERS_LOOK_AFTER_S)
            try:
                if self._rank == 0:
                    missing = missing or await self._group.unheard(mine.version, mine.producer)
                elif await self._group.rank_0_has_ended(mine):
                    return
                else:
                    missing = (0,)
                if await self._is_told(mine.version):
                    return
            except WeightBusError:
                return
            cause: SkipCause = "ranks" if missing or is_sealing else "failed"
            await self._say(mine.version, cause, _reason(error), missing, 0.0)

    async def _is_told(self, version: int) -> bool:
        announcer = self._announcer
        last = await announcer.bus.last(
            CheckpointSkipped, model=announcer.model, producer=announcer.producer
        )
        return last is not None and last.message.version == version

    async def _say(
        self,
        version: int,
        cause: SkipCause,
        reason: str,
        ranks: tuple[int, ...],
        waited_s: float,
    ) -> None:
        announcer = self._announcer
        if announcer.is_offered(version):
            return
        said = CheckpointSkipped(
            model=announcer.model,
            version=version,
            producer=announcer.producer,
            cause=cause,
            reason=reason[:REASON_CHARACTERS],
            ranks=ranks,
            waited_s=waited_s,
            created_ns=announcer.bus.clock.now_ns(),
        )
        try:
            await announcer.bus.publish(said)
        except WeightBusError as error:
            _logger.warning("that version %d is skipped was not said: %s", version, error)


def _reason(error: BaseException) -> str:
    if not isinstance(error, Exception):
        return "its publisher has ended"
    return f"{type(error).__name__}: {error}"

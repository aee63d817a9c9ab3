"""What consumers said of one version -> how long each part of the update took. Does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import StageComplete, UpdateComplete

__all__ = ("Heard", "Times", "is_whole", "times_of")

MOVING: Final = ("fetch", "h2d", "broadcast", "reload")
"""Stages in which bytes move."""


class Heard(Struct, frozen=True, kw_only=True):
    """What an engine's consumer said of one version."""

    complete: UpdateComplete
    stages: tuple[StageComplete, ...]


class Times(Struct, frozen=True, kw_only=True):
    """One update, in seconds. But for the first two, of the engine that was written last.

    The first is the sum of `announce_s` to `transfer_s`.
    """

    seconds: float
    """From `CheckpointReady` being sent to the last rank's parameters being written."""
    served_s: float
    """From there to the last engine serving again."""
    announce_s: float
    """Until the consumer hears of it."""
    event_to_plan_s: float
    """Heard -> the plan in hand."""
    prepare_s: float
    """Plan in hand -> requests begin to wait."""
    pause_s: float
    """Requests begin to wait -> the first byte moves into a parameter, or staging is read."""
    transfer_s: float
    """The first byte moves -> the last rank is written."""
    prove_s: float
    """Written -> the digests of all ranks add up."""
    resume_s: float
    """Proven -> requests go on."""
    paused_s: float
    """How long requests waited."""
    reload_s: float
    """The slowest rank's own part of the transfer."""


def is_whole(stages: Sequence[Message], ranks: int) -> bool:
    """Whether every stage that `times_of` needs of an engine was reported."""
    said = [one for one in stages if isinstance(one, StageComplete)]
    reloaded = {one.rank for one in said if one.stage == "reload"}
    return len(reloaded) == ranks and {"negotiate", "commit"} <= {one.stage for one in said}


def times_of(ready: CheckpointReady, heard: Sequence[Heard]) -> Times:
    """Of one version that several engines were brought.

    Args:
        heard: of every engine, `is_whole`.
    """
    last = max(heard, key=_written_ns)
    negotiate, commit = _stage(last, "negotiate"), _stage(last, "commit")
    paused_ns = commit.end_ns - round(last.complete.paused_s * 1e9)
    moved = [one for one in last.stages if one.stage in MOVING]
    reloads = [one for one in moved if one.stage == "reload"]
    first_ns, written_ns = min(one.start_ns for one in reloads), _written_ns(last)
    if first_ns > paused_ns > min(one.start_ns for one in moved):
        # Slots are filled before the engine is paused: what moves then is part of the transfer.
        first_ns = paused_ns = max(negotiate.end_ns, min(one.start_ns for one in moved))
    return Times(
        seconds=(written_ns - ready.created_ns) / 1e9,
        served_s=(max(one.complete.end_ns for one in heard) - ready.created_ns) / 1e9,
        announce_s=(negotiate.start_ns - ready.created_ns) / 1e9,
        event_to_plan_s=(negotiate.end_ns - negotiate.start_ns) / 1e9,
        prepare_s=(paused_ns - negotiate.end_ns) / 1e9,
        pause_s=(first_ns - paused_ns) / 1e9,
        transfer_s=(written_ns - first_ns) / 1e9,
        prove_s=(commit.start_ns - written_ns) / 1e9,
        resume_s=(commit.end_ns - commit.start_ns) / 1e9,
        paused_s=last.complete.paused_s,
        reload_s=max(one.end_ns - one.start_ns for one in reloads) / 1e9,
    )


def _stage(heard: Heard, name: str) -> StageComplete:
    """The last of that name: a version may be tried again."""
    return max((one for one in heard.stages if one.stage == name), key=lambda one: one.end_ns)


def _written_ns(heard: Heard) -> int:
    return max(one.end_ns for one in heard.stages if one.stage == "reload")

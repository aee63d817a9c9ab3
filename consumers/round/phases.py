"""The phases of both halves of the round machine; `table.py` says what they mean. Does no I/O."""

from __future__ import annotations

from enum import Enum

__all__ = ("Lead", "Phase")


class Phase(Enum):
    """Where an engine is with the version it is going for."""

    NEW = "new"
    IDLE = "idle"
    QUARANTINED = "quarantined"
    PREPARING = "preparing"
    JOINING = "joining"
    TRANSFERRING = "transferring"
    CANCELLING = "cancelling"
    REPLANNING = "replanning"
    PROVEN = "proven"
    RESUMING = "resuming"
    STOPPED = "stopped"


class Lead(Enum):
    """Where a round is, for one of its engines."""

    HEARD = "heard"
    CANDIDATE = "candidate"
    COLLECTING = "collecting"
    WATCHING = "watching"
    REGROUPING = "regrouping"
    REPLANNING = "replanning"
    OVER = "over"

"""What a turn says: which request every worker of an engine shall carry out now. Does no I/O.

A worker of an engine that is not ours owns its main thread, and nothing may be written beside a
forward pass. So requests reach it by its channel (`channel.py`) and wait there; a *turn* is one
call of the engine's own on every worker's main thread, in which each carries out the one request
that the turn names. Its reply goes back by the channel.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

__all__ = ("NO_REQUEST", "Turn")

NO_REQUEST = -1

RequestNumber = Annotated[int, Meta(ge=NO_REQUEST)]


class Turn(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Travels as JSON, or as the object that its JSON is."""

    numbers: Annotated[tuple[RequestNumber, ...], Meta(min_length=1, max_length=4096)]
    """`numbers[rank]` is the number of the request that rank shall carry out; -1: none."""
    wait_s: Annotated[float, Meta(ge=0, le=60)]
    """How long a worker may wait for it to arrive, in seconds: the engine stands still."""

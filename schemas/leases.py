"""What lies in the lease buckets of the bus. Does no I/O."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from weightbus.schemas.base import Message, Nanoseconds, Token, Version
from weightbus.schemas.rounds import Epoch

__all__ = ("ReaderLease", "RoundLease")


class RoundLease(Message, frozen=True, kw_only=True):
    """Who leads a round; the key lives as long as its TTL is renewed."""

    model: Token
    round: Token
    leader: Token
    epoch: Epoch
    consumer: Annotated[str, Meta(max_length=64)] = ""


class ReaderLease(Message, frozen=True, kw_only=True):
    """Who is reading a version's segments; protects the slot until deleted or expired."""

    model: Token
    version: Version
    engine: Token
    consumer: Annotated[str, Meta(max_length=64)] = ""
    taken_ns: Nanoseconds = 0

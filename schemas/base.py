"""What every message on the bus has in common, and the constrained types that fields are made of.

Does no I/O. Structs are frozen and keyword-only; the tag field is `type`, its value the class name.
Unknown fields are ignored and new fields need defaults, so that old and new speak with each other.
Constraints live in the type, so that a decoder enforces them and JSON Schema shows them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

__all__ = (
    "SCHEMA_VERSION",
    "BucketTiming",
    "BucketTimings",
    "ClockResidual",
    "Count",
    "Digest64",
    "DtypeName",
    "INT64_MAX",
    "Message",
    "Name",
    "Nanoseconds",
    "ObjectDigest",
    "RankNumber",
    "Reason",
    "RouteName",
    "Seconds",
    "SizeBytes",
    "Stage",
    "Token",
    "Version",
)

SCHEMA_VERSION = 1
"""Major version of the contract. A message of another major version is refused."""

INT64_MAX = 2**63 - 1
"""Largest integer of the contract; msgspec's bounds end here too."""

Token = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z", description="One subject token.")]
"""A model, engine, producer or round id: one NATS subject token, `[A-Za-z0-9_-]{1,64}`."""

Name = Annotated[str, Meta(min_length=1, max_length=512)]
"""A tensor or parameter name."""

DtypeName = Annotated[str, Meta(min_length=1, max_length=16)]
"""A dtype as safetensors names it: a key of `DTYPE_BYTES`."""

Reason = Annotated[str, Meta(max_length=4096)]
"""Text for a person: why something failed."""

Version = Annotated[int, Meta(ge=0, le=INT64_MAX)]
"""A checkpoint's version; it only grows."""

SizeBytes = Annotated[int, Meta(ge=0, le=2**50)]
"""A size or an offset in bytes; at most 1 PiB."""

Nanoseconds = Annotated[int, Meta(ge=0, le=INT64_MAX)]
"""A point in time: nanoseconds since the Unix epoch."""

Seconds = Annotated[float, Meta(ge=0.0, le=86_400.0)]
"""A duration or a deadline budget in seconds; at most one day."""

Count = Annotated[int, Meta(ge=0, le=2**32)]
"""A number of things."""

RankNumber = Annotated[int, Meta(ge=0, lt=65_536)]
"""A rank of a trainer or an engine."""

Digest64 = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
"""A 64-bit weights digest as 16 hexadecimal digits (DESIGN section 8)."""

ObjectDigest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""SHA-256 of an object's content: its key in the object store."""

RouteName = Literal["local", "broadcast", "p2p"]
"""How bytes reach one rank."""

Stage = Literal["negotiate", "fetch", "h2d", "broadcast", "reload", "commit"]
"""A timed part of an update. `publish` has a span of its own on the trainer's side."""


ClockResidual = Nanoseconds | None
"""By how much times that were put on the bus's clock may be off; None: they are by the sender's."""


class BucketTiming(Struct, frozen=True, array_like=True, gc=False):
    """One bucket of a stage that streams."""

    start_ns: Nanoseconds
    end_ns: Nanoseconds
    bytes: SizeBytes = 0


BucketTimings = Annotated[tuple[BucketTiming, ...], Meta(max_length=4096)]
"""In the order of their starts; empty if there was one bucket only, or more than fit.

A message of the bus tells 256 at most: of more, neighbours are as one, from the first one's start
to the last one's end, with the bytes of all.
"""


class Message(Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of every message: tagged by class name, carrying the contract's version."""

    schema_version: Annotated[int, Meta(ge=1)] = SCHEMA_VERSION
    """Major version of the contract this message was written for."""

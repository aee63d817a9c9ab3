"""What is said of a version: it, a part or a copy of it is ready, skipped or gone. Does no I/O."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from weightbus.schemas.base import (
    ClockResidual,
    Count,
    Digest64,
    Message,
    Nanoseconds,
    ObjectDigest,
    RankNumber,
    Reason,
    Seconds,
    Token,
    Version,
)
from weightbus.schemas.placement import Placement

__all__ = (
    "CheckpointPart",
    "CheckpointReady",
    "CheckpointRetired",
    "CheckpointSkipped",
    "CopyReady",
    "CopyRetired",
    "SkipCause",
)

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=128)], Annotated[str, Meta(max_length=4096)]],
    Meta(max_length=64),
]
Paths = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=4096)], ...], Meta(max_length=4096)
]

SkipCause = Literal["busy", "ranks", "failed"]
"""`busy`: no slot was free. `ranks`: parts of the version were missing. `failed`: the copy or the
announcement failed."""


class CheckpointReady(Message, frozen=True, kw_only=True):
    """One version of a model's weights can be read.

    Either `layout_digest` and `placement` are given (layout in the object store), or `files` alone:
    safetensors files from whose headers every reader derives the same layout.
    """

    model: Token
    version: Version
    producer: Token
    """Who published; with model and version it makes the message id, so a repeat is dropped."""
    layout_digest: ObjectDigest | None = None
    """Key of the layout in the object store; None beside `files`."""
    placement: Placement = ()
    """Where each segment of the layout is; empty beside `files`."""
    files: Paths = ()
    """Absolute paths of safetensors files, as the readers see them."""
    weights_digest: Digest64 | None = None
    """Shard-additive digest of the whole model; None: the publisher offers no proof."""
    tensor_digests: ObjectDigest | None = None
    """Object with the digest of every tensor, in layout order, 8 bytes each, little endian."""
    created_ns: Nanoseconds = 0
    """When it was published."""
    clock_residual_ns: ClockResidual = None
    """By how much `created_ns`, put on the bus's clock, may be off; None: it is by the sender's."""
    valid_until_ns: Nanoseconds = 0
    """When the placement stops being readable by itself; 0: until `CheckpointRetired`."""
    metadata: Metadata = {}
    """Whatever the trainer wants to be read beside it: step, loss."""


class CheckpointPart(Message, frozen=True, kw_only=True):
    """One trainer rank's part of a version; sealed with the others' by the publisher of rank 0."""

    model: Token
    version: Version
    producer: Token
    """The publisher group's name: the same on every rank."""
    rank: RankNumber
    world_size: Annotated[int, Meta(ge=1, le=65_536)]
    layout_digest: ObjectDigest
    """The part's own layout: whole tensors' specs, but only this rank's shards and segments."""
    placement: Placement
    shard_digests: ObjectDigest | None = None
    """Object with the partial digest of every shard of the part, 8 bytes each, little endian."""
    error: Reason = ""
    """Not empty: this rank gives the version up, and why; no other rank need wait for it."""
    created_ns: Nanoseconds = 0
    step: Annotated[str, Meta(max_length=128)] = ""
    """What the rank's metadata call the step of training, cut to this length; empty: nothing. Parts
    of different steps do not become one version."""


class CheckpointRetired(Message, frozen=True, kw_only=True):
    """A version can no longer be read; sent before its slot is written again."""

    model: Token
    version: Version
    producer: Token
    reason: Reason = ""
    """Why, for a person."""
    active_readers: Count = 0
    """Leases that had not ended when the publisher gave up waiting for them."""


class CheckpointSkipped(Message, frozen=True, kw_only=True):
    """A version was to be published and will not be: the trainer has gone on without it.

    Said once for a version by any rank of the producer. It asks nothing of anybody: engines go on
    serving what they serve, and the next version is published like any other. A trainer of one
    rank may try the same version again: `CheckpointReady` of this version and producer, before or
    after this message, takes it back.
    """

    model: Token
    version: Version
    producer: Token
    """The publisher group's name: the same on every rank."""
    cause: SkipCause
    """`busy`: no slot was free. `ranks`: parts of it were missing. `failed`: the copy or the
    announcement failed."""
    reason: Reason
    """Why, for a person: thing, value and limit."""
    ranks: Annotated[tuple[RankNumber, ...], Meta(max_length=65_536)] = ()
    """The ranks of the trainer that were not heard of, if that is why; ascending."""
    waited_s: Seconds = 0.0
    """How long the trainer waited before it went on."""
    created_ns: Nanoseconds = 0
    """When it was given up."""


class CopyReady(Message, frozen=True, kw_only=True):
    """An engine's host holds a whole, proven copy of a version, from which others may read it."""

    model: Token
    version: Version
    engine: Token
    layout_digest: ObjectDigest
    placement: Placement
    """Of the copy's segments: the same layout as the publisher's."""
    checkpoint_ns: Nanoseconds = 0
    """`created_ns` of the `CheckpointReady` that was copied."""
    created_ns: Nanoseconds = 0


class CopyRetired(Message, frozen=True, kw_only=True):
    """The copy is about to be overwritten: read no more of it. Sent before it is."""

    model: Token
    version: Version
    engine: Token
    reason: Reason = ""

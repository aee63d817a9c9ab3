"""Layout: what a checkpoint looks like, the same for every version.

Does no I/O. A layout is content-addressed: its digest is the SHA-256 of its canonical MessagePack
encoding, and it travels zlib-compressed through the object store (`layout_codec`).
Structs are array-like, because a large model has 140,000 tensors.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from weightbus.schemas.base import DtypeName, Name, SizeBytes
from weightbus.schemas.limits import MAX_SEGMENTS, MAX_SHARDS, MAX_TENSORS

__all__ = ("Layout", "SegmentSpec", "ShardSpec", "TensorSpec")

Dimension = Annotated[int, Meta(ge=0, le=2**50)]
Index = Annotated[int, Meta(ge=0, lt=2**32)]
Shape = Annotated[tuple[Dimension, ...], Meta(max_length=8)]


class TensorSpec(Struct, frozen=True, array_like=True, gc=False):
    """One whole checkpoint tensor, independent of how it is cut."""

    name: Name
    dtype: DtypeName
    """A key of `DTYPE_BYTES`."""
    shape: Shape
    """Extent of each dimension; () is a scalar, an extent of 0 an empty tensor."""


class SegmentSpec(Struct, frozen=True, array_like=True, gc=False):
    """One contiguous run of bytes that a transport can reach."""

    size_bytes: SizeBytes


class ShardSpec(Struct, frozen=True, array_like=True, gc=False):
    """One box of one tensor, C-contiguous at one place of one segment."""

    tensor: Index
    """Index into `Layout.tensors`: the tensor's *number*."""
    starts: Shape
    """First index of the box in each dimension of the tensor."""
    sizes: Shape
    """Extent of the box in each dimension of the tensor."""
    segment: Index
    """Index into `Layout.segments`."""
    offset_bytes: SizeBytes
    """Where the box's first byte lies in the segment."""


class Layout(Struct, frozen=True, array_like=True, gc=False):
    """Tensors, shards and segments of a checkpoint.

    Invariants (checked by `check_layout`): names are unique; every shard lies inside its tensor and
    its segment; no two shards of one tensor overlap; no two shards share a byte of a segment;
    every element of every tensor is in a shard.
    """

    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
    shards: Annotated[tuple[ShardSpec, ...], Meta(max_length=MAX_SHARDS)]
    segments: Annotated[tuple[SegmentSpec, ...], Meta(max_length=MAX_SEGMENTS)]

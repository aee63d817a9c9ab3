"""Placement: where each segment of a layout is for one version. Does no I/O.

A placement may offer several ways to one segment; the reader takes the nearest it can use, and
passes over those whose kind it does not know.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from weightbus.schemas.base import INT64_MAX

__all__ = (
    "CudaSegment",
    "FileSegment",
    "HostId",
    "MAX_SEGMENT_WAYS",
    "Placement",
    "RemoteSegment",
    "SHM_NAME_PATTERN",
    "Segment",
    "SharedMemorySegment",
)

HostId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}\Z")]
"""Kernel boot id plus the identity of /dev/shm: containers that share no memory are two hosts."""

SHM_NAME_PATTERN: Final = r"^weightbus-[A-Za-z0-9_.-]{1,200}\Z"
"""Of a block below /dev/shm."""

MAX_SEGMENT_WAYS: Final = 8

Generation = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Handle = Annotated[bytes, Meta(max_length=1024)]


class FileSegment(Struct, frozen=True, kw_only=True, tag_field="kind", tag="file"):
    """A whole file; byte 0 of the segment is byte 0 of the file."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """Absolute path as the reader sees it; must lie under the reader's allowed roots."""
    size_bytes: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    """Of the whole file when its header was read; 0: not stated."""
    modified_ns: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    """When the file was last modified then, in ns since 1970; 0: not stated. A file whose size or
    time is another is not the one that was meant, and is not read."""


class SharedMemorySegment(Struct, frozen=True, kw_only=True, tag_field="kind", tag="shared_memory"):
    """A named POSIX shared-memory block: `SHM_HEADER_BYTES` of header, then the segment's bytes."""

    name: Annotated[str, Meta(pattern=SHM_NAME_PATTERN)]
    """Name below /dev/shm."""
    host_id: HostId
    generation: Generation
    """Value of the header's generation word while this version is whole (always even)."""


class CudaSegment(Struct, frozen=True, kw_only=True, tag_field="kind", tag="cuda"):
    """A GPU allocation exported by CUDA IPC: a block's header and data, as in shared memory."""

    handle: Handle
    """`cudaIpcMemHandle_t` of the whole allocation: 64 bytes."""
    host_id: HostId
    device_uuid: Annotated[str, Meta(min_length=1, max_length=64)]
    """Of the GPU that holds it, as nvidia-smi prints it; readers open it on their own."""
    generation: Generation


class RemoteSegment(Struct, frozen=True, kw_only=True, tag_field="kind", tag="remote"):
    """The data of a block of shared memory, registered to be read from another host.

    The block's header lies before it and can be read, too: its generation word is at
    `address - SHM_HEADER_BYTES + SHM_GENERATION_OFFSET`.
    """

    protocol: Annotated[str, Meta(pattern=r"^[a-z0-9_-]{1,32}\Z")]
    session: Annotated[str, Meta(min_length=1, max_length=256)]
    """What the transfer engine calls the process that offers it: `host:port`."""
    address: Annotated[int, Meta(ge=0, le=INT64_MAX)]
    """Of the segment's first byte, in that process."""
    generation: Generation


Segment = FileSegment | SharedMemorySegment | CudaSegment | RemoteSegment

Ways = Annotated[tuple[Segment, ...], Meta(min_length=1, max_length=MAX_SEGMENT_WAYS)]

Placement = Annotated[tuple[Ways, ...], Meta(max_length=4096)]
"""For every segment of the layout, in its order, the ways to reach it."""

"""The header of a shared-memory segment: what writer and reader agree on. Does no I/O.

The header is a seqlock: the writer makes `generation` odd before it touches the data and even again
after; a reader that knows the generation it was promised checks it before and after reading.
"""

from __future__ import annotations

import struct

from weightbus.schemas.errors import MessageInvalid

__all__ = (
    "MAX_READERS",
    "SHM_ADMITTED_OFFSET",
    "SHM_FETCHED_OFFSET",
    "SHM_FILLED_OFFSET",
    "SHM_GENERATION_OFFSET",
    "SHM_GIVEN_UP_OFFSET",
    "SHM_HANDLE_OFFSET",
    "SHM_HANDLE_SET_OFFSET",
    "SHM_HEADER_BYTES",
    "SHM_READERS_OFFSET",
    "SHM_REQUEST_OFFSET",
    "SHM_STAGED_OFFSET",
    "SHM_WANTED_OFFSET",
    "TURN_BITS",
    "pack_shm_header",
    "unpack_shm_header",
)

SHM_HEADER_BYTES = 4096
"""The data begins one page after the block's start, so that it can be registered with a device."""

SHM_GENERATION_OFFSET = 16
"""Where the 8-byte little-endian generation word lies in the header."""

TURN_BITS = 32
"""Words of a staging block count buckets of one transfer: its turn above, the count below."""

SHM_FILLED_OFFSET = 64
"""Staging: the owner's word, `turn << TURN_BITS | parts`: so many parts of its lane are filled.
Of a device lane the owner only begins the turn there; the worker that fills the lane goes on."""

SHM_GIVEN_UP_OFFSET = 72
"""Staging: the turn that the owner has given up; 0: none."""

SHM_WANTED_OFFSET = 80
"""Relay: the reader's word, `turn << TURN_BITS | number` of its latest request."""

SHM_REQUEST_OFFSET = 88
"""Relay: what is wanted: three words: segment, window, and the slot that it shall be put into."""

SHM_HANDLE_SET_OFFSET = 120
"""Device lane: its filler's word: how often it has written a handle into this block; 0: not yet."""

SHM_FETCHED_OFFSET = 128
"""Device lane: its filler's word, `turn << TURN_BITS | parts`: for so many parts there was room in
the device slots, and those that it is the root of are in them. A word of the turn, be it with no
parts, says that the handle is that of the turn."""

SHM_STAGED_OFFSET = 136
"""Device lane: the owner's word, `turn << TURN_BITS | parts`: of so many parts it has brought into
the block's own slots what the filler cannot read itself."""

SHM_ADMITTED_OFFSET = 144
"""Device lane: the owner's word, `turn << TURN_BITS | parts`: so many parts may be broadcast, since
every host's member is ready."""

SHM_HANDLE_OFFSET = 160
"""Device lane: the CUDA IPC handle, 64 bytes, of its filler's device slots, which lie one after the
other as the block's own would."""

SHM_READERS_OFFSET = 256
"""Staging: word `r` is reader `r`'s, `turn << TURN_BITS | parts`: so many parts are done with."""

MAX_READERS = (SHM_HEADER_BYTES - SHM_READERS_OFFSET) // 8
"""Readers that a staging block has words for."""

_MAGIC = b"wbus-shm"
_HEADER = struct.Struct("<8sQQ")  # magic, data size in bytes, generation


def pack_shm_header(size_bytes: int, generation: int) -> bytes:
    """The first bytes of a block whose data area holds `size_bytes`."""
    return _HEADER.pack(_MAGIC, size_bytes, generation)


def unpack_shm_header(header: bytes | memoryview) -> tuple[int, int]:
    """(size_bytes, generation) of a block.

    Raises:
        MessageInvalid: the block is too short or was not written by a Weight bus publisher.
    """
    if len(header) < _HEADER.size:
        raise MessageInvalid(
            "shared-memory header", "$", len(header), f"at least {_HEADER.size} bytes"
        )
    magic, size_bytes, generation = _HEADER.unpack_from(header)
    if magic != _MAGIC:
        raise MessageInvalid("shared-memory header", "magic", magic, f"must be {_MAGIC!r}")
    return size_bytes, generation

"""The header of a shared-memory block."""

from __future__ import annotations

import struct

import pytest

from weightbus.schemas import (
    SHM_GENERATION_OFFSET,
    MessageInvalid,
    pack_shm_header,
    unpack_shm_header,
)


def test_header_survives_packing() -> None:
    header = pack_shm_header(2**40, 14)
    assert unpack_shm_header(header) == (2**40, 14)
    assert struct.unpack_from("<Q", header, SHM_GENERATION_OFFSET) == (14,)


def test_header_is_read_from_a_view_with_data_behind_it() -> None:
    assert unpack_shm_header(memoryview(pack_shm_header(1, 2) + bytes(100))) == (1, 2)


@pytest.mark.parametrize("header", [b"", b"wbus-shm", bytes(24)])
def test_header_is_refused_when_short_or_foreign(header: bytes) -> None:
    with pytest.raises(MessageInvalid, match="shared-memory header"):
        unpack_shm_header(header)

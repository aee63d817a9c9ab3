"""Stored objects: the digest is of what is inside, and inflating stops at the limit."""

from __future__ import annotations

import hashlib
import zlib

import pytest
from hypothesis import given

from tests.contract.examples import LAYOUT
from tests.unit.schemas.hostile import mutations, peak_bytes
from weightbus.schemas import (
    Limits,
    MessageInvalid,
    decode_layout,
    decode_needs,
    digest_of,
    encode_layout,
    layout_digest,
)
from weightbus.schemas.blobs import canonical, compress, inflate

BLOB = encode_layout(LAYOUT)
SMALL = Limits(max_object_bytes=2**16)


def test_digest_is_the_hash_of_the_canonical_bytes_however_they_are_compressed() -> None:
    raw = canonical("layout", LAYOUT)
    assert digest_of(BLOB) == hashlib.sha256(raw).hexdigest() == layout_digest(LAYOUT)
    assert digest_of(zlib.compress(raw, 9)) == digest_of(BLOB)


def test_object_is_read_when_exactly_as_large_as_the_limit() -> None:
    raw = bytes(SMALL.max_object_bytes)
    assert inflate("object", compress(raw), SMALL) == raw
    with pytest.raises(MessageInvalid, match="at most 65536 bytes decompressed"):
        inflate("object", compress(raw + b"\0"), SMALL)


@pytest.mark.parametrize("decode", [decode_layout, decode_needs, digest_of])
def test_bomb_is_refused_without_being_inflated(decode: object) -> None:
    bomb = zlib.compress(bytes(64 * 2**20), 9)

    def refuse() -> None:
        with pytest.raises(MessageInvalid, match="at most 65536 bytes decompressed"):
            decode(bomb, SMALL)  # type: ignore[operator]

    assert peak_bytes(refuse) <= 4 * SMALL.max_object_bytes + 2**17


def test_bomb_of_announced_arrays_is_refused_within_the_allocation_limit() -> None:
    """The length words say: a million tensors, each of eight dimensions."""
    raw = b"\x93\xdd\x00\x0f\x42\x40" + b"\x93\xa1a\xa2U8\x98" * 5_000

    def refuse() -> None:
        with pytest.raises(MessageInvalid):
            decode_layout(compress(raw), SMALL)

    assert peak_bytes(refuse) <= 100 * len(raw) + 2**17


def test_bomb_of_tiny_tensors_stays_within_the_allocation_limit() -> None:
    tensors = 7_000
    raw = b"\x93\xdc" + tensors.to_bytes(2, "big") + b"\x93\xa1a\xa2U8\x90" * tensors + b"\x90\x90"
    assert len(raw) < SMALL.max_object_bytes

    def refuse() -> None:
        with pytest.raises(MessageInvalid, match="names must be unique"):
            decode_layout(compress(raw), SMALL)

    assert peak_bytes(refuse) <= 100 * len(raw) + 2**17


@pytest.mark.parametrize(
    ("blob", "limit"),
    [
        (b"", "must not be truncated"),
        (b"no zlib", "must be zlib"),
        (BLOB[:-1], "must not be truncated"),
        (BLOB + b"x", "nothing may follow"),
        (BLOB + BLOB, "nothing may follow"),
        (BLOB[:-2] + b"xx", "must be zlib"),
    ],
)
def test_blob_is_refused_when_damaged(blob: bytes, limit: str) -> None:
    with pytest.raises(MessageInvalid, match=limit):
        decode_layout(blob)


def test_blob_is_refused_when_larger_than_the_limit_though_small_inside() -> None:
    with pytest.raises(MessageInvalid, match=f"at most {len(BLOB) - 1} bytes compressed"):
        decode_layout(BLOB, Limits(max_blob_bytes=len(BLOB) - 1))


@given(blob=mutations(BLOB))
def test_mutated_blob_is_the_same_layout_or_refused(blob: bytes) -> None:
    try:
        layout = decode_layout(blob)
    except MessageInvalid:
        return
    assert layout == LAYOUT

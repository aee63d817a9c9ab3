"""Bytes that no honest peer sends, and the memory that reading them takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Final

from hypothesis import strategies as st

__all__ = ("HOSTILE_JSON", "HOSTILE_MSGPACK", "mutations", "peak_bytes")

_HEAD = b'{"type":"CheckpointReady","model":"m","version":7,"producer":"p",'

HOSTILE_JSON: Final[dict[str, bytes]] = {
    "nothing": b"",
    "not JSON": b"\x93\x01\x02\x03",
    "not UTF-8": _HEAD + b'"files":["/\xff"]}',
    "lone surrogate": _HEAD + b'"files":["/\\ud800"]}',
    "NaN": _HEAD + b'"created_ns":NaN,"files":["/a"]}',
    "infinity": _HEAD + b'"created_ns":1e999,"files":["/a"]}',
    "integer of 10,000 digits": _HEAD + b'"created_ns":' + b"9" * 10_000 + b',"files":["/a"]}',
    "deep nesting": _HEAD + b'"later":' + b"[" * 200_000,
    "deep nesting, closed": _HEAD + b'"later":' + b"[" * 9_999 + b"]" * 9_999 + b',"files":["/"]}',
    "deep objects": b'{"a":' * 100_000,
    "many empty lists": b"[" + b"[]," * 100_000 + b"[]]",
    "many files": _HEAD + b'"files":[' + b'"/",' * 100_000 + b'"/"]}',
    "many metadata": _HEAD
    + b'"files":["/"],"metadata":{'
    + b",".join(b'"%d":"x"' % n for n in range(50_000))
    + b"}}",
    "unknown kinds of ways": _HEAD
    + b'"placement":['
    + b",".join([b'[{"kind":"x"},{"kind":"y"},{"kind":"file"}]'] * 4096)
    + b"]}",
    "an unknown kind beside many empty lists": _HEAD
    + b'"placement":[[{"kind":"x"},{"kind":"file","path":"/"}]],"later":['
    + b"[]," * 100_000
    + b"[]]}",
    "a list": b"[1]",
    "null": b"null",
    "trailing bytes": _HEAD + b'"files":["/a"]} {}',
}

_PACKED_HEAD = b"\x85\xa4type\xafCheckpointReady\xa5model\xa1m\xa7version\x07\xa8producer\xa1p"

HOSTILE_MSGPACK: Final[dict[str, bytes]] = {
    "nothing": b"",
    "a huge array announced": _PACKED_HEAD + b"\xa5files\xdd\xff\xff\xff\xff",
    "a huge map announced": _PACKED_HEAD + b"\xa8metadata\xdf\xff\xff\xff\xff",
    "a huge string announced": _PACKED_HEAD + b"\xa5later\xdb\xff\xff\xff\xff",
    "huge bytes announced": _PACKED_HEAD + b"\xa5later\xc6\xff\xff\xff\xff",
    "arrays in arrays, all huge": _PACKED_HEAD + b"\xa5later" + b"\xdd\x00\xff\xff\xff" * 50_000,
    "deep nesting": _PACKED_HEAD + b"\xa5later" + b"\x91" * 200_000,
    "deep maps": _PACKED_HEAD + b"\xa5later" + b"\x81\xa1a" * 100_000,
    "not UTF-8": _PACKED_HEAD + b"\xa5files\x91\xa2/\xff",
    "not UTF-8 in a key": b"\x81\xa1\xff\xa1a",
    "NaN": _PACKED_HEAD + b"\xaacreated_ns\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    "largest integer": _PACKED_HEAD + b"\xaacreated_ns\xcf" + b"\xff" * 8,
    "extension type": _PACKED_HEAD + b"\xaacreated_ns\xc7\x0c\xff" + b"\xff" * 12,
    "reserved byte": b"\xc1",
    "many empty arrays": b"\xdd\x00\x0f\xff\xff" + b"\x90" * 0xFFFFF,
    "many empty maps": b"\xdd\x00\x0f\xff\xff" + b"\x80" * 0xFFFFF,
    "unhashable key": b"\x81\x81\x01\x02\x03",
    "trailing bytes": b"\x80\x80",
}


@st.composite
def mutations(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "insert", "remove", "repeat", "truncate"])):
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del data[at : at + draw(st.integers(1, 9))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "truncate":
                del data[at:]
    return bytes(data)


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that `action` had allocated at once, in bytes."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        action()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()

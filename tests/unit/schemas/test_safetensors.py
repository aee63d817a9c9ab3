"""safetensors headers: what the format's own library writes is read, and every fault is named."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.schemas.hostile import mutations, peak_bytes
from weightbus.schemas import (
    LENGTH_WORD_BYTES,
    Layout,
    Limits,
    MessageInvalid,
    SafetensorsHeader,
    SegmentSpec,
    ShardSpec,
    TensorSpec,
    layout_of_files,
    parse_safetensors_header,
    safetensors_header_bytes,
)

PATH = "/step-7/model.safetensors"

TENSORS: dict[str, Any] = {
    "__metadata__": {"format": "pt", "dtype": "x", "shape": "y"},
    "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
    "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    "none": {"dtype": "U8", "shape": [0, 9], "data_offsets": [16, 16]},
}
DATA_BYTES = 16


def parse(entries: dict[str, Any], data_bytes: int = DATA_BYTES) -> SafetensorsHeader:
    header = json.dumps(entries).encode()
    return parse_safetensors_header(header, LENGTH_WORD_BYTES + len(header) + data_bytes, PATH)


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return TENSORS | {name: TENSORS[name] | fields}


def test_tensors_are_numbered_by_their_place_in_the_file() -> None:
    header = parse(TENSORS)
    begin = header.size_bytes - DATA_BYTES
    assert header.tensors == (
        (TensorSpec("a", "F32", ()), begin),
        (TensorSpec("b", "BF16", (2, 3)), begin + 4),
        (TensorSpec("none", "U8", (0, 9)), begin + 16),
    )
    assert header.metadata == TENSORS["__metadata__"]
    assert parse(dict(reversed(TENSORS.items()))).tensors == header.tensors


def test_file_may_hold_no_tensor_and_a_padded_header() -> None:
    assert parse({}, 0).tensors == ()
    padded = json.dumps(TENSORS).encode() + b"   "
    header = parse_safetensors_header(padded, LENGTH_WORD_BYTES + len(padded) + DATA_BYTES, PATH)
    assert header.tensors[0][1] == LENGTH_WORD_BYTES + len(padded)


def test_layout_has_one_segment_per_file_and_one_shard_per_tensor() -> None:
    first = parse(TENSORS)
    second = parse({"c": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}, 5)
    begin, begin_second = first.size_bytes - DATA_BYTES, second.size_bytes - 5
    assert layout_of_files([first, second]) == Layout(
        tensors=(
            TensorSpec("a", "F32", ()),
            TensorSpec("b", "BF16", (2, 3)),
            TensorSpec("none", "U8", (0, 9)),
            TensorSpec("c", "U8", (5,)),
        ),
        shards=(
            ShardSpec(0, (), (), 0, begin),
            ShardSpec(1, (0, 0), (2, 3), 0, begin + 4),
            ShardSpec(2, (0, 0), (0, 9), 0, begin + 16),
            ShardSpec(3, (0,), (5,), 1, begin_second),
        ),
        segments=(SegmentSpec(first.size_bytes), SegmentSpec(second.size_bytes)),
    )


def test_tensor_in_two_files_is_refused_naming_both() -> None:
    other = SafetensorsHeader(
        path="/step-7/other.safetensors",
        size_bytes=2**20,
        tensors=((TensorSpec("b", "U8", (1,)), 100),),
        metadata={},
    )
    with pytest.raises(MessageInvalid) as caught:
        layout_of_files([parse(TENSORS), other])
    assert caught.value.kind == "safetensors file /step-7/other.safetensors"
    assert caught.value.field == "b"
    assert caught.value.limit == f"it is in {PATH} too"


@pytest.mark.parametrize(
    ("entries", "data_bytes", "field", "limit"),
    [
        (changed("a", dtype="F4"), 16, "a.dtype", "must be one of"),
        (changed("a", dtype=None), 16, "a.dtype", "must be one of"),
        (changed("a", shape="[]"), 16, "a.shape", "array of sizes"),
        (changed("a", shape=[-1]), 16, "[...].shape[0]", "must be int >= 0"),
        (changed("a", shape=[1] * 9), 16, "[...].shape", "length <= 8"),
        (changed("a", data_offsets=None), 16, "a.data_offsets", "[begin, end]"),
        (changed("a", data_offsets=[0, 4, 8]), 16, "[...].data_offsets", "length 2"),
        (changed("a", data_offsets=[0, 5]), 16, "a.data_offsets", "4 bytes apart: F32 ()"),
        (changed("a", data_offsets=[4, 0]), 16, "a.data_offsets", "4 bytes apart"),
        (changed("a", data_offsets=[1, 5]), 16, "a.data_offsets", "must begin at 0"),
        (changed("b", data_offsets=[3, 15]), 16, "b.data_offsets", "must begin at 4"),
        (changed("b", data_offsets=[5, 17]), 17, "b.data_offsets", "must begin at 4"),
        (TENSORS, 15, "b.data_offsets", "within the 15 bytes of data"),
        (TENSORS, 17, "$", "its tensors and header fill"),
        (TENSORS | {"": TENSORS["a"]}, 16, "", "1 to 512 characters"),
        (TENSORS | {"x" * 513: TENSORS["a"]}, 16, "xxx", "1 to 512 characters"),
        (TENSORS | {"__metadata__": {"a": 1}}, 16, "__metadata__[...]", "must be str"),
        (TENSORS | {"c": [1]}, 16, "[...]", "must be object"),
    ],
)
def test_header_is_refused_naming_file_and_tensor(
    entries: dict[str, Any], data_bytes: int, field: str, limit: str
) -> None:
    with pytest.raises(MessageInvalid) as caught:
        parse(entries, data_bytes)
    assert caught.value.kind == f"safetensors file {PATH}"
    assert caught.value.field.startswith(field)
    assert limit in caught.value.limit


def test_name_given_twice_is_refused_when_it_hides_a_range() -> None:
    entry = '"a":{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    with pytest.raises(MessageInvalid, match="must begin at 0"):
        parse_safetensors_header(header, LENGTH_WORD_BYTES + len(header) + 8, PATH)


@pytest.mark.parametrize("header", [b"", b"[]", b"{", b"\xff", b"{}x", b'{"a":' * 100_000, b"NaN"])
def test_header_is_refused_when_it_is_no_json_object(header: bytes) -> None:
    with pytest.raises(MessageInvalid, match="safetensors file"):
        parse_safetensors_header(header, LENGTH_WORD_BYTES + len(header), PATH)


def test_header_length_is_read_from_the_first_word() -> None:
    assert safetensors_header_bytes(struct.pack("<Q", 100), 108, PATH) == 100


@pytest.mark.parametrize(
    ("word", "file_bytes"),
    [
        (b"1234567", 7),
        (struct.pack("<Q", 101), 108),
        (struct.pack("<Q", 2**63), 2**50),
        (struct.pack("<Q", 100_000_001), 2**40),
        (struct.pack("<Q", 1), 8),
    ],
)
def test_header_length_is_refused_when_beyond_the_file_or_the_limit(
    word: bytes, file_bytes: int
) -> None:
    with pytest.raises(MessageInvalid, match=PATH):
        safetensors_header_bytes(word, file_bytes, PATH)


def test_header_is_refused_when_larger_than_the_limits() -> None:
    header = json.dumps(TENSORS).encode()
    file_bytes = LENGTH_WORD_BYTES + len(header) + DATA_BYTES
    with pytest.raises(MessageInvalid, match="bytes of header"):
        parse_safetensors_header(
            header, file_bytes, PATH, Limits(max_safetensors_header_bytes=len(header) - 1)
        )
    with pytest.raises(MessageInvalid, match="3 tensors: at most 2"):
        parse_safetensors_header(header, file_bytes, PATH, Limits(max_tensors=2))


@given(data=st.data())
def test_mutated_header_is_valid_or_refused_within_the_allocation_limit(
    data: st.DataObject,
) -> None:
    header = data.draw(mutations(json.dumps(TENSORS).encode()))
    file_bytes = LENGTH_WORD_BYTES + len(header) + DATA_BYTES

    def read() -> None:
        try:
            layout_of_files([parse_safetensors_header(header, file_bytes, PATH)])
        except MessageInvalid:
            return

    assert peak_bytes(read) <= 100 * len(header) + 2**17

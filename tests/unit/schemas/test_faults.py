"""A fault names the real field, the value found there and the limit."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.contract.examples import EXAMPLES, LAYOUT
from weightbus.schemas import (
    CONTENT_TYPE_JSON,
    CONTENT_TYPE_MSGPACK,
    Message,
    MessageInvalid,
    UpdateComplete,
    UpdateFailed,
    decode,
    decode_layout,
)
from weightbus.schemas.blobs import compress


def broken(message: Message, path: list[str | int], value: Any) -> dict[str, Any]:
    """The message as plain data, with `value` at `path`."""
    document: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("name", "path", "value", "field", "shown", "limit"),
    [
        ("CheckpointReady", ["version"], -1, "version", "-1", "must be int >= 0"),
        ("CheckpointReady", ["version"], "7", "version", "7", "must be int"),
        ("CheckpointReady", ["model"], "a b", "model", "a b", "must be str matching regex"),
        ("CheckpointReady", ["model"], None, "model", "None", "must be str"),
        (
            "CheckpointReady",
            ["placement", 1, 1, "path"],
            "",
            "placement[1][1].path",
            "",
            "must be str of length >= 1",
        ),
        (
            "CheckpointReady",
            ["placement", 0],
            [{"kind": "tape"}],
            "placement[0][0].kind",
            "tape",
            "must be file or shared_memory or cuda or remote",
        ),
        (
            "CheckpointReady",
            ["placement", 0, 1, "address"],
            -5,
            "placement[0][1].address",
            "-5",
            "must be int >= 0",
        ),
        ("CheckpointReady", ["metadata"], [], "metadata", "[]", "must be object"),
        (
            "CheckpointReady",
            ["metadata", "step"],
            7,
            "metadata[...]",
            "{'loss': '0.12', 'step': 7}",
            "must be str",
        ),
        (
            "CheckpointReady",
            ["metadata", "k" * 129],
            "x",
            "metadata (a key)",
            "{",
            "must be str of length <= 128",
        ),
        (
            "RoundPlan",
            ["engines", 1, "ranks", 0, "route"],
            "carrier pigeon",
            "engines[1].ranks[0].route",
            "carrier pigeon",
            "must be broadcast or local or p2p",
        ),
        (
            "RoundPlan",
            ["groups", 0, "members", 1, 1],
            70_000,
            "groups[0].members[1].rank",
            "70000",
            "must be int <= 65535",
        ),
        ("Described", ["needs", 1, 0, 4], -1, "needs.copies[0].offset", "-1", "must be int >= 0"),
        (
            "Described",
            ["needs", 3, 0, 0, 0, 0],
            "sqrt",
            "needs.transforms[0].ops[0][0]",
            "sqrt",
            "must be cast or exp or neg",
        ),
    ],
)
@pytest.mark.parametrize("content_type", [CONTENT_TYPE_JSON, CONTENT_TYPE_MSGPACK])
def test_fault_names_field_value_and_limit(
    name: str,
    path: list[str | int],
    value: Any,
    field: str,
    shown: str,
    limit: str,
    content_type: str,
) -> None:
    document = broken(EXAMPLES[name], path, value)
    codec = msgspec.json if content_type == CONTENT_TYPE_JSON else msgspec.msgpack
    with pytest.raises(MessageInvalid) as caught:
        decode(codec.encode(document), content_type, type(EXAMPLES[name]))
    assert caught.value.kind == name
    assert caught.value.field == field
    assert caught.value.value.startswith(shown)
    assert caught.value.limit.startswith(limit)


def test_fault_names_the_field_that_is_missing() -> None:
    document = broken(EXAMPLES["CheckpointReady"], ["placement", 0, 0], {"kind": "file"})
    with pytest.raises(MessageInvalid, match=r"placement\[0\]\[0\]\.path is missing: required"):
        decode(msgspec.json.encode(document), CONTENT_TYPE_JSON, type(EXAMPLES["CheckpointReady"]))


def test_fault_of_one_of_several_types_names_the_field() -> None:
    document = broken(EXAMPLES["UpdateFailed"], ["stage"], "lunch")
    with pytest.raises(MessageInvalid) as caught:
        decode(msgspec.json.encode(document), CONTENT_TYPE_JSON, (UpdateComplete, UpdateFailed))
    assert caught.value.kind == "UpdateComplete or UpdateFailed"
    assert caught.value.field == "stage"
    assert "commit" in caught.value.limit


def test_fault_of_a_layout_names_fields_not_positions() -> None:
    document = msgspec.to_builtins(LAYOUT)
    tensors = [list(tensor) for tensor in document[0]]
    tensors[1][2] = (4, -4)
    raw = msgspec.msgpack.encode([tensors, document[1], document[2]])
    with pytest.raises(MessageInvalid) as caught:
        decode_layout(compress(raw))
    assert caught.value.field == "tensors[1].shape[1]"
    assert caught.value.value == "-4"


def test_fault_is_still_named_when_the_document_is_too_large_to_read_again() -> None:
    document = msgspec.to_builtins(LAYOUT)
    shapes: list[tuple[int, ...]] = [()] * 99_999 + [(-1,)]
    tensors = [(f"tensor-{number}", "U8", shape) for number, shape in enumerate(shapes)]
    raw = msgspec.msgpack.encode([tensors, document[1], document[2]])
    assert len(raw) > 2**20
    with pytest.raises(MessageInvalid) as caught:
        decode_layout(compress(raw))
    assert caught.value.field == "tensors[99999].shape[0]"
    assert caught.value.value == "not shown"


def test_fault_shows_values_short_and_printable() -> None:
    document = broken(EXAMPLES["CheckpointReady"], ["model"], "\x1b[2J\n" + "x" * 10_000)
    with pytest.raises(MessageInvalid) as caught:
        decode(msgspec.json.encode(document), CONTENT_TYPE_JSON, type(EXAMPLES["CheckpointReady"]))
    assert caught.value.value.startswith(r"\x1b[2J\nxxx")
    assert len(caught.value.value) <= 200
    assert str(caught.value).isprintable()

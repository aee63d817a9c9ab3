"""Any bytes become a valid message or `MessageInvalid`; any message survives both encodings."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.examples import EXAMPLES
from tests.unit.schemas.hostile import HOSTILE_JSON, HOSTILE_MSGPACK, mutations, peak_bytes
from tests.unit.schemas.strategies import messages
from weightbus.schemas import (
    CONTENT_TYPE_JSON,
    CONTENT_TYPE_MSGPACK,
    CheckpointReady,
    Describe,
    Limits,
    Message,
    MessageInvalid,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
    decode,
    encode,
)

CONTENT_TYPES = (CONTENT_TYPE_MSGPACK, CONTENT_TYPE_JSON)
TYPES = [pytest.param(type(message), id=name) for name, message in EXAMPLES.items()]
READY = EXAMPLES["CheckpointReady"]

BYTES_PER_BYTE = 100
"""What decoding may allocate for each byte of a payload: an empty list takes 72 for one byte."""


def decoded(
    payload: bytes, content_type: str, message_type: type[Message]
) -> Message | MessageInvalid:
    """What reading comes to; any other exception passes, and fails the test."""
    try:
        return decode(payload, content_type, message_type)
    except MessageInvalid as error:
        return error


@pytest.mark.parametrize("message_type", TYPES)
@given(data=st.data())
def test_message_survives_both_encodings(message_type: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(message_type))
    for content_type in CONTENT_TYPES:
        assert decode(encode(message, content_type), content_type, message_type) == message


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
@pytest.mark.parametrize("message_type", TYPES)
@given(data=st.data())
def test_mutated_bytes_decode_to_a_valid_message_or_are_refused(
    message_type: type[Message], content_type: str, data: st.DataObject
) -> None:
    payload = data.draw(mutations(encode(EXAMPLES[message_type.__name__], content_type)))
    outcome = decoded(payload, content_type, message_type)
    if isinstance(outcome, MessageInvalid):
        assert outcome.kind == message_type.__name__
        assert len(str(outcome)) < 2000
        assert str(outcome).isprintable()
    else:
        again = encode(outcome, CONTENT_TYPE_MSGPACK)
        assert decode(again, CONTENT_TYPE_MSGPACK, message_type) == outcome


@given(payload=st.binary(max_size=200), content_type=st.sampled_from(CONTENT_TYPES))
def test_random_bytes_are_refused(payload: bytes, content_type: str) -> None:
    with pytest.raises(MessageInvalid):
        decode(payload, content_type, CheckpointReady)


@given(
    payload=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    field=st.sampled_from(CheckpointReady.__struct_fields__),
)
def test_any_value_in_any_field_is_valid_or_refused(payload: Any, field: str) -> None:
    document = msgspec.to_builtins(READY) | {field: payload}
    outcome = decoded(msgspec.msgpack.encode(document), CONTENT_TYPE_MSGPACK, CheckpointReady)
    assert isinstance(outcome, MessageInvalid) or encode(outcome)


@pytest.mark.parametrize(
    ("payload", "content_type"),
    [pytest.param(p, CONTENT_TYPE_JSON, id=f"JSON: {name}") for name, p in HOSTILE_JSON.items()]
    + [
        pytest.param(p, CONTENT_TYPE_MSGPACK, id=f"MessagePack: {name}")
        for name, p in HOSTILE_MSGPACK.items()
    ],
)
def test_hostile_bytes_are_refused_within_the_allocation_limit(
    payload: bytes, content_type: str
) -> None:
    def refuse() -> None:
        with pytest.raises(MessageInvalid):
            decode(payload, content_type, (CheckpointReady, UpdateFailed))

    refuse()
    assert peak_bytes(refuse) <= BYTES_PER_BYTE * len(payload) + 2**17


@given(payload=mutations(encode(READY)))
def test_mutated_bytes_stay_within_the_allocation_limit(payload: bytes) -> None:
    peak = peak_bytes(lambda: decoded(payload, CONTENT_TYPE_MSGPACK, CheckpointReady))
    assert peak <= BYTES_PER_BYTE * len(payload) + 2**17


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_payload_is_refused_when_larger_than_the_limit(content_type: str) -> None:
    payload = encode(READY, content_type)
    exact = Limits(max_payload_bytes=len(payload))
    assert decode(payload, content_type, CheckpointReady, exact) == READY
    below = Limits(max_payload_bytes=len(payload) - 1)
    with pytest.raises(MessageInvalid, match=f"at most {len(payload) - 1} bytes"):
        decode(payload, content_type, CheckpointReady, below)
    with pytest.raises(MessageInvalid, match=f"at most {len(payload) - 1} bytes"):
        encode(READY, content_type, below)


def test_worker_message_may_be_larger_than_a_message_of_the_bus() -> None:
    layout = bytes(2 * Limits().max_payload_bytes)
    message = Describe(request=1, layout_digest="0" * 64, layout=layout, deadline_s=1.0)
    payload = encode(message)
    assert decode(payload, None, Describe) == message
    with pytest.raises(MessageInvalid, match="at most 1048576 bytes"):
        decode(payload, None, (Describe, CheckpointReady))


@pytest.mark.parametrize(
    ("content_type", "encoded_as"),
    [
        (None, CONTENT_TYPE_MSGPACK),
        ("", CONTENT_TYPE_MSGPACK),
        ("Application/JSON; charset=utf-8", CONTENT_TYPE_JSON),
    ],
)
def test_content_type_is_understood_when_written_otherwise(
    content_type: str | None, encoded_as: str
) -> None:
    assert decode(encode(READY, encoded_as), content_type, CheckpointReady) == READY


def test_content_type_is_refused_when_unknown() -> None:
    with pytest.raises(MessageInvalid) as caught:
        decode(encode(READY), "application/x-python-pickle", CheckpointReady)
    assert caught.value.field == "Content-Type"
    assert "application/json" in caught.value.limit


def test_one_of_several_types_is_told_by_its_tag() -> None:
    failed = EXAMPLES["UpdateFailed"]
    assert decode(encode(failed), None, (UpdateComplete, UpdateFailed)) == failed
    with pytest.raises(MessageInvalid) as caught:
        decode(encode(READY), None, (UpdateComplete, UpdateFailed))
    assert caught.value.field == "type"
    assert caught.value.value == "CheckpointReady"
    assert caught.value.limit == "must be UpdateComplete or UpdateFailed"


def test_message_of_another_type_is_refused_though_its_fields_fit() -> None:
    document = msgspec.to_builtins(EXAMPLES["Commit"]) | {"type": "Abort"}
    with pytest.raises(MessageInvalid, match="must be Commit"):
        decode(json.dumps(document).encode(), CONTENT_TYPE_JSON, type(EXAMPLES["Commit"]))


@pytest.mark.parametrize("breakage", [{}, {"model": 7}, {"type": "CheckpointReady2"}])
def test_other_major_version_is_refused_naming_ours_whatever_else_changed(
    breakage: dict[str, Any],
) -> None:
    document = msgspec.to_builtins(READY) | {"schema_version": 2} | breakage
    with pytest.raises(MessageInvalid) as caught:
        decode(msgspec.msgpack.encode(document), None, CheckpointReady)
    assert caught.value.field == "schema_version"
    assert caught.value.value == "2"
    assert caught.value.limit == "spoken here: 1"


@pytest.mark.parametrize(
    "fields",
    [
        {"version": -1},
        {"version": 2**63},
        {"version": 2**70},
        {"version": 1.5},
        {"model": "a.b"},
        {"model": "a\n"},
        {"model": None},
        {"producer": "\ud800"},
        {"metadata": {"a": ValueError("not text")}},
        {"created_ns": float("nan")},
        {"files": ("relative",), "placement": (), "layout_digest": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_invalid_message_is_not_encoded(fields: dict[str, Any], content_type: str) -> None:
    with pytest.raises(MessageInvalid):
        encode(msgspec.structs.replace(READY, **fields), content_type)


def test_json_is_named_when_its_header_is_missing() -> None:
    with pytest.raises(MessageInvalid, match="Content-Type: application/json"):
        decode(encode(READY, CONTENT_TYPE_JSON), None, CheckpointReady)


def test_what_is_no_message_is_not_encoded() -> None:
    with pytest.raises(MessageInvalid, match="must be a message"):
        encode({"type": "CheckpointReady"})  # type: ignore[arg-type]


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_duration_that_is_no_duration_is_not_encoded(value: float, content_type: str) -> None:
    message = msgspec.structs.replace(EXAMPLES["Detach"], deadline_s=value)
    with pytest.raises(MessageInvalid) as caught:
        encode(message, content_type)
    assert caught.value.field == "deadline_s"


def test_stage_keeps_its_error_text_when_it_is_long_and_foreign() -> None:
    stage = msgspec.structs.replace(EXAMPLES["StageComplete"], error="é\u2028" * 2048)
    for content_type in CONTENT_TYPES:
        assert decode(encode(stage, content_type), content_type, StageComplete) == stage

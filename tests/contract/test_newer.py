"""What a newer minor version may add, and what makes a major one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.contract.examples import EXAMPLES, LAYOUT, NEEDS, VARIANTS
from tests.contract.newer import ADDED_LATER, with_news
from weightbus.schemas import (
    CONTENT_TYPE_JSON,
    CONTENT_TYPE_MSGPACK,
    CheckpointReady,
    Layout,
    Message,
    MessageInvalid,
    Needs,
    RoundPlan,
    decode,
    decode_layout,
    decode_needs,
)
from weightbus.schemas.blobs import compress

CODECS: dict[str, Any] = {CONTENT_TYPE_JSON: msgspec.json, CONTENT_TYPE_MSGPACK: msgspec.msgpack}
MESSAGES = [pytest.param(message, id=name) for name, message in (EXAMPLES | VARIANTS).items()]
PLACED = ("CheckpointReady", "CheckpointPart", "CopyReady")
TAPE = {"kind": "tape", "reel": 7, "at": {"block": 3}}
"""A way of a kind that may come some day."""
KINDS = "file or shared_memory or cuda or remote"


def document_of(message: Message, content_type: str) -> Any:
    """As a reader of that encoding sees it: in JSON bytes are text."""
    codec = CODECS[content_type]
    return codec.decode(codec.encode(message))


def read(document: Any, content_type: str, message_type: type[Message]) -> Message:
    return decode(CODECS[content_type].encode(document), content_type, message_type)


@pytest.mark.parametrize("content_type", CODECS)
@pytest.mark.parametrize("message", MESSAGES)
def test_unknown_fields_are_ignored_wherever_they_stand(
    message: Message, content_type: str
) -> None:
    newer = with_news(type(message), document_of(message, content_type))
    assert newer["added_later"] == ADDED_LATER
    assert read(newer, content_type, type(message)) == message


def test_news_of_the_tests_go_into_nested_structs_and_arrays() -> None:
    ready = with_news(CheckpointReady, document_of(EXAMPLES["CheckpointReady"], CONTENT_TYPE_JSON))
    assert ready["placement"][0][1]["added_later"] == ADDED_LATER
    assert "added_later" not in ready["metadata"]
    plan = with_news(RoundPlan, document_of(EXAMPLES["RoundPlan"], CONTENT_TYPE_JSON))
    assert plan["engines"][1]["ranks"][0]["added_later"] == ADDED_LATER
    assert plan["groups"][0]["members"][1] == ["b", 0, ADDED_LATER]


@pytest.mark.parametrize(
    ("kind", "thing", "decoder"), [(Layout, LAYOUT, decode_layout), (Needs, NEEDS, decode_needs)]
)
def test_unknown_elements_of_stored_objects_are_ignored(
    kind: type, thing: Any, decoder: Any
) -> None:
    newer = with_news(kind, msgspec.msgpack.decode(msgspec.msgpack.encode(thing)))
    assert newer[-1] == ADDED_LATER
    assert newer[0][0][-1] == ADDED_LATER
    assert decoder(compress(msgspec.msgpack.encode(newer))) == thing


@pytest.mark.parametrize("content_type", CODECS)
@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_way_of_an_unknown_kind_is_passed_over_when_there_are_others(
    name: str, content_type: str, place: int
) -> None:
    message = EXAMPLES[name]
    document = document_of(message, content_type)
    for ways in document["placement"]:
        ways.insert(place, TAPE)
    document["added_later"] = ADDED_LATER
    assert read(document, content_type, type(message)) == message


@pytest.mark.parametrize("content_type", CODECS)
def test_segment_is_refused_when_every_way_to_it_is_of_an_unknown_kind(content_type: str) -> None:
    document = document_of(EXAMPLES["CheckpointReady"], content_type)
    document["placement"][0].append(TAPE)
    document["placement"][1] = [TAPE, TAPE | {"reel": 8}]
    with pytest.raises(MessageInvalid) as caught:
        read(document, content_type, CheckpointReady)
    fault = caught.value
    assert (fault.field, fault.value) == ("placement[1][0].kind", "tape")
    assert fault.limit == f"must be {KINDS}"


@pytest.mark.parametrize("content_type", CODECS)
@pytest.mark.parametrize(
    ("ways", "field"),
    [
        ([{"kind": 7}, {"kind": "file", "path": "/a"}], "placement[0][0].kind"),
        ([{"reel": 7}, {"kind": "file", "path": "/a"}], "placement[0][0].kind"),
        ([TAPE, {"kind": "file"}], "placement[0][0].path"),
        ([TAPE, {"kind": "file", "path": "a"}], "placement[0][0].path"),
        ([TAPE, *({"kind": "file", "path": f"/{n}"} for n in range(8))], "placement[0]"),
    ],
    ids=["kind is a number", "no kind", "known, incomplete", "known, relative", "nine ways"],
)
def test_unknown_kind_excuses_nothing_else(ways: list[Any], field: str, content_type: str) -> None:
    document = document_of(EXAMPLES["CheckpointReady"], content_type)
    document["placement"] = [ways]
    with pytest.raises(MessageInvalid) as caught:
        read(document, content_type, CheckpointReady)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("content_type", CODECS)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("EngineState", "status"),
        ("StageComplete", "stage"),
        ("StageComplete", "route"),
        ("UpdateComplete", "verified"),
        ("CheckpointSkipped", "cause"),
        ("RoundPlan", "commit"),
    ],
)
def test_new_value_of_a_closed_list_is_refused_naming_the_known_ones(
    name: str, field: str, content_type: str
) -> None:
    message = EXAMPLES[name]
    with pytest.raises(MessageInvalid) as caught:
        read(document_of(message, content_type) | {field: "novel"}, content_type, type(message))
    assert (caught.value.field, caught.value.value) == (field, "novel")
    assert getattr(message, field) in caught.value.limit


@pytest.mark.parametrize("content_type", CODECS)
@pytest.mark.parametrize("message", MESSAGES)
def test_other_major_version_is_refused_naming_ours(message: Message, content_type: str) -> None:
    newer = with_news(type(message), document_of(message, content_type)) | {"schema_version": 2}
    for document in (newer, newer | {"placement": [[TAPE]]}):
        with pytest.raises(MessageInvalid) as caught:
            read(document, content_type, type(message))
        assert (caught.value.field, caught.value.value) == ("schema_version", "2")
        assert caught.value.limit == "spoken here: 1"

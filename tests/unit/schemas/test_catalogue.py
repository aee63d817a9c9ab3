"""Subjects, keys and patterns all follow from one list."""

from __future__ import annotations

import re

import msgspec
import pytest

from tests.contract.examples import EXAMPLES
from weightbus.schemas import (
    BUCKETS,
    CATALOGUE,
    CONTENT_TYPE_JSON,
    CONTENT_TYPE_MSGPACK,
    STREAMS,
    WORKER_MESSAGES,
    Abort,
    CheckpointPart,
    CheckpointReady,
    Commit,
    Describe,
    EngineState,
    Entry,
    Join,
    MessageInvalid,
    RoundComplete,
    RoundPlan,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
    bucket_name,
    check_prefix,
    entry_of,
    key_of,
    message_id_of,
    message_types_of,
    pattern_of,
    stream_name,
    stream_subjects,
    subject_of,
)


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("CheckpointReady", "weightbus.qwen3-rl.checkpoint.ready"),
        ("CheckpointPart", "weightbus.qwen3-rl.checkpoint.part.trainer.1"),
        ("CheckpointRetired", "weightbus.qwen3-rl.checkpoint.retired.trainer"),
        ("CheckpointSkipped", "weightbus.qwen3-rl.checkpoint.skipped.trainer"),
        ("CopyReady", "weightbus.qwen3-rl.checkpoint.copy.a.ready"),
        ("CopyRetired", "weightbus.qwen3-rl.checkpoint.copy.a.retired"),
        ("Join", "weightbus.qwen3-rl.round.v7-0.join"),
        ("RoundPlan", "weightbus.qwen3-rl.round.v7-0.plan"),
        ("Proven", "weightbus.qwen3-rl.round.v7-0.proven"),
        ("Commit", "weightbus.qwen3-rl.round.v7-0.commit"),
        ("Abort", "weightbus.qwen3-rl.round.v7-0.abort"),
        ("RoundComplete", "weightbus.qwen3-rl.round.v7-0.done"),
        ("StageComplete", "weightbus.qwen3-rl.stage.a.0"),
        ("UpdateComplete", "weightbus.qwen3-rl.update.a"),
        ("UpdateFailed", "weightbus.qwen3-rl.update.b"),
        ("FirstToken", "weightbus.qwen3-rl.update.a.first_token"),
        ("DeadLetter", "weightbus.qwen3-rl.dead"),
    ],
)
def test_subject_follows_from_the_message(name: str, subject: str) -> None:
    assert subject_of(EXAMPLES[name], "weightbus") == subject
    assert type(EXAMPLES[name]) in message_types_of(subject, "weightbus")


def test_every_entry_has_a_subject_test_above() -> None:
    assert len(CATALOGUE) == 17


def test_stage_of_the_whole_engine_has_its_own_token() -> None:
    stage = msgspec.structs.replace(EXAMPLES["StageComplete"], rank=None)
    assert subject_of(stage, "p") == "p.qwen3-rl.stage.a.all"
    assert message_types_of("p.qwen3-rl.stage.a.all", "p") == (StageComplete,)


def test_what_a_trainer_in_any_language_reads_is_json_and_the_rest_messagepack() -> None:
    written = {entry.message.__name__ for entry in CATALOGUE if entry.encoding == "json"}
    assert written == {
        "CheckpointSkipped",
        "RoundComplete",
        "UpdateComplete",
        "UpdateFailed",
        "FirstToken",
        "DeadLetter",
    }
    assert entry_of(RoundComplete).content_type == CONTENT_TYPE_JSON
    assert entry_of(CheckpointReady).content_type == CONTENT_TYPE_MSGPACK


def test_message_id_tells_a_repeat_of_what_is_said_once_for_a_version() -> None:
    ids = {name: message_id_of(EXAMPLES[name]) for name in map(_name, CATALOGUE)}
    assert {name: known for name, known in ids.items() if known} == {
        "CheckpointReady": "qwen3-rl/7/trainer",
        "CheckpointSkipped": "qwen3-rl/8/trainer/skipped",
    }


def _name(entry: Entry) -> str:
    return entry.message.__name__


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("EngineState", "qwen3-rl.a"),
        ("RoundLease", "qwen3-rl.v7-0"),
        ("ReaderLease", "qwen3-rl.7.a"),
    ],
)
def test_key_follows_from_the_message(name: str, key: str) -> None:
    assert key_of(EXAMPLES[name]) == key


def test_one_subject_may_carry_several_types() -> None:
    assert message_types_of("p.m.update.a", "p") == (UpdateComplete, UpdateFailed)


@pytest.mark.parametrize(
    "subject",
    [
        "weightbus.m.checkpoint",
        "weightbus.m.checkpoint.ready.x",
        "other.m.checkpoint.ready",
        "weightbus.m.x.checkpoint.ready",
        "weightbus..checkpoint.ready",
        "weightbus.*.checkpoint.ready",
        "weightbusXm.checkpoint.ready",
        "weightbus.m.checkpoint.ready\n",
        "",
    ],
)
def test_subject_is_refused_when_not_in_the_catalogue(subject: str) -> None:
    with pytest.raises(MessageInvalid, match="must be one of the catalogue"):
        message_types_of(subject, "weightbus")


def test_pattern_has_wildcards_for_what_is_not_given() -> None:
    assert pattern_of(CheckpointReady, "p") == "p.*.checkpoint.ready"
    assert pattern_of(CheckpointReady, "p", model="m") == "p.m.checkpoint.ready"
    assert pattern_of(CheckpointPart, "p", "m", producer="t") == "p.m.checkpoint.part.t.*"
    assert pattern_of(StageComplete, "p", engine="a", rank=0) == "p.*.stage.a.0"
    assert pattern_of(Join, "p", "m", round="r") == "p.m.round.r.join"


def test_pattern_refuses_what_would_widen_or_miss_it() -> None:
    with pytest.raises(MessageInvalid, match="subject token: model is >"):
        pattern_of(CheckpointReady, "p", model=">")
    with pytest.raises(MessageInvalid, match=r"engine is \*\.x"):
        pattern_of(StageComplete, "p", engine="*.x")
    with pytest.raises(MessageInvalid, match="tokens of"):
        pattern_of(CheckpointReady, "p", engine="a")


@pytest.mark.parametrize("token", ["", "a.b", "*", ">", "a b", "a\n", "ä", "x" * 65])
def test_token_is_refused_when_it_would_change_the_subject(token: str) -> None:
    with pytest.raises(MessageInvalid, match="subject token"):
        subject_of(msgspec.structs.replace(EXAMPLES["Commit"], model=token), "p")
    with pytest.raises(MessageInvalid, match="subject token"):
        check_prefix(token)


def test_message_without_subject_or_key_is_refused() -> None:
    with pytest.raises(MessageInvalid, match="must be a message with a subject"):
        subject_of(EXAMPLES["EngineState"], "p")
    with pytest.raises(MessageInvalid, match="must be a message with a subject"):
        entry_of(Describe)
    with pytest.raises(MessageInvalid, match="must be the value of a bucket"):
        key_of(EXAMPLES["Commit"])


def test_every_message_has_exactly_one_place() -> None:
    places = [entry.message for entry in (*CATALOGUE, *BUCKETS)] + list(WORKER_MESSAGES)
    assert len(set(places)) == len(places)
    assert {message.__name__ for message in places} == set(EXAMPLES)


def test_every_subject_is_kept_by_the_stream_that_its_entry_names() -> None:
    for entry in CATALOGUE:
        subject = subject_of(EXAMPLES[entry.message.__name__], "p")
        keepers = [
            stream.name
            for stream in STREAMS
            if any(covers(pattern, subject) for pattern in stream_subjects(stream, "p"))
        ]
        assert keepers == [entry.stream]


def covers(pattern: str, subject: str) -> bool:
    """As the server matches: `*` is one token, a last `>` is one or more."""
    regex = re.escape(pattern).replace(r"\*", r"[^.]+").replace(">", ".+")
    return re.fullmatch(regex, subject) is not None


def test_streams_and_buckets_are_named_for_the_prefix() -> None:
    assert stream_name("PROGRESS", "p") == "p-PROGRESS"
    assert bucket_name("presence", "p") == "p-presence"


def test_round_messages_share_the_round_s_subject() -> None:
    for message in (Join, RoundPlan, Commit, Abort, RoundComplete):
        assert pattern_of(message, "p", "m", round="r").startswith("p.m.round.r.")
    assert EngineState not in {entry.message for entry in CATALOGUE}

"""Who says what, where: the one list from which subjects, streams and documents are derived.

Does no I/O. Templates hold `{p}` for the prefix; every other `{name}` is the field of that name of
the message, and a subject token. A message's subject is a function of the message alone.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Literal, get_args

from msgspec import Struct

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import (
    CheckpointPart,
    CheckpointReady,
    CheckpointRetired,
    CheckpointSkipped,
    CopyReady,
    CopyRetired,
)
from weightbus.schemas.codec import CONTENT_TYPE_JSON, CONTENT_TYPE_MSGPACK
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.leases import ReaderLease, RoundLease
from weightbus.schemas.progress import (
    DeadLetter,
    EngineState,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import Abort, Commit, Join, Proven, RoundComplete, RoundPlan
from weightbus.schemas.worker import WorkerReply, WorkerRequest

__all__ = (
    "ALL_RANKS",
    "BUCKETS",
    "CATALOGUE",
    "MONITORED",
    "PARAMETERS",
    "STREAMS",
    "WORKER_MESSAGES",
    "BucketEntry",
    "Encoding",
    "Entry",
    "StreamEntry",
    "bucket_name",
    "check_prefix",
    "check_token",
    "entry_of",
    "key_of",
    "message_id_of",
    "message_types_of",
    "pattern_of",
    "stream_name",
    "stream_subjects",
    "subject_of",
)

ALL_RANKS: Final = "all"
"""Stands for the rank in the subject of a stage of the whole engine."""

TRAINER: Final = "trainer"
CONSUMER: Final = "consumer"
LEADER: Final = "leader"
MONITOR: Final = "monitor"

Encoding = Literal["msgpack", "json"]
"""How we write a message. Readers do not rely on it: they follow the header `Content-Type`."""


class Entry(Struct, frozen=True, kw_only=True):
    """One message that is published on a subject."""

    message: type[Message]
    subject: str
    """Template, such as `{p}.{model}.round.{round}.join`."""
    stream: str
    """Name of the stream that keeps it: a name in `STREAMS`."""
    sender: str
    receivers: tuple[str, ...]
    description: str
    encoding: Encoding = "msgpack"
    """`json`: what a trainer in any language waits for, so that it needs no MessagePack to read."""
    message_id: str = ""
    """Template of the header `Nats-Msg-Id`, such as `{model}/{version}/{producer}`: the stream
    drops a repeat. Empty: every message is one of its own."""

    @property
    def content_type(self) -> str:
        """The `Content-Type` of what we send."""
        return CONTENT_TYPE_JSON if self.encoding == "json" else CONTENT_TYPE_MSGPACK


class BucketEntry(Struct, frozen=True, kw_only=True):
    """One message that is the value of a key of a key-value bucket."""

    message: type[Message]
    bucket: str
    key: str
    """Template, such as `{model}.{engine}`."""
    sender: str
    receivers: tuple[str, ...]
    description: str


class StreamEntry(Struct, frozen=True, kw_only=True):
    """One stream: what the server keeps of the messages on some subjects."""

    name: str
    subjects: tuple[str, ...]
    """Templates with the server's wildcards."""
    description: str


STREAMS: Final = (
    StreamEntry(
        name="CHECKPOINTS",
        subjects=("{p}.*.checkpoint.>",),
        description="The last 16 messages of every subject: what can be read now.",
    ),
    StreamEntry(
        name="PROGRESS",
        subjects=("{p}.*.round.>", "{p}.*.stage.>", "{p}.*.update.>", "{p}.*.dead"),
        description="What happened lately, limited by age and size.",
    ),
)

CATALOGUE: Final = (
    Entry(
        message=CheckpointReady,
        subject="{p}.{model}.checkpoint.ready",
        stream="CHECKPOINTS",
        sender=TRAINER,
        receivers=(CONSUMER, MONITOR),
        description="A version can be read.",
        message_id="{model}/{version}/{producer}",
    ),
    Entry(
        message=CheckpointPart,
        subject="{p}.{model}.checkpoint.part.{producer}.{rank}",
        stream="CHECKPOINTS",
        sender=TRAINER,
        receivers=(TRAINER,),
        description="One rank's part of a version, for rank 0 of the same trainer to seal.",
    ),
    Entry(
        message=CheckpointRetired,
        subject="{p}.{model}.checkpoint.retired.{producer}",
        stream="CHECKPOINTS",
        sender=TRAINER,
        receivers=(CONSUMER, MONITOR),
        description="A version of this producer can no longer be read.",
    ),
    Entry(
        message=CheckpointSkipped,
        subject="{p}.{model}.checkpoint.skipped.{producer}",
        stream="CHECKPOINTS",
        sender=TRAINER,
        receivers=(MONITOR,),
        description="A version will not be published; `CheckpointReady` of it takes that back.",
        encoding="json",
        message_id="{model}/{version}/{producer}/skipped",
    ),
    Entry(
        message=CopyReady,
        subject="{p}.{model}.checkpoint.copy.{engine}.ready",
        stream="CHECKPOINTS",
        sender=CONSUMER,
        receivers=(CONSUMER, MONITOR),
        description="An engine's host holds a copy of a version, to be read from there.",
    ),
    Entry(
        message=CopyRetired,
        subject="{p}.{model}.checkpoint.copy.{engine}.retired",
        stream="CHECKPOINTS",
        sender=CONSUMER,
        receivers=(CONSUMER, MONITOR),
        description="An engine's copy of a version can no longer be read.",
    ),
    Entry(
        message=Join,
        subject="{p}.{model}.round.{round}.join",
        stream="PROGRESS",
        sender=CONSUMER,
        receivers=(LEADER, MONITOR),
        description="An engine wants to take part in a round.",
    ),
    Entry(
        message=RoundPlan,
        subject="{p}.{model}.round.{round}.plan",
        stream="PROGRESS",
        sender=LEADER,
        receivers=(CONSUMER, MONITOR),
        description="How every rank gets its bytes.",
    ),
    Entry(
        message=Proven,
        subject="{p}.{model}.round.{round}.proven",
        stream="PROGRESS",
        sender=CONSUMER,
        receivers=(LEADER, MONITOR),
        description="An engine holds the version, proven, and waits for `Commit`.",
    ),
    Entry(
        message=Commit,
        subject="{p}.{model}.round.{round}.commit",
        stream="PROGRESS",
        sender=LEADER,
        receivers=(CONSUMER, MONITOR),
        description="Every engine has its proof: serve the version now.",
    ),
    Entry(
        message=Abort,
        subject="{p}.{model}.round.{round}.abort",
        stream="PROGRESS",
        sender=LEADER,
        receivers=(CONSUMER, MONITOR),
        description="The groups of this epoch are broken: wait for the next plan.",
    ),
    Entry(
        message=RoundComplete,
        subject="{p}.{model}.round.{round}.done",
        stream="PROGRESS",
        sender=LEADER,
        receivers=(CONSUMER, TRAINER, MONITOR),
        description="The round is over.",
        encoding="json",
    ),
    Entry(
        message=StageComplete,
        subject="{p}.{model}.stage.{engine}.{rank}",
        stream="PROGRESS",
        sender=CONSUMER,
        receivers=(MONITOR,),
        description="A timed stage has ended. The rank is `all` for a stage of the whole engine.",
    ),
    Entry(
        message=UpdateComplete,
        subject="{p}.{model}.update.{engine}",
        stream="PROGRESS",
        sender=CONSUMER,
        receivers=(LEADER, TRAINER, MONITOR),
        description="An engine serves a version.",
        encoding="json",
    ),
    Entry(
        message=UpdateFailed,
        subject="{p}.{model}.update.{engine}",
        stream="PROGRESS",
        sender=CONSUMER,
        receivers=(LEADER, TRAINER, MONITOR),
        description="An engine did not reach a version.",
        encoding="json",
    ),
    Entry(
        message=FirstToken,
        subject="{p}.{model}.update.{engine}.first_token",
        stream="PROGRESS",
        sender=CONSUMER,
        receivers=(MONITOR,),
        description="An engine has made its first token with a version.",
        encoding="json",
    ),
    Entry(
        message=DeadLetter,
        subject="{p}.{model}.dead",
        stream="PROGRESS",
        sender=CONSUMER,
        receivers=(TRAINER, MONITOR),
        description="What could not be read, and why.",
        encoding="json",
    ),
)

MONITORED: Final = tuple(entry.message for entry in CATALOGUE if MONITOR in entry.receivers)
"""What monitors listen to."""

BUCKETS: Final = (
    BucketEntry(
        message=EngineState,
        bucket="presence",
        key="{model}.{engine}",
        sender=CONSUMER,
        receivers=(LEADER, MONITOR),
        description="Heartbeat of an engine; the key expires with it.",
    ),
    BucketEntry(
        message=RoundLease,
        bucket="rounds",
        key="{model}.{round}",
        sender=LEADER,
        receivers=(CONSUMER,),
        description="Who leads a round: whoever created the key.",
    ),
    BucketEntry(
        message=ReaderLease,
        bucket="readers",
        key="{model}.{version}.{engine}",
        sender=CONSUMER,
        receivers=(TRAINER,),
        description="Who is reading a version: its slot is not written again before the key ends.",
    ),
)

WORKER_MESSAGES: Final[tuple[type[Message], ...]] = (
    *get_args(WorkerRequest),
    *get_args(WorkerReply),
)
"""What a consumer and its engine's workers say to each other; never on the bus."""

PARAMETERS: Final = {
    "model": "A name that trainers and engines agree on.",
    "engine": "Id of an inference engine.",
    "producer": "Name of a trainer's publisher, the same on all its ranks.",
    "rank": "A rank's number; `all` for a stage of the whole engine.",
    "round": "Id of one version's way to the engines that are present.",
    "version": "Number of a version.",
}
"""What the tokens of subjects and keys stand for, and the fields of the same names."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FIELD = re.compile(r"\{(\w+)\}")

_ENTRIES: Final = {entry.message: entry for entry in CATALOGUE}
_BUCKET_ENTRIES: Final = {entry.message: entry for entry in BUCKETS}


def entry_of(message_type: type[Message]) -> Entry:
    """The catalogue's entry of a message that is published on a subject.

    Raises:
        MessageInvalid: it is not: a bucket's value, or said to a worker.
    """
    entry = _ENTRIES.get(message_type)
    if entry is None:
        limit = "must be a message with a subject"
        raise MessageInvalid("message type", "$", message_type.__name__, limit)
    return entry


def subject_of(message: Message, prefix: str) -> str:
    """Where `message` is published.

    Raises:
        MessageInvalid: the message has no subject, or a token of it is not one.
    """
    return _fill(entry_of(type(message)).subject, message, check_prefix(prefix))


def message_id_of(message: Message) -> str | None:
    """What a repeat of `message` is known by; None: two of them are two.

    Raises:
        MessageInvalid: the message has no subject, or a token of the id is not one.
    """
    template = entry_of(type(message)).message_id
    return _fill(template, message, "") if template else None


def key_of(message: Message) -> str:
    """The key whose value `message` is, in its bucket.

    Raises:
        MessageInvalid: the message belongs to no bucket, or a token of the key is not one.
    """
    entry = _BUCKET_ENTRIES.get(type(message))
    if entry is None:
        limit = "must be the value of a bucket"
        raise MessageInvalid("message type", "$", type(message).__name__, limit)
    return _fill(entry.key, message, "")


def pattern_of(
    message_type: type[Message], prefix: str, model: str | None = None, **tokens: str | int
) -> str:
    """The subject to subscribe to; `*` stands for every token that is not given.

    Raises:
        MessageInvalid: the message has no subject, or a token is not one, or not of this subject.
    """
    template = entry_of(message_type).subject
    given = {name: str(value) for name, value in tokens.items()}
    if model is not None:
        given["model"] = model
    names = _FIELD.findall(template)
    for name, token in given.items():
        if name not in names:
            limit = f"tokens of {template}: {', '.join(names)}"
            raise MessageInvalid(message_type.__name__, name, token, limit)
        check_token(name, token)
    given["p"] = check_prefix(prefix)
    return _FIELD.sub(lambda field: given.get(field[1], "*"), template)


def message_types_of(subject: str, prefix: str) -> tuple[type[Message], ...]:
    """What may be published on a subject: the `expected` of `decode`.

    Raises:
        MessageInvalid: nothing is.
    """
    found = tuple(
        entry.message
        for entry in CATALOGUE
        if _subject_regex(entry.subject, prefix).fullmatch(subject)
    )
    if not found:
        raise MessageInvalid("subject", "$", subject, "must be one of the catalogue")
    return found


def stream_subjects(stream: StreamEntry, prefix: str) -> tuple[str, ...]:
    """The subjects, with wildcards, that a stream keeps."""
    return tuple(s.replace("{p}", check_prefix(prefix)) for s in stream.subjects)


def check_token(name: str, token: str) -> str:
    """The token itself.

    Raises:
        MessageInvalid: it would change the shape of a subject.
    """
    if not _TOKEN.fullmatch(token):
        raise MessageInvalid("subject token", name, token, f"must match {_TOKEN.pattern}")
    return token


def check_prefix(prefix: str) -> str:
    """The prefix itself: the first token of every subject.

    Raises:
        MessageInvalid: it is not one token.
    """
    return check_token("prefix", prefix)


def stream_name(stream: str, prefix: str) -> str:
    """What the server calls a stream of the catalogue."""
    return f"{check_prefix(prefix)}-{stream}"


def bucket_name(bucket: str, prefix: str) -> str:
    """What the server calls a bucket of the catalogue; its stream is `KV_` and this."""
    return f"{check_prefix(prefix)}-{bucket}"


def _fill(template: str, message: Message, prefix: str) -> str:
    def token(field: re.Match[str]) -> str:
        if field[1] == "p":
            return prefix
        value = getattr(message, field[1])
        return check_token(field[1], ALL_RANKS if value is None else str(value))

    return _FIELD.sub(token, template)


@lru_cache(maxsize=256)  # every message that is read is looked for among all of them
def _subject_regex(template: str, prefix: str) -> re.Pattern[str]:
    literal = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(
        _FIELD.sub(lambda f: re.escape(prefix) if f[1] == "p" else _TOKEN.pattern, literal)
    )

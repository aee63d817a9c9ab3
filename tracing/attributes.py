"""The spans of an update, their attributes, and what these mean. Does no I/O.

`weightbus.*` are ours, with the words of the contract; `messaging.*`, `server.*` and `error.type`
follow OpenTelemetry's semantic conventions. Invariant: every attribute of every span that we begin
is in `ATTRIBUTES`, and is set on the spans that it names only; `docs/telemetry.md` is made of it.
"""

from __future__ import annotations

from typing import Final, Literal
from urllib.parse import urlsplit

from msgspec import Struct

from weightbus.schemas.catalogue import entry_of
from weightbus.schemas.checkpoint import CheckpointReady

__all__ = (
    "ATTEMPT",
    "ATTRIBUTES",
    "BLOCKED_S",
    "BUCKET",
    "BYTES",
    "CAUSE",
    "CLOCK_OFFSET",
    "CLOCK_RESIDUAL",
    "ENGINE",
    "EPOCH",
    "ERROR_TYPE",
    "LEADER",
    "MEMORY",
    "MESSAGING_BODY_SIZE",
    "MESSAGING_CLIENT_ID",
    "MESSAGING_DESTINATION_NAME",
    "MESSAGING_DESTINATION_TEMPLATE",
    "MESSAGING_MESSAGE_ID",
    "MESSAGING_OPERATION_NAME",
    "MESSAGING_OPERATION_TYPE",
    "MESSAGING_SYSTEM",
    "MODEL",
    "PRODUCER",
    "RANK",
    "RESOLUTION",
    "ROUND",
    "ROUTE",
    "SERVER_ADDRESS",
    "SERVER_PORT",
    "SLOT_BYTES",
    "SPANS",
    "STAGE",
    "VERSION",
    "WAITED_S",
    "Attribute",
    "AttributeValue",
    "Destination",
    "SpanInfo",
    "clock_attributes",
    "messaging_attributes",
    "messaging_span_name",
)

AttributeValue = str | bool | int | float
"""What a span attribute may hold."""

SpanWord = Literal[
    "publish", "update", "negotiate", "join", "plan", "fetch", "h2d", "broadcast", "reload",
    "bucket", "commit", "first token",
]  # fmt: skip
"""First word, or words, of a span's name."""

MODEL: Final = "weightbus.model"
VERSION: Final = "weightbus.version"
ROUND: Final = "weightbus.round"
ENGINE: Final = "weightbus.engine"
ATTEMPT: Final = "weightbus.attempt"
RANK: Final = "weightbus.rank"
STAGE: Final = "weightbus.stage"
ROUTE: Final = "weightbus.route"
BYTES: Final = "weightbus.bytes"
BUCKET: Final = "weightbus.bucket"
LEADER: Final = "weightbus.leader"
EPOCH: Final = "weightbus.epoch"
RESOLUTION: Final = "weightbus.first_token.resolution_ns"
CLOCK_OFFSET: Final = "weightbus.clock.offset_ns"
CLOCK_RESIDUAL: Final = "weightbus.clock.residual_ns"

PRODUCER: Final = "weightbus.producer"
BLOCKED_S: Final = "weightbus.blocked_s"
WAITED_S: Final = "weightbus.waited_s"
SLOT_BYTES: Final = "weightbus.slot_bytes"
MEMORY: Final = "weightbus.memory"
"""Of metrics: `host` or `device`."""
CAUSE: Final = "weightbus.cause"
"""Of metrics: why a version was skipped, a `SkipCause`."""

ERROR_TYPE: Final = "error.type"

MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"
MESSAGING_DESTINATION_TEMPLATE: Final = "messaging.destination.template"
MESSAGING_MESSAGE_ID: Final = "messaging.message.id"
MESSAGING_BODY_SIZE: Final = "messaging.message.body.size"
MESSAGING_CLIENT_ID: Final = "messaging.client.id"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

NATS_PORT: Final = 4222
"""Where a URL names none."""


class SpanInfo(Struct, frozen=True):
    """One kind of span."""

    name: str
    """As exported; `{...}`: what stands there differs."""
    word: SpanWord
    parent: str
    """Name of its parent; empty: none of ours."""
    kind: Literal["PRODUCER", "CONSUMER", "INTERNAL"]
    meaning: str


_STREAMED: Final = ("fetch", "h2d", "broadcast", "reload")
_SUBJECT: Final = "weightbus.{model}.checkpoint.ready"

SPANS: Final = (
    SpanInfo(
        f"publish {_SUBJECT}", "publish", "", "PRODUCER",
        "A trainer publishes a version: from `publish` until it is said, or given up.",
    ),
    SpanInfo(
        f"update {_SUBJECT}", "update", "publish", "CONSUMER",
        "One engine's attempt to take the version: from when it was heard of to the first token, "
        "or until it was served, failed or put down.",
    ),
    SpanInfo(
        "negotiate", "negotiate", "update", "INTERNAL",
        "Until a plan was in hand; once for every plan.",
    ),
    SpanInfo(
        "join", "join", "negotiate", "INTERNAL",
        "Until the engine said its first `Join`: layout, needs, lease.",
    ),
    SpanInfo(
        "plan", "plan", "negotiate", "INTERNAL",
        "From that `Join` until the plan: waiting for the other engines and the leader.",
    ),
    SpanInfo(
        "fetch", "fetch", "update", "INTERNAL",
        "One rank's bytes come from files or another host into staging.",
    ),
    SpanInfo("h2d", "h2d", "update", "INTERNAL", "One rank's bytes go from the host to its GPU."),
    SpanInfo(
        "broadcast", "broadcast", "update", "INTERNAL",
        "One rank's bytes go to the other hosts of its group, or come from them.",
    ),
    SpanInfo(
        "reload", "reload", "update", "INTERNAL", "One rank's bytes go into its parameters."
    ),
    SpanInfo(
        "bucket", "bucket", "fetch, h2d, broadcast or reload", "INTERNAL",
        "One bucket of a stage that streams, or neighbours, so that there are 32 at most.",
    ),
    SpanInfo(
        "commit", "commit", "update", "INTERNAL", "The engine is let serve the proven version."
    ),
    SpanInfo(
        "first token", "first token", "update", "INTERNAL",
        "From serving again to the first token made with the version.",
    ),
)  # fmt: skip
"""Every span of an update, in the order of the tree."""


class Attribute(Struct, frozen=True):
    """One attribute."""

    name: str
    type: Literal["string", "int", "double", "boolean"]
    spans: tuple[SpanWord, ...]
    meaning: str


_MESSAGES: Final[tuple[SpanWord, ...]] = ("publish", "update")
_ALL: Final[tuple[SpanWord, ...]] = tuple(span.word for span in SPANS)
_ENGINES: Final[tuple[SpanWord, ...]] = tuple(word for word in _ALL if word != "publish")
_STAGES: Final[tuple[SpanWord, ...]] = ("negotiate", *_STREAMED, "commit")

ATTRIBUTES: Final = (
    Attribute(MODEL, "string", _ALL, "The model that trainer and engines agree on."),
    Attribute(VERSION, "int", _ALL, "The version of its weights."),
    Attribute(PRODUCER, "string", _MESSAGES, "Who published it."),
    Attribute(ENGINE, "string", _ENGINES, "Whose update it is."),
    Attribute(
        ROUND, "string", _ENGINES,
        "The round that brought the version; of the update span the last one.",
    ),
    Attribute(
        ATTEMPT, "int", ("update",),
        "1, and one more each time that this consumer tries the version again; such a span links "
        "to the attempt before.",
    ),
    Attribute(STAGE, "string", _STAGES, "The stage; the same as the span's name."),
    Attribute(
        RANK, "int", ("publish", *_STREAMED, "bucket"),
        "The engine's rank; of a publish span the trainer's, if there are several.",
    ),
    Attribute(
        ROUTE, "string", _STREAMED, "How the bytes reach the rank: `local`, `broadcast` or `p2p`."
    ),
    Attribute(
        BYTES, "int", ("publish", *_STAGES, "bucket"),
        "Bytes published, or moved by this stage or bucket of this rank.",
    ),
    Attribute(BUCKET, "int", ("bucket",), "Its number among the stage's bucket spans, from 0."),
    Attribute(LEADER, "boolean", ("plan",), "Whether this consumer made the plan."),
    Attribute(EPOCH, "int", ("plan",), "The plan's epoch in its round; a later one replaces it."),
    Attribute(
        RESOLUTION, "int", ("first token",),
        "The token was there at most so many nanoseconds before the span's end: the engine is "
        "asked again and again.",
    ),
    Attribute(
        BLOCKED_S, "double", ("publish",),
        "Seconds for which the trainer could not go on because of the version.",
    ),
    Attribute(
        WAITED_S, "double", ("publish",), "Of these, seconds for readers of older versions."
    ),
    Attribute(
        SLOT_BYTES, "int", ("publish",),
        "Bytes that both slots of the rank take, in all kinds of memory.",
    ),
    Attribute(
        CLOCK_OFFSET, "int", _MESSAGES,
        "Nanoseconds that were added to this host's wall clock: all times are of the bus's clock.",
    ),
    Attribute(
        CLOCK_RESIDUAL, "int", _MESSAGES,
        "By how many nanoseconds times of this process may still be off; missing: the bus's clock "
        "could not be measured, and times are of this host's.",
    ),
    Attribute(
        ERROR_TYPE, "string", _ALL,
        "Class name of what ended a span that failed: `TornRead`; `Superseded` where a version "
        "was put down for another one, or the consumer was stopped.",
    ),
    Attribute(MESSAGING_SYSTEM, "string", _MESSAGES, "`nats`."),
    Attribute(MESSAGING_OPERATION_TYPE, "string", _MESSAGES, "`send`, or `process`."),
    Attribute(MESSAGING_OPERATION_NAME, "string", _MESSAGES, "`publish`, or `update`."),
    Attribute(MESSAGING_DESTINATION_NAME, "string", _MESSAGES, "Subject of `CheckpointReady`."),
    Attribute(
        MESSAGING_DESTINATION_TEMPLATE, "string", _MESSAGES,
        f"What it is of all models: `{_SUBJECT}`. Spans are named by it.",
    ),
    Attribute(
        MESSAGING_MESSAGE_ID, "string", _MESSAGES,
        "Its `Nats-Msg-Id`; of a publish span only once it was said.",
    ),
    Attribute(
        MESSAGING_BODY_SIZE, "int", ("publish",), "Bytes of the message, once it was said."
    ),
    Attribute(
        MESSAGING_CLIENT_ID, "string", _MESSAGES, "Name of the connection, as the server shows it."
    ),
    Attribute(SERVER_ADDRESS, "string", _MESSAGES, "Host of the NATS server, if there is one URL."),
    Attribute(SERVER_PORT, "int", _MESSAGES, "Its port."),
)  # fmt: skip


class Destination(Struct, frozen=True, kw_only=True):
    """Where a message goes, for whoever says or hears it."""

    subject: str
    template: str
    """Of low cardinality: the subject with `{model}` in the model's place."""
    client: str = ""
    """Name of the connection."""
    server_address: str = ""
    server_port: int = 0

    @classmethod
    def of_ready(cls, prefix: str, model: str, *, client: str, url: str) -> Destination:
        """Of `CheckpointReady` on the bus at `url`; of several servers none is named."""
        template = entry_of(CheckpointReady).subject.replace("{p}", prefix)
        server = urlsplit(url if "://" in url else f"nats://{url}")
        known = bool(server.hostname) and "," not in url
        return cls(
            subject=template.replace("{model}", model),
            template=template,
            client=client,
            server_address=server.hostname or "" if known else "",
            server_port=server.port or NATS_PORT if known else 0,
        )


def messaging_span_name(operation: str, destination: str) -> str:
    """The convention's `{operation} {destination}`, the destination being a template.

    >>> messaging_span_name("publish", "weightbus.{model}.checkpoint.ready")
    'publish weightbus.{model}.checkpoint.ready'
    """
    return f"{operation} {destination}"


def messaging_attributes(
    operation_type: str, operation: str, destination: Destination, message_id: str = ""
) -> dict[str, AttributeValue]:
    """The convention's attributes of one message; `operation_type` is `send` or `process`."""
    attributes: dict[str, AttributeValue] = {
        MESSAGING_SYSTEM: "nats",
        MESSAGING_OPERATION_TYPE: operation_type,
        MESSAGING_OPERATION_NAME: operation,
        MESSAGING_DESTINATION_NAME: destination.subject,
        MESSAGING_DESTINATION_TEMPLATE: destination.template,
    }
    if message_id:
        attributes[MESSAGING_MESSAGE_ID] = message_id
    if destination.client:
        attributes[MESSAGING_CLIENT_ID] = destination.client
    if destination.server_address:
        attributes[SERVER_ADDRESS] = destination.server_address
        attributes[SERVER_PORT] = destination.server_port
    return attributes


def clock_attributes(offset_ns: int, residual_ns: int | None) -> dict[str, AttributeValue]:
    """What a span says of the clock that it goes by.

    Args:
        offset_ns: what was added to this host's wall clock.
        residual_ns: by how much its times may still be off; None: not known.
    """
    attributes: dict[str, AttributeValue] = {CLOCK_OFFSET: offset_ns}
    return attributes if residual_ns is None else {**attributes, CLOCK_RESIDUAL: residual_ns}

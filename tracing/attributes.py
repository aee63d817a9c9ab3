"""The names of span attributes and of the spans that carry messages. Does no I/O.

`weightbus.*` are ours, with the words of the contract; `messaging.*` and `error.type` follow
OpenTelemetry's semantic conventions (a messaging span is named by its operation and destination).
"""

from __future__ import annotations

from typing import Final

__all__ = (
    "BLOCKED_S",
    "BYTES",
    "CAUSE",
    "ENGINE",
    "ERROR_TYPE",
    "MEMORY",
    "MESSAGING_DESTINATION_NAME",
    "MESSAGING_OPERATION_NAME",
    "MESSAGING_OPERATION_TYPE",
    "MESSAGING_SYSTEM",
    "MODEL",
    "PRODUCER",
    "RANK",
    "ROUND",
    "ROUTE",
    "SLOT_BYTES",
    "STAGE",
    "VERSION",
    "WAITED_S",
    "AttributeValue",
    "messaging_attributes",
    "messaging_span_name",
)

AttributeValue = str | bool | int | float
"""What a span attribute may hold."""

MODEL: Final = "weightbus.model"
VERSION: Final = "weightbus.version"
ROUND: Final = "weightbus.round"
ENGINE: Final = "weightbus.engine"
RANK: Final = "weightbus.rank"
STAGE: Final = "weightbus.stage"
ROUTE: Final = "weightbus.route"
BYTES: Final = "weightbus.bytes"

PRODUCER: Final = "weightbus.producer"
BLOCKED_S: Final = "weightbus.blocked_s"
"""How long the trainer could not go on because of a version."""
WAITED_S: Final = "weightbus.waited_s"
"""For readers of older versions, as part of that."""
SLOT_BYTES: Final = "weightbus.slot_bytes"
"""What both slots of a rank take, in all kinds of memory."""
MEMORY: Final = "weightbus.memory"
"""`host` or `device`."""
CAUSE: Final = "weightbus.cause"
"""Why a version was skipped: a `SkipCause`."""

ERROR_TYPE: Final = "error.type"
"""Class name of what ended a span that failed."""

MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"


def messaging_span_name(operation: str, subject: str) -> str:
    """`publish weightbus.m.checkpoint.ready`: the convention's `{operation} {destination}`."""
    return f"{operation} {subject}"


def messaging_attributes(operation_type: str, operation: str, subject: str) -> dict[str, str]:
    """The convention's attributes of one message; `operation_type` is `send` or `process`."""
    return {
        MESSAGING_SYSTEM: "nats",
        MESSAGING_OPERATION_TYPE: operation_type,
        MESSAGING_OPERATION_NAME: operation,
        MESSAGING_DESTINATION_NAME: subject,
    }

"""The names of span attributes and of the spans that carry messages. Does no I/O.

`weightbus.*` are ours, with the words of the contract; `messaging.*` and `error.type` follow
OpenTelemetry's semantic conventions (a messaging span is named by its operation and destination).
"""

from __future__ import annotations

from typing import Final

__all__ = (
    "BYTES",
    "ENGINE",
    "ERROR_TYPE",
    "MESSAGING_DESTINATION_NAME",
    "MESSAGING_OPERATION_NAME",
    "MESSAGING_OPERATION_TYPE",
    "MESSAGING_SYSTEM",
    "MODEL",
    "RANK",
    "ROUND",
    "ROUTE",
    "STAGE",
    "VERSION",
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

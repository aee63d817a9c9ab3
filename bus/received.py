"""What readers of the bus get: messages, and marks that some were missed. Does no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import message_types_of, subject_of
from weightbus.schemas.codec import decode
from weightbus.schemas.errors import MessageInvalid

__all__ = (
    "HEADER_CONTENT_TYPE",
    "CaughtUp",
    "Missed",
    "Received",
    "Reconnected",
    "content_type_of",
    "model_of",
    "read",
)

HEADER_CONTENT_TYPE = "Content-Type"

M_co = TypeVar("M_co", bound=Message, covariant=True)


@dataclass(frozen=True, slots=True)
class Received(Generic[M_co]):
    """A message and how it came."""

    message: M_co
    subject: str
    headers: Mapping[str, str]
    received_ns: int
    """Bus time: when it came in; for history, when the server stored it."""


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The connection was lost and is back. What was published meanwhile comes next if this is a
    monitor, and not at all if it is a subscription."""


@dataclass(frozen=True, slots=True)
class Missed:
    """Something that was asked for is no longer kept, or may have been dropped before it was read.

    It stands where the gap is: what the stream still holds comes after it.
    """

    stream: str
    """Name in the catalogue: `CHECKPOINTS` or `PROGRESS`."""
    at_most: int | None
    """How many messages were dropped there, of all kinds and models: of those that were asked for
    no more than that, and maybe none. None: not known."""


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Said once: the history that was asked for, and the engines that were there when the monitor
    was opened, have come. What follows is news."""


def read(
    subject: str, headers: Mapping[str, str], payload: bytes, received_ns: int, prefix: str
) -> Received[Message]:
    """The message that came on a subject of the catalogue.

    Raises:
        MessageInvalid: it cannot be read, or belongs on another subject.
    """
    message = decode(payload, content_type_of(headers), message_types_of(subject, prefix))
    home = subject_of(message, prefix)
    if home != subject:
        raise MessageInvalid(type(message).__name__, "$", f"on {subject}", f"belongs on {home}")
    return Received(message, subject, headers, received_ns)


def content_type_of(headers: Mapping[str, str]) -> str:
    """The header's value, whatever the case of its name; "" if there is none."""
    name = HEADER_CONTENT_TYPE.lower()
    return next((value for key, value in headers.items() if key.lower() == name), "")


def model_of(subject: str, prefix: str) -> str:
    """The model's token of a subject below the prefix."""
    return subject.removeprefix(f"{prefix}.").partition(".")[0]

"""The root of every error that Weight bus raises, and the one error of the schemas.

Does no I/O. Every other folder derives its errors from `WeightBusError` in its own `errors.py`.
"""

from __future__ import annotations

from reprlib import Repr

__all__ = ("MessageInvalid", "WeightBusError")

VALUE_CHARS = 200
LIMIT_CHARS = 400
FIELD_CHARS = 400


class WeightBusError(Exception):
    """Base of every error raised by Weight bus."""


class MessageInvalid(WeightBusError):
    """A message, layout or name broke the contract: what the peer sent, or what we were about to.

    Raised by every decoder and checker of `weightbus.schemas`, and nothing else is. Its texts are
    short and printable, whatever was found, so that they fit a terminal and a `DeadLetter`.
    """

    kind: str
    """What was read: a message type (`CheckpointReady`) or a thing (`layout`, `subject token`)."""
    field: str
    """Path of the field at fault, such as `placement[0].path`; `$` for the whole."""
    value: str
    """The value found there, shortened to at most 200 characters."""
    limit: str
    """The rule or limit it broke."""

    def __init__(self, kind: str, field: str, value: object, limit: str) -> None:
        self.kind = _shorten(kind, FIELD_CHARS)
        self.field = _shorten(field, FIELD_CHARS)
        self.value = _shorten(value if isinstance(value, str) else _describe(value), VALUE_CHARS)
        self.limit = _shorten(limit, LIMIT_CHARS)
        super().__init__(f"{self.kind}: {self.field} is {self.value}: {self.limit}")


def _describe(value: object) -> str:
    """`repr` without its cost for large values: nested containers are cut, not walked."""
    if isinstance(value, int) and value.bit_length() > 8 * VALUE_CHARS:
        return f"an integer of {value.bit_length()} bits"
    return _REPR.repr(value)


def _shorten(text: str, chars: int) -> str:
    short = text if len(text) <= chars else text[: chars - 3] + "..."
    if short.isprintable():
        return short
    escaped = ascii(short)[1:-1]
    return escaped if len(escaped) <= chars else escaped[: chars - 3] + "..."


_REPR = Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = VALUE_CHARS
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8

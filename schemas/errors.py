"""The root of every error that Weight bus raises, and the one error of the schemas.

Does no I/O. Every other folder derives its errors from `WeightBusError` in an `errors.py` of its own.
"""

from __future__ import annotations

__all__ = ("MessageInvalid", "WeightBusError")


class WeightBusError(Exception):
    """Base of every error raised by Weight bus."""


class MessageInvalid(WeightBusError):
    """A message, layout or name broke the contract: what the peer sent, or what we were about to.

    Raised by every decoder and checker of `weightbus.schemas`, and nothing else is.
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
        self.kind = kind
        self.field = field
        text = value if isinstance(value, str) else repr(value)
        self.value = text if len(text) <= 200 else text[:197] + "..."
        self.limit = limit
        super().__init__(f"{kind}: {field} is {self.value}: {limit}")

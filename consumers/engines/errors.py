"""Errors of engines as seen by those who send them requests. Does no I/O."""

from __future__ import annotations

from weightbus.consumers.errors import ConsumerError

__all__ = ("RequestFailed", "RequestRefused")


class RequestRefused(ConsumerError):
    """A request that cannot be answered as it is, or one more than the engine takes."""

    def __init__(self, thing: str, value: object, limit: str) -> None:
        self.thing, self.value, self.limit = thing, value, limit
        text = str(value)
        super().__init__(f"{thing} is {text if len(text) <= 200 else text[:197] + '...'}: {limit}")


class RequestFailed(ConsumerError):
    """The engine answered that it did not carry a request out; `cause` is its error's class."""

    def __init__(self, cause: str, reason: str) -> None:
        self.cause, self.reason = cause, reason
        super().__init__(f"{cause}: {reason}")

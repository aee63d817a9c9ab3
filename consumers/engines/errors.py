"""Errors of engines as seen by those who send them requests, or turns. Does no I/O."""

from __future__ import annotations

from weightbus.consumers.errors import ConsumerError

__all__ = ("DraftUnknown", "EngineAsleep", "RequestFailed", "RequestRefused", "TurnMissed")


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


class TurnMissed(ConsumerError):
    """A worker did not carry out the request that its turn was for."""

    def __init__(self, number: int, reason: str) -> None:
        self.number, self.reason = number, reason
        super().__init__(f"request {number} was not carried out: {reason}")


class EngineAsleep(ConsumerError):
    """The engine's parameters are not in the memory of its device: wake it first."""

    def __init__(self, request: str) -> None:
        self.request = request
        super().__init__(f"{request} is refused: the engine sleeps, its parameters are not there")


class DraftUnknown(ConsumerError):
    """A worker does not know the drafter that its checkpoint makes beside the model."""

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(f"the drafter of {model} has not been shown to this worker yet")

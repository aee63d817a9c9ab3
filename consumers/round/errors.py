"""What goes wrong with a round machine itself, and what it refuses. Does no I/O."""

from __future__ import annotations

from weightbus.consumers.errors import ConsumerError

__all__ = ("UnexpectedEvent", "VersionNotNew")


class UnexpectedEvent(ConsumerError):
    """The driver fed an event that cannot happen in this phase: one of the two has a defect."""

    def __init__(self, phase: str, event: str) -> None:
        self.phase, self.event = phase, event
        super().__init__(f"event {event} cannot happen in phase {phase}")


class VersionNotNew(ConsumerError):
    """A version was published that is older than what the engine serves: it never goes back."""

    def __init__(self, version: int, served_version: int) -> None:
        self.version, self.served_version = version, served_version
        super().__init__(
            f"version {version} is older than version {served_version}, which is served"
        )

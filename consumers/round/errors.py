"""What goes wrong with a round machine itself. Does no I/O."""

from __future__ import annotations

from weightbus.consumers.errors import ConsumerError

__all__ = ("UnexpectedEvent",)


class UnexpectedEvent(ConsumerError):
    """The driver fed an event that cannot happen in this phase: one of the two has a defect."""

    def __init__(self, phase: str, event: str) -> None:
        self.phase, self.event = phase, event
        super().__init__(f"event {event} cannot happen in phase {phase}")

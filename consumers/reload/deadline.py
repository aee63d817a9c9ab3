"""The budget of one request, looked at between its steps. Reads the monotonic clock."""

from __future__ import annotations

import time

from weightbus.consumers.errors import DeadlineExceeded

__all__ = ("Deadline",)


class Deadline:
    """Runs from its creation for `budget_s` seconds."""

    def __init__(self, stage: str, budget_s: float) -> None:
        self._stage, self._budget_s = stage, budget_s
        self._end = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        """Seconds; 0: nothing is left."""
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raises `DeadlineExceeded` if the budget is used up."""
        if time.monotonic() >= self._end:
            raise DeadlineExceeded(self._stage, self._budget_s)

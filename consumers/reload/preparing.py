"""What takes long of an update, done beside the serving: one piece of work at a time, on a thread.

Owns the thread. Who begins a piece of work hands over what it uses until `finish` has returned: it
is looked at by nobody else meanwhile. A failure stops nothing: it is logged and told, and whoever
needs what was to be prepared does it himself, or fails with the error.

Invariants: at most one piece of work is under way; when `finish` has returned, none is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from weightbus.consumers.reload.deadline import Deadline

__all__ = ("PrepareBudget", "Preparing", "Progress")

AT_ONCE_S: Final = 2e-3
"""So long is waited for a piece of work that was just begun: most have little to do, and whoever
asks need not ask twice."""

_logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Of one piece of work."""

    ready: bool
    reason: str = ""
    """Why it failed; empty: it did not, or is not ready."""


class _Stopped(Exception):
    """Nobody waits for the work any more."""


class PrepareBudget(Deadline):
    """What a piece of work may take; it can be stopped before."""

    def __init__(self, budget_s: float) -> None:
        super().__init__("prepare", budget_s)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """`check` raises from now on. Callable from any thread."""
        self._stopped.set()

    def check(self) -> None:
        """
        Raises:
            _Stopped: to be let through.
            DeadlineExceeded: the budget is used up.
        """
        if self._stopped.is_set():
            raise _Stopped("it was stopped")
        super().check()


class _Job:
    """One piece of work and its thread."""

    def __init__(self, key: object, work: Callable[[PrepareBudget], None], budget_s: float) -> None:
        self.key, self.budget, self.reason = key, PrepareBudget(budget_s), ""
        self._work = work
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightbus-prepare", daemon=True)
        self._thread.start()

    def is_done(self, wait_s: float = 0.0) -> bool:
        return self._done.wait(wait_s)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work(self.budget)
        except _Stopped as error:
            self.reason = str(error)
        except Exception as error:  # noqa: BLE001 - told by `ask`
            self.reason = f"{type(error).__name__}: {error}"
            _logger.warning("not prepared: %s", self.reason)
        finally:
            self._done.set()


class Preparing:
    """Not for several threads: one thread asks and finishes, the work runs on another."""

    def __init__(self) -> None:
        self._job: _Job | None = None

    def ask(self, key: object, work: Callable[[PrepareBudget], None], budget_s: float) -> Progress:
        """Begin a piece of work unless it has been begun, and say whether it is done.

        Waits for no longer than `AT_ONCE_S`. While another piece is under way, that is told to
        stop, and this one is begun when it is asked for again.

        Args:
            key: of the work; equal: it is the same.
            work: looks at the budget between its steps, and ends with what it raises.
        """
        job = self._job
        if job is not None and job.key != key:
            if not job.is_done():
                job.budget.stop()
                return Progress(ready=False)
            job = None
        if job is None:
            job = self._job = _Job(key, work, budget_s)
            job.is_done(AT_ONCE_S)
        return Progress(True, job.reason) if job.is_done() else Progress(ready=False)

    def finish(self, key: object = None) -> None:
        """Return when nothing is under way; what is of another key is told to stop."""
        job, self._job = self._job, None
        if job is None:
            return
        if job.key != key:
            job.budget.stop()
        job.join()

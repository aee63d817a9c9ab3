"""A trainer that SIGTERM ends says first which version does not come.

torchrun sends SIGTERM to the other ranks once one has died, and SIGKILL half a minute later. A rank
that says nothing until then counts as missing, but it may be deep in a collective, where no handler
of Python's runs: so a thread is told of the signal, too.
Owns, while an `Ending` is open, the process's handler of SIGTERM, its wakeup descriptor and that
thread. Invariants: nothing is taken that somebody else has taken before; children that the trainer
forks end by SIGTERM as ever, and it hears nothing of that.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

from weightbus.producers.errors import PublisherClosed

__all__ = ("Ending",)

_logger = logging.getLogger(__name__)

COLLECTIVE_ENDS_S = 2.0
"""After SIGTERM, by itself; else the process is ended."""
TOLD_S = 8.0
"""For the bus to be told; `Publisher.give_up` takes at most 6 s."""
EXIT_CODE = 128 + signal.SIGTERM
REASON = "SIGTERM came: another rank has ended, or the launcher has"


class Ends(Protocol):
    """What this module needs of a `BlockingPublisher`."""

    def give_up(self, version: int, reason: str) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Ending:
    """SIGTERM gives up the coming version, and raises `SystemExit` in the main thread.

    Where that thread does not come to run it within 2 s, the publisher is ended, and the process.
    Does nothing where SIGTERM has a handler already, or signals have a wakeup descriptor, or this
    is not the main thread: then call `give_up` from what is told of the signal there. Close it
    before the publisher.
    """

    coming: int
    """The version to be published next: the caller's to keep, the same on every rank."""

    def __init__(self, publisher: Ends, coming: int = 0) -> None:
        self._publisher, self.coming = publisher, coming
        self._signals = _Signals.joined(self)

    def give_up(self, reason: str) -> None:
        """Nothing if `publish` was called with that version: it has said so itself.

        Raises:
            What `Publisher.give_up` raises, but `PublisherClosed`.
        """
        with suppress(PublisherClosed):
            self._publisher.give_up(self.coming, reason)

    def close(self) -> None:
        """Wait until the bus was told, if SIGTERM came; else leave the signal as it was."""
        if self._signals is not None:
            self._signals.leave(self)
            self._signals = None

    def end(self) -> None:
        """The publisher, at once: its main thread does not come to do so."""
        self._publisher.__exit__(SystemExit, SystemExit(EXIT_CODE), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Signals:
    """The process's: what is taken for the first `Ending` and given back after the last."""

    _taken: _Signals | None = None
    _survives_forks = False
    _forking = threading.local()
    """Of the thread that forks: `holds_back`, whether the signal is held back for that."""

    def __init__(self) -> None:
        self._endings: list[Ending] = []
        self._has_handled, self._has_told = threading.Event(), threading.Event()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)

    @classmethod
    def joined(cls, ending: Ending) -> _Signals | None:
        """What tells `ending`; None: SIGTERM is another's."""
        signals = cls._taken or cls()
        if signals is not cls._taken:
            if not signals._take():
                return None
            cls._taken = signals
        signals._endings.append(ending)
        return signals

    def leave(self, ending: Ending) -> None:
        self._wait_until_told()
        self._endings.remove(ending)
        is_main = threading.current_thread() is threading.main_thread()
        if self._endings or self._has_handled.is_set() or not is_main:
            return
        type(self)._taken = None
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = signal.set_wakeup_fd(-1)
        if descriptor != self._waker.fileno():  # another's, meanwhile
            signal.set_wakeup_fd(descriptor)
        atexit.unregister(self._wait_until_told)
        self._waker.close()

    def _take(self) -> bool:
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            _logger.debug("SIGTERM is left as it is: it has a handler, or this is another thread")
            return False
        before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            _logger.debug("SIGTERM is left as it is: signals wake something else already")
            return False
        signal.signal(signal.SIGTERM, self._handle)
        if not _Signals._survives_forks:
            os.register_at_fork(
                before=_Signals._hold_back,
                after_in_child=_Signals._leave_child_alone,
                after_in_parent=_Signals._let_through,
            )
            _Signals._survives_forks = True
        atexit.register(self._wait_until_told)  # before what the publisher has registered
        threading.Thread(target=self._watch, name="weightbus-sigterm", daemon=True).start()
        return True

    @classmethod
    def _hold_back(cls) -> None:
        """Before a fork, so that the child has its parent's handler at no time that counts. There
        is no taking back of what is called then: without an `Ending` it does nothing."""
        if cls._taken is not None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            cls._forking.holds_back = signal.SIGTERM not in before

    @classmethod
    def _let_through(cls) -> None:
        """After it; not what the trainer itself holds back."""
        if getattr(cls._forking, "holds_back", False):
            cls._forking.holds_back = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    @classmethod
    def _leave_child_alone(cls) -> None:
        """The descriptor is the parent's, too: a child that is ended would end its parent."""
        if cls._taken is not None:
            cls._taken = None
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        cls._let_through()

    def _handle(self, number: int, frame: object) -> None:
        if not self._endings:  # closed in another thread, which cannot give the signal back
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._has_handled.set()
        signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # another may have taken the descriptor since
            self._waker.send(bytes([number]))
        raise SystemExit(EXIT_CODE)

    def _watch(self) -> None:
        while (number := self._woken.recv(1)) != bytes([signal.SIGTERM]):
            if not number:
                self._woken.close()
                return
        endings = tuple(self._endings)
        for ending in endings:
            try:
                ending.give_up(REASON)
            except Exception:
                _logger.exception("the bus was not told that version %d is given up", ending.coming)
        self._has_told.set()
        if endings and not self._has_handled.wait(COLLECTIVE_ENDS_S):
            for ending in endings:
                ending.end()
            os._exit(EXIT_CODE)

    def _wait_until_told(self) -> None:
        if self._has_handled.is_set():
            self._has_told.wait(TOLD_S)

"""Runs a command so that it dies with its owner, even when the owner is killed with SIGKILL.

    owner --(pipe: guard's stdin)--> guard --(PR_SET_PDEATHSIG)--> command

The owner starts `guarded_command(argv)` in a session of its own with `stdin=PIPE` and keeps the
pipe's writing end; nothing is ever written to it. Whatever ends the owner closes that end. The
guard then stops the command: SIGTERM to its process group, after `STOP_GRACE_S` SIGKILL. Closing
the pipe is also the owner's way to stop the command in order. If the guard itself is killed, the
kernel kills the command.

- The command runs in a process group of its own, with /dev/null as stdin and the guard's stdout and
  stderr. Inheritable descriptors of the guard are the command's too.
- The guard ends with the command's exit status (128 + signal number if a signal ended it), after
  everything left in the command's process group was killed.
- Death of the parent *thread* is what PDEATHSIG reports, and owners have threads that end; the
  guard has one thread only. That is why the command is the guard's child and not the owner's.
- A process that the owner forks without exec keeps the pipe open, so the guard also looks once per
  second whether its parent is still the same.

This file also runs as a script, in an interpreter that sees nothing but the standard library, so
that it starts in milliseconds: it must not import the rest of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

__all__ = ("STOP_GRACE_S", "guarded_command")

STOP_GRACE_S = 5.0
"""How long the command may take to end after SIGTERM."""

_PARENT_CHECK_S = 1.0
_EXIT_POLL_S = 0.01
_PR_SET_PDEATHSIG = 1
_EXIT_NOT_STARTED = 127
_USAGE = "usage: guard.py COMMAND [ARGUMENT...]"


def guarded_command(argv: Sequence[str]) -> list[str]:
    """The command line of a guard that runs `argv`.

    Start it with `stdin=PIPE` and `start_new_session=True`; hold the pipe for as long as the
    command shall live. `argv[0]` is searched in PATH.
    """
    return [sys.executable, "-I", "-S", __file__, *argv]


def main(argv: list[str]) -> int:
    if not argv:
        print(_USAGE, file=sys.stderr)  # noqa: T201
        return 2
    owner = os.getppid()
    waker, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, _wake_only)
    child = _start(argv)
    stopping = _wait_for_reason_to_stop(child, waker, owner)
    return _stop(child) if stopping else _reap(child)


def _wake_only(number: int, frame: object) -> None:
    """Signals act through the wakeup descriptor; without a handler they would end the guard."""


def _start(argv: list[str]) -> int:
    """Fork and exec; safe, because this process has one thread."""
    guard = os.getpid()
    child = os.fork()
    if child:
        # Both sides set the group: whichever runs first, it is set before anyone relies on it.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(_EXIT_NOT_STARTED)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        signal.signal(
            signal.SIGPIPE, signal.SIG_DFL
        )  # Python ignores it, and exec would pass that on
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(_EXIT_NOT_STARTED)


def _wait_for_reason_to_stop(child: int, waker: int, owner: int) -> bool:
    """True: the owner is gone or wants the command stopped. False: the command has ended."""
    poller = select.poll()
    poller.register(0, select.POLLIN | select.POLLHUP)
    poller.register(waker, select.POLLIN)
    while True:
        ready = dict(poller.poll(_PARENT_CHECK_S * 1000))
        if _has_ended(child):
            return False
        if waker in ready:
            received = os.read(waker, 64)
            if any(number != signal.SIGCHLD for number in received):
                return True
        if (0 in ready and not os.read(0, 4096)) or os.getppid() != owner:
            return True


def _has_ended(child: int) -> bool:
    """Leaves the ended child unreaped, so that its process group's number stays its own."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _stop(child: int) -> int:
    os.killpg(child, signal.SIGTERM)
    deadline = time.monotonic() + STOP_GRACE_S
    while not _has_ended(child) and time.monotonic() < deadline:
        time.sleep(_EXIT_POLL_S)
    return _reap(child)


def _reap(child: int) -> int:
    """Kills what is left of the group, and returns the child's exit status as a shell gives it."""
    os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

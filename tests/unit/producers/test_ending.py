"""`Ending` in processes of its own: SIGTERM where Python runs, where it does not, and elsewhere."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

END_S = 60.0
PREAMBLE = """
import os, signal, sys, threading, time
from weightbus.producers.ending import Ending

class Publisher:
    def give_up(self, version, reason):
        print("gives up", version, flush=True)
    def __exit__(self, kind, error, traceback):
        print("ends by", kind.__name__, flush=True)

def terminate(number=None):
    os.kill(number or os.getpid(), signal.SIGTERM)

def wait():
    while True:
        signal.pause()
"""


def run(program: str) -> tuple[int, list[str]]:
    """Its exit status, and the lines that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=END_S,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("end", ["with Ending(Publisher(), 7):", "if Ending(Publisher(), 7):"])
def test_version_is_given_up_before_the_process_ends_when_the_main_thread_runs(end: str) -> None:
    code, printed = run(f"{end}\n    terminate()\n    wait()\n")
    assert (code, printed) == (128 + signal.SIGTERM, ["gives up 7"])


def test_publisher_is_ended_when_the_main_thread_does_not_come_to_run_the_handler() -> None:
    code, printed = run(
        """
        import ctypes
        ending = Ending(Publisher())
        ending.coming = 3
        mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex)
        main, line = threading.get_ident(), sys._getframe().f_lineno

        def terminate_there():
            while sys._current_frames()[main].f_lineno != line + 8:
                time.sleep(0)
            terminate()

        threading.Thread(target=terminate_there).start()
        lock(mutex)  # 8 lines down; no signal ends that
        """
    )
    assert (code, printed) == (128 + signal.SIGTERM, ["gives up 3", "ends by SystemExit"])


def test_both_versions_are_given_up_when_a_process_has_two_publishers() -> None:
    code, printed = run(
        """
        with Ending(Publisher(), 1), Ending(Publisher(), 2):
            terminate()
            wait()
        """
    )
    assert (code, printed) == (128 + signal.SIGTERM, ["gives up 1", "gives up 2"])


def test_signal_is_as_before_once_all_are_closed() -> None:
    code, printed = run(
        """
        with Ending(Publisher()), Ending(Publisher()):
            pass
        with Ending(Publisher()):
            pass
        assert signal.set_wakeup_fd(-1) == -1
        terminate()
        wait()
        """
    )
    assert (code, printed) == (-signal.SIGTERM, [])


def test_signal_ends_the_process_as_ever_when_the_last_was_closed_in_another_thread() -> None:
    code, printed = run(
        """
        ending = Ending(Publisher())
        closing = threading.Thread(target=ending.close)
        closing.start()
        closing.join()
        terminate()
        wait()
        """
    )
    assert (code, printed) == (-signal.SIGTERM, [])


def test_child_of_a_fork_ends_by_sigterm_and_its_parent_goes_on() -> None:
    code, printed = run(
        """
        with Ending(Publisher()):
            child = os.fork()
            if child == 0:
                wait()
            terminate(child)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            print([thread.name for thread in threading.enumerate()])
        """
    )
    assert (code, printed) == (0, ["-15", "['MainThread', 'weightbus-sigterm']"])


def test_forks_leave_the_signal_blocked_when_the_trainer_has_blocked_it() -> None:
    code, printed = run(
        """
        def is_blocked():
            return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())

        def fork():
            child = os.fork()
            if child == 0:
                os._exit(is_blocked())
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, is_blocked()

        with Ending(Publisher()):
            print(*fork())
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            print(*fork())
        print(*fork())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        print(*fork())
        """
    )
    assert (code, printed) == (0, ["False False", "True True", "True True", "False False"])


@pytest.mark.parametrize(
    "taken",
    [
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))",
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); signal.set_wakeup_fd(wake)",
    ],
)
def test_signal_is_left_to_the_trainer_when_it_handles_it(taken: str) -> None:
    code, printed = run(
        f"""
        woken, wake = os.pipe2(os.O_NONBLOCK)
        {taken}
        with Ending(Publisher()):
            terminate()
            wait()
        """
    )
    assert (code, printed) == (9, [])


def test_wakeup_descriptor_is_left_to_the_trainer_when_it_has_one() -> None:
    code, printed = run(
        """
        woken, wake = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(wake)
        with Ending(Publisher()):
            assert signal.set_wakeup_fd(wake) == wake
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        """
    )
    assert (code, printed) == (0, [])

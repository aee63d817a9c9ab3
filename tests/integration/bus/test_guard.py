"""The guard with real processes: nothing outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bus.processes import assert_ends, is_running
from weightbus.bus.guard import STOP_GRACE_S, guarded_command

pytestmark = pytest.mark.faults

OWNER = """
import os, subprocess, sys, time
from weightbus.bus.guard import guarded_command
guard = subprocess.Popen(
    guarded_command(["sh", "-c", "echo $$; exec sleep 600"]),
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
)
print(guard.pid, int(guard.stdout.readline()), flush=True)
if "fork" in sys.argv and os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        guarded_command(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def close_pipe(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    guard.stdin.close()


def read_number(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def read_pids(owner: subprocess.Popen[bytes]) -> tuple[int, int]:
    assert owner.stdout is not None
    guard, child = map(int, owner.stdout.readline().split())
    return guard, child


def test_command_ends_when_its_owner_is_killed(owner: subprocess.Popen[bytes]) -> None:
    guard, child = read_pids(owner)
    assert is_running(child)
    os.kill(owner.pid, signal.SIGKILL)
    assert_ends(child)
    assert_ends(guard)


def test_command_ends_when_the_guard_is_killed(owner: subprocess.Popen[bytes]) -> None:
    guard, child = read_pids(owner)
    os.kill(guard, signal.SIGKILL)
    assert_ends(child)


def test_command_ends_when_a_fork_of_the_killed_owner_holds_the_pipe() -> None:
    arguments = [sys.executable, "-c", OWNER, "fork"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as owner:
        guard, child = read_pids(owner)
        fork = read_number(owner)
        os.kill(owner.pid, signal.SIGKILL)
        assert_ends(child)
        assert_ends(guard)
        assert is_running(fork)
        os.kill(fork, signal.SIGKILL)


def test_command_is_asked_to_stop_when_the_pipe_is_closed(tmp_path: Path) -> None:
    note = tmp_path / "note"
    script = f"trap 'echo asked > {note}; exit 3' TERM; echo 1; while :; do sleep 0.1; done"
    with start("sh", "-c", script) as guard:
        read_number(guard)
        close_pipe(guard)
        assert guard.wait() == 3
    assert note.read_text() == "asked\n"


def test_command_is_killed_when_it_does_not_stop() -> None:
    began = time.monotonic()
    with start("sh", "-c", "trap '' TERM; echo $$; while :; do sleep 0.1; done") as guard:
        child = read_number(guard)
        close_pipe(guard)
        assert guard.wait() == 128 + signal.SIGKILL
    assert time.monotonic() - began >= STOP_GRACE_S
    assert not is_running(child)


def test_guard_stops_the_command_when_it_is_asked_to_stop_itself() -> None:
    with start("sh", "-c", "echo $$; exec sleep 600") as guard:
        child = read_number(guard)
        guard.terminate()
        assert guard.wait() == 128 + signal.SIGTERM
    assert not is_running(child)


def test_rest_of_the_group_ends_when_the_command_has_ended() -> None:
    with start("sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!; exit 5") as guard:
        grandchild = read_number(guard)
        assert guard.wait() == 5
    assert_ends(grandchild)


def test_guard_says_so_when_the_command_does_not_exist() -> None:
    with start("no-such-program") as guard:
        _, complaint = guard.communicate()
    assert guard.returncode == 127
    assert complaint == b"no-such-program: No such file or directory\n"


def test_command_is_not_interrupted_when_the_terminal_interrupts_its_owner() -> None:
    with start("sh", "-c", "echo $$; exec sleep 600") as guard:
        child = read_number(guard)
        assert os.getsid(child) == os.getsid(guard.pid) != os.getsid(0)
        assert os.getpgid(child) == child
        close_pipe(guard)

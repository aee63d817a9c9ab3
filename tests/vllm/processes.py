"""Processes of vLLM, each in a process group of its own, and killed for sure.

Owns each process while its context is open: at its end everything in its group gets SIGTERM, and
what is left SIGKILL; then what vLLM leaves in /dev/shm and its sockets, where it was killed, are
removed: those of this group alone. What it printed is in its log, which is shown when something
failed.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import msgspec

__all__ = ("END_S", "START_S", "LineProcess", "environment", "group_is_gone", "running_group")

ROOT: Final = Path(__file__).parents[2]
START_S: Final = 600.0
"""How long a vLLM may take to start; machines that run tests are slow."""
END_S: Final = 30.0
"""How long one may take to end in order."""
POLL_S: Final = 0.05
LOG_LINES: Final = 300
SHM: Final = Path("/dev/shm")
BLOCKS: Final = ("psm_", "vllm_dist_")
"""How names begin of what vLLM shares among its processes."""


def environment(**more: str) -> dict[str, str]:
    """For a vLLM on CPUs: little memory, no network, one thread for every rank, on any core."""
    own = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),  # where the probe is
        "PYTHONUNBUFFERED": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**os.environ, **own, **more}


@contextmanager
def running_group(
    argv: Sequence[str], log: Path, env: Mapping[str, str], *, lines: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own; with `lines` its stdin and stdout are pipes."""
    with TemporaryDirectory(prefix="wb-") as sockets:
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={**env, "VLLM_RPC_BASE_PATH": sockets},
                stdin=subprocess.PIPE if lines else subprocess.DEVNULL,
                stdout=subprocess.PIPE if lines else output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield process
        except BaseException:
            _show(log)
            raise
        finally:
            blocks = shared_blocks(process.pid)
            _end(process)
            for block in blocks:
                block.unlink(missing_ok=True)


class LineProcess:
    """A process that answers each line on its stdin by one on its stdout, in JSON. Blocking."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, question: Mapping[str, Any], deadline_s: float) -> Any:
        """Its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(question) + b"\n")
        self.process.stdin.flush()
        return self.answer(deadline_s)

    def answer(self, deadline_s: float) -> Any:
        """The next line that it says."""
        try:
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            raise AssertionError(f"no answer within {deadline_s:g} s") from None
        if not line:
            self._lines.put(line)
            raise AssertionError("the process has ended")
        answer = msgspec.json.decode(line)
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(answer["error"])
        return answer

    def _read(self) -> None:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self._lines.put(line)
        self._lines.put(b"")


def group_is_gone(group: int) -> bool:
    """Whether no process of a group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return all(_is_zombie(pid) for pid in _members(group))


def shared_blocks(group: int) -> set[Path]:
    """Those of vLLM, and of Python's `shared_memory`, that processes of a group have mapped."""
    found = set()
    for pid in _members(group):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = Path(line.partition("/")[1] + line.partition("/")[2])
                if path.parent == SHM and path.name.startswith(BLOCKS):
                    found.add(path)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nobody of its group is left when this returns."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    for number, patience_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        give_up = time.monotonic() + patience_s
        while time.monotonic() < give_up:
            process.poll()
            if group_is_gone(process.pid):
                return
            time.sleep(POLL_S)
    raise AssertionError(f"processes of group {process.pid} cannot be killed")


def _members(group: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ProcessLookupError):
            if os.getpgid(int(folder.name)) == group:
                found.append(int(folder.name))
    return found


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _show(log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines()
    print(f"--- the end of {log} ({len(lines)} lines)", file=sys.stderr)
    print("\n".join(lines[-LOG_LINES:]), file=sys.stderr)

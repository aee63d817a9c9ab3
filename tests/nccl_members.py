"""Members of a group, each a process (`tests.nccl_member`), which a test tells what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

__all__ = ("Members", "open_members")

ROOT: Final = Path(__file__).resolve().parents[1]

NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

Answer = dict[str, Any]


class Members:
    """Processes, by their place."""

    def __init__(self, rendezvous: str, processes: Sequence[subprocess.Popen[str]]) -> None:
        self.rendezvous, self.processes = rendezvous, processes

    def tell(self, place: int, do: str, /, **request: Any) -> None:
        stdin = self.processes[place].stdin
        assert stdin is not None
        stdin.write(json.dumps({"do": do, **request}) + "\n")
        stdin.flush()

    def hear(self, place: int) -> Answer:
        """Its next answer; between them may be what NCCL prints if its environment says so."""
        stdout = self.processes[place].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith("{"):
                answer: Answer = json.loads(line)
                return answer
        raise AssertionError(f"place {place} has ended: {self.processes[place].wait(10)}")

    def ask(self, places: Sequence[int], do: str, /, **request: Any) -> list[Answer]:
        """The same of several, side by side."""
        for place in places:
            self.tell(place, do, **request)
        return [self.hear(place) for place in places]

    def open(
        self, places: Sequence[int], group: str, key: str, deadline_s: float = 60.0
    ) -> list[Answer]:
        """A group of these processes, in their order."""
        for number, place in enumerate(places):
            fill = {"group": group, "key": key, "place": number, "size": len(places)}
            self.tell(place, "open", deadline_s=deadline_s, rendezvous=self.rendezvous, **fill)
        return [self.hear(place) for place in places]

    def kill(self, place: int) -> None:
        self.processes[place].kill()
        self.processes[place].wait()


@contextmanager
def open_members(
    rendezvous: str, devices: Sequence[int], *stub: str, environment: Mapping[str, str] = NOTHING
) -> Iterator[Members]:
    """One on each device."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT), *filter(None, sys.path)]),
        **environment,
    }
    with ExitStack() as stack:
        processes = []
        for device in devices:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.nccl_member", str(device), *stub],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        members = Members(rendezvous, processes)
        for place in range(len(devices)):
            members.hear(place)
        yield members

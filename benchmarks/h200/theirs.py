"""checkpoint-engine's own broadcast update, with an engine that only copies its slices.

Its parameter servers are processes of their own (`theirs_rank.py`), one for each GPU, which hold
the tensors in pinned host memory, partitioned by bytes; beside each runs an engine process with one
rank of the same model. A repetition counts `gather_metas` and `update`, which brings a checkpoint
whose metadata nobody has yet, from when the first rank begins to when the last has ended.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from typing import Final

import anyio
import msgspec

from benchmarks.h200 import theirs_rank
from benchmarks.h200.memory import Memory
from benchmarks.h200.ours import first_of
from benchmarks.h200.processes import BenchFailed, Commanded, Processes
from benchmarks.h200.progress import say
from benchmarks.h200.report import Run, run_of
from benchmarks.h200.setup import Setup
from benchmarks.h200.theirs_rank import Arguments, Command, Done

__all__ = ("THEIRS", "Theirs", "measure_theirs", "missing")

THEIRS: Final = "ce_broadcast"
START_S: Final = 180.0
UPDATE_S: Final = 60.0


def missing(setup: Setup) -> str:
    """Why it cannot be measured here; empty: it can."""
    if setup.cpu:
        return "checkpoint-engine needs GPUs, and here are none"
    if importlib.util.find_spec("checkpoint_engine") is None:
        return "checkpoint-engine is not installed: pip install 'weightbus[bench]'"
    return ""


async def measure_theirs(
    theirs: Theirs,
    memory: Memory | None,
    size_bytes: int,
    repetitions: int,
    deadline_s: float,
    on_run: Callable[[Run], None],
) -> None:
    """Never raises because of it: the row says why it has no figures."""
    note = missing(theirs.setup)

    def tell() -> None:
        on_run(theirs.run(size_bytes, note))

    if not note:
        try:
            with anyio.move_on_after(deadline_s) as limit:
                await theirs.measure(memory, repetitions, tell)
            if limit.cancelled_caught:
                note = f"ended after its {deadline_s:.0f} s"
        except* (BenchFailed, OSError) as failed:
            note = f"ended early: {first_of(failed)}"
        finally:
            with anyio.CancelScope(shield=True):
                await theirs.end()
    tell()
    if note:
        say(note)


class Theirs:
    """The ranks, and what they did so far."""

    name: str = THEIRS
    module: str = theirs_rank.__name__
    """Of the process of a rank."""
    version: int = theirs_rank.VERSION
    """That is brought."""

    def __init__(self, setup: Setup, processes: Processes) -> None:
        self.setup = setup
        self._processes, self._count = processes, setup.devices
        self._ranks: list[Commanded] = []
        self._seconds: list[float] = []
        self._parts: dict[str, list[float]] = {"gather_metas_s": [], "update_s": []}
        self._registered_s: list[float] = []
        self._extra_gpu_bytes: int | None = None
        self._checked = ""

    def run(self, size_bytes: int, note: str) -> Run:
        return run_of(
            self.name,
            self._seconds,
            size_bytes,
            {**self._parts, "register_s": self._registered_s},
            extra_gpu_bytes=self._extra_gpu_bytes,
            note="; ".join(filter(None, (note, self._checked))),
        )

    async def measure(
        self, memory: Memory | None, repetitions: int, on_timed: Callable[[], None]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(self._count):
            name = f"checkpoint-engine-{rank}"
            self._ranks.append(
                await self._processes.start_commanded(name, self.module, self.arguments(rank, port))
            )
        registered = await self._ask("register", START_S)
        self._registered_s.append(_seconds(registered))
        say(f"checkpoint-engine has registered its tensors, in {self._registered_s[0]:.1f} s")
        rest = [] if memory is None else memory.used()
        await self._update()
        for _ in range(repetitions):
            done = await self._update()
            self._seconds.append(_seconds(done))
            gathered_ns = max(one.gathered_ns for one in done)
            self._parts["gather_metas_s"].append(
                (gathered_ns - min(one.start_ns for one in done)) / 1e9
            )
            self._parts["update_s"].append((max(one.end_ns for one in done) - gathered_ns) / 1e9)
            await self.check()
            self._checked = "every byte compared after every update"
            say(f"update by checkpoint-engine: {self._seconds[-1]:.4f} s")
            on_timed()
        if memory is not None:
            with memory.sampled() as samples:
                await self._update()
            self._extra_gpu_bytes = samples.over(rest)

    async def end(self) -> None:
        for rank in range(len(self._ranks)):
            await self._processes.end(f"checkpoint-engine-{rank}")

    def arguments(self, rank: int, port: int) -> msgspec.Struct:
        """Of a rank's process."""
        return Arguments(setup=self.setup, rank=rank, port=port)

    async def clear(self) -> None:
        """Parameters hold nothing afterwards: what they hold later has come by an update."""
        await self._ask("clear", UPDATE_S)

    async def check(self) -> None:
        """
        Raises:
            BenchFailed: a rank of the engine does not hold every byte.
        """
        for rank, one in enumerate(await self._ask("check", UPDATE_S)):
            if not one.held.startswith(f"version {self.version}, "):
                raise BenchFailed(f"rank {rank} holds {one.held}")

    async def update(self) -> list[Done]:
        """By all ranks."""
        return await self._ask("update", UPDATE_S)

    async def _update(self) -> list[Done]:
        await self.clear()
        return await self.update()

    async def _ask(self, what: theirs_rank.What, deadline_s: float) -> list[Done]:
        done: dict[int, Done] = {}

        async def ask(rank: int) -> None:
            done[rank] = await self._ranks[rank].ask(Command(what), Done, deadline_s)

        async with anyio.create_task_group() as tasks:
            for rank in range(self._count):
                tasks.start_soon(ask, rank)
        return [done[rank] for rank in range(self._count)]


def _seconds(done: list[Done]) -> float:
    return (max(one.end_ns for one in done) - min(one.start_ns for one in done)) / 1e9

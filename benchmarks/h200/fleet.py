"""Trainers, engines and consumers of one run, on one bus.

Owns, while `open_fleet` is open, the bus and, through `Processes`, every process. Trainers are
started when something is first published, engines when a part needs others than those that run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
import msgspec
from msgspec import Struct, structs

from benchmarks.h200 import consumer, trainer
from benchmarks.h200.memory import Memory
from benchmarks.h200.news import News, open_news
from benchmarks.h200.processes import BenchFailed, Commanded, Processes, open_processes
from benchmarks.h200.progress import say
from benchmarks.h200.setup import ARCHITECTURE, EngineSetup, Setup
from benchmarks.h200.slots import SlotKind
from benchmarks.h200.trainer import Publish, Published, Release, Released
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.host import host_id
from weightbus.bus.settings import BusSettings
from weightbus.bus.sweep import sweep_blocks, sweep_staging
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.errors import ConsumerError
from weightbus.schemas.base import RouteName
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import Placement, SharedMemorySegment
from weightbus.schemas.rounds import Budgets

__all__ = ("Engines", "Fleet", "open_fleet")

T = TypeVar("T")
F = TypeVar("F", bound="Fleet")

START_S: Final = 180.0
PUBLISH_S: Final = 180.0
CHECK_S: Final = 120.0
POLL_S: Final = 0.1
BUDGETS: Final = Budgets(prepare_s=120.0, transfer_s=120.0, round_s=300.0)
CPU_JOIN_S: Final = 60.0
"""Of the smoke without GPUs, on machines that do other things: whom a leader does not wait for is
left out, and who may come by broadcast alone has then no way."""


@dataclass
class Engines:
    """Those that run."""

    setups: tuple[EngineSetup, ...]
    rest: list[int]
    """GPU memory in use before any version came, less what others took; empty: no GPU."""
    proven: bool = False
    """They have been brought a version."""
    registered: bool = False
    """They have read slots in host memory, and keep them registered."""


class Publishing(Struct, frozen=True, kw_only=True):
    """How long trainers took for one version."""

    publish_s: float
    """From the first one's beginning until it was announced."""
    blocked_s: float
    """The most that one of them could do nothing else."""


class Fleet:
    """Made by `open_fleet`."""

    def __init__(
        self, setup: Setup, bus: Bus, processes: Processes, news: News, memory: Memory | None
    ) -> None:
        self.setup, self.news, self.memory = setup, news, memory
        self.version = 0
        """The newest that was published."""
        self._bus, self.processes = bus, processes
        self._trainers: list[Commanded] = []
        self._published: dict[SlotKind, int] = {}
        self._engines: Engines | None = None
        self._started: list[str] = []
        """Engine processes."""
        self._models: set[str] = set()

    async def publish(self, slots: SlotKind) -> tuple[CheckpointReady, Publishing]:
        """The next version, by all trainers: (its event, how long they took)."""
        self.version += 1
        answers = await self._command(Publish(version=self.version, slots=slots), Published)
        self._published[slots] = self._published.get(slots, 0) + 1
        start_ns = min(answer.start_ns for answer in answers)
        return answers[0].ready, Publishing(
            publish_s=(max(answer.end_ns for answer in answers) - start_ns) / 1e9,
            blocked_s=max(answer.free_ns - answer.start_ns for answer in answers) / 1e9,
        )

    async def announce(
        self, model: str, ready: CheckpointReady, *, hosts: Sequence[str] = (), digest: bool = True
    ) -> CheckpointReady:
        """Say of what was published that it is another model's: mapped by these hosts, too, which
        are all on this machine, or without a digest."""
        self._models.add(model)
        said = structs.replace(
            ready,
            model=model,
            placement=_mapped_by(ready.placement, hosts),
            weights_digest=ready.weights_digest if digest else None,
            tensor_digests=ready.tensor_digests if digest else None,
        )
        said = structs.replace(said, created_ns=time.time_ns())
        await self._bus.publish(said)
        return said

    async def ready_for(
        self, setups: Sequence[EngineSetup], slots: SlotKind | None = None
    ) -> Engines:
        """Engines that run, none of which follows anything, and trainers with both slots of this
        kind, if any, and none on GPUs otherwise, whose room engines may need."""
        if slots != "gpu":
            await self.release("gpu")
        engines = self._engines
        if engines is not None and engines.setups != tuple(setups):
            await self.end_engines()
            engines = None
        before = self._used()
        async with anyio.create_task_group() as tasks:
            if slots is not None:
                tasks.start_soon(self._fill, slots)
            if engines is None:
                tasks.start_soon(self._start_engines, setups)
        after = self._used()
        if engines is None:
            self._engines = engines = Engines(tuple(setups), after)
        else:
            rest = zip(engines.rest, after, before, strict=True)
            engines.rest = [at_rest + now - then for at_rest, now, then in rest]
        return engines

    async def _fill(self, slots: SlotKind) -> None:
        while self._published.get(slots, 0) < 2:
            _, took = await self.publish(slots)
            say(f"a slot of the trainers ({slots}) is filled, in {took.publish_s:.1f} s")

    @asynccontextmanager
    async def following(
        self,
        engines: Engines,
        model: str,
        *,
        routes: Sequence[RouteName] = ("local", "broadcast"),
        hosts: Sequence[str] = (),
        digest: bool = True,
        **changes: Any,
    ) -> AsyncIterator[None]:
        """A consumer beside each engine; entered once all are present."""
        self._models.add(model)
        if self.setup.cpu:
            changes = {"join_window_s": CPU_JOIN_S, **changes}
        names: list[str] = []
        try:
            for number, engine in enumerate(engines.setups):
                arguments = consumer.Arguments(
                    url=self._bus.url,
                    config=ConsumerConfig(
                        model=model,
                        engine=engine.name,
                        host_id=hosts[number] if hosts else host_id(),
                        routes=tuple(routes),
                        budgets=BUDGETS,
                        **changes,
                    ),
                    directory=str(self._directory(engine)),
                    server=self._server_of(engine),
                    digest=digest,
                )
                names.append(f"consumer-{engine.name}")
                encoded = msgspec.json.encode(arguments).decode()
                await self.processes.start_guarded(names[-1], consumer.__name__, encoded)
            await self._present(model, {engine.name for engine in engines.setups})
            say(f"{len(names)} consumers follow {model}")
            yield
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    for name in names:
                        tasks.start_soon(self.processes.end, name)

    async def check(self, engines: Engines, version: int) -> int:
        """See that every byte of every rank's parameters is the version's; how many there are.

        Raises:
            BenchFailed: it is not.
        """
        held_bytes = 0
        for engine in engines.setups:
            served, held = await self._holding(engine)
            for rank, found in enumerate(held):
                wanted = f"version {version}, "
                if not found.startswith(wanted) or served not in (None, version):
                    raise BenchFailed(
                        f"rank {rank} of {engine.name} holds {found}, not version {version}"
                    )
                held_bytes += int(found.removeprefix(wanted).removesuffix(" bytes"))
        return held_bytes

    def logs(self) -> list[Path]:
        """What the processes have printed so far."""
        return sorted(self.processes.directory.glob("*.log"))

    async def close(self) -> None:
        """Blocks that killed processes have left go, too."""
        await self.processes.end_all()
        for model in self._models | {f"{self.setup.model}-{slots}" for slots in self._published}:
            await anyio.to_thread.run_sync(sweep_blocks, model)
            await anyio.to_thread.run_sync(sweep_staging, model)

    async def recover(self) -> None:
        """After a run that ended early: nobody knows what engines are doing, and trainers of which
        one has died are of no use."""
        await self.end_engines()
        names = [_trainer(rank) for rank in range(len(self._trainers))]
        if any(self.processes.has_ended(name) for name in names):
            self._trainers, self._published = [], {}
            async with anyio.create_task_group() as tasks:
                for name in names:
                    tasks.start_soon(self.processes.end, name)

    async def make_room(self) -> None:
        """Nothing of ours takes room on a GPU afterwards but the trainers' tensors."""
        await self.end_engines()
        await self.release("gpu")

    async def release(self, slots: SlotKind) -> None:
        """Slots of this kind, and the memory that they take."""
        if self._published.pop(slots, 0):
            await self._command(Release(slots=slots), Released)

    async def end_engines(self) -> None:
        """Also those that were not started to the end."""
        self._engines = None
        while self._started:
            await self.processes.end(self._started.pop())

    async def _command(self, command: Publish | Release, kind: type[T]) -> list[T]:
        if not self._trainers:
            await self._start_trainers()
        answers: dict[int, T] = {}

        async def ask(rank: int) -> None:
            answers[rank] = await self._trainers[rank].ask(command, kind, PUBLISH_S)

        async with anyio.create_task_group() as tasks:
            for rank in range(len(self._trainers)):
                tasks.start_soon(ask, rank)
        return [answers[rank] for rank in range(len(self._trainers))]

    async def _start_trainers(self) -> None:
        for rank in range(self.setup.devices):
            arguments = trainer.Arguments(url=self._bus.url, setup=self.setup, rank=rank)
            started = await self.processes.start_commanded(
                _trainer(rank), trainer.__name__, arguments
            )
            self._trainers.append(started)
        if self.memory is not None:
            self.memory.ignored |= {started.pid for started in self._trainers}

    async def _start_engines(self, setups: Sequence[EngineSetup]) -> None:
        for engine in setups:
            shutil.rmtree(self._directory(engine), ignore_errors=True)
            await self._start_engine(engine)
            self._started.append(engine.name)
        for engine in setups:
            await self._serves(engine)
            say(f"engine {engine.name} is ready")

    async def _start_engine(self, engine: EngineSetup) -> None:
        """A process of the engine's name."""
        spec = TorchEngineSpec(
            architecture=ARCHITECTURE,
            config=self.setup.config,
            tp=engine.tp,
            threads=max(1, len(os.sched_getaffinity(0)) // self.setup.devices // 2),
            device="cpu" if self.setup.cpu else f"cuda:{engine.first_device}",
            start_timeout_s=START_S,
            step_timeout_s=CHECK_S,
        )
        await self.processes.start_guarded(
            engine.name, "benchmarks.h200.engine", str(self._directory(engine)), spec.to_json()
        )

    def _server_of(self, engine: EngineSetup) -> str:
        """URL of an engine that is a server."""
        del engine
        return ""

    async def _holding(self, engine: EngineSetup) -> tuple[int | None, Sequence[str]]:
        """Which version an engine says it serves, if it does, and what each of its ranks holds.

        Raises:
            BenchFailed: it does not tell.
        """
        async with open_torch_client(self._directory(engine)) as client:
            try:
                held = await client.fingerprint(CHECK_S)
            except ConsumerError as error:
                raise BenchFailed(f"{engine.name} cannot be checked: {error}") from None
        return held.version, held.fingerprints

    async def _serves(self, engine: EngineSetup) -> None:
        """Returns when all ranks of an engine answer."""
        with anyio.move_on_after(START_S):
            async with open_torch_client(self._directory(engine)) as client:
                while True:
                    self.processes.check()
                    try:
                        if (await client.state(1.0)).ready:
                            return
                    except ConsumerError:
                        pass  # not yet
                    await anyio.sleep(POLL_S)
        raise BenchFailed(f"{engine.name} did not start within {START_S:g} s")

    async def _present(self, model: str, names: set[str]) -> None:
        with anyio.move_on_after(START_S):
            while True:
                self.processes.check()
                states = await self._bus.presence.list(model)
                if names <= {state.engine for state in states}:
                    return
                await anyio.sleep(POLL_S)
        raise BenchFailed(f"the consumers of {', '.join(sorted(names))} did not start")

    def _directory(self, engine: EngineSetup) -> Path:
        return self.processes.directory / engine.name

    def _used(self) -> list[int]:
        return [] if self.memory is None else self.memory.used()


def _trainer(rank: int) -> str:
    """The name of its process."""
    return f"trainer-{rank}"


def _mapped_by(placement: Placement, hosts: Sequence[str]) -> Placement:
    """Shared memory of this host, offered to each of `hosts` as its own."""
    if not hosts:
        return placement
    return tuple(
        tuple(
            structs.replace(way, host_id=host)
            for way in ways
            if isinstance(way, SharedMemorySegment)
            for host in hosts
        )
        for ways in placement
    )


@asynccontextmanager
async def open_fleet(setup: Setup, memory: Memory | None, kind: type[F]) -> AsyncIterator[F]:
    """
    Args:
        kind: of engines.

    Raises:
        ServerUnavailable, BusUnavailable: there is no nats-server, or it does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="wb-") as place:  # short: it holds the paths of sockets
        directory = Path(place)
        async with (
            open_bus(BusSettings(name="benchmark")) as bus,
            open_processes(directory) as processes,
            open_news(bus, processes.check) as news,
        ):
            fleet = kind(setup, bus, processes, news, memory)
            try:
                yield fleet
            finally:
                with anyio.CancelScope(shield=True):
                    await fleet.close()

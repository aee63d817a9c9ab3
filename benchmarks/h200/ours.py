"""Our runs: a version is published, brought to engines by their consumers, and checked.

Every run has its warm-up (the first version, which the engine's own loader takes and which proves
the plan, and some more: `WARM_UPS`), its timed repetitions, and one whose memory is sampled:
sampling is kept out of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final

import anyio
from msgspec import Struct

from benchmarks.h200.fleet import Engines, Fleet, Publishing
from benchmarks.h200.processes import BenchFailed
from benchmarks.h200.progress import say
from benchmarks.h200.report import Run, run_of
from benchmarks.h200.runs import Kind
from benchmarks.h200.setup import EngineSetup
from benchmarks.h200.slots import SlotKind
from benchmarks.h200.timing import Heard, Times, times_of
from benchmarks.h200.trainer import model_of
from weightbus.schemas.base import RouteName
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import UpdateComplete

__all__ = ("OURS", "OurRun", "engines_of", "first_of", "measure_ours")

WARM_UPS: Final = 3
"""After the first version: one in each slot, and one by the route that is taken from then on."""

KEPT_BACK: Final = 3
"""Times that a repetition takes: so much must be left of the run's time for another one."""

UNDIGESTED: Final = 3
"""Repetitions without the digest."""

SLOTS: Final = 2
"""Of a trainer: its GPUs' readers register both, if they are in host memory."""

PAGE_TABLE_SHARE: Final = 512
"""Of registered host memory, what every GPU's page tables take, measured: 2 MiB for each GiB."""

HOSTS: Final = ("host-a", "host-b")
"""Of the staged run: virtual, and each can map what the trainers hold."""


class OurRun(Struct, frozen=True, kw_only=True):
    """One of our runs."""

    engines: int
    slots: SlotKind
    hosts: tuple[str, ...] = ()
    """Each engine is on a host of its own; none: all are on this one."""
    routes: tuple[RouteName, ...] = ("local", "broadcast")
    expected: tuple[RouteName, ...] = ("local", "broadcast")
    """One of these must have been taken."""
    undigested: bool = False
    """Whether it is also measured without the digest."""
    may_process: bool = False
    """Parameters may go through the engine's own loader; how many did is told."""


OURS: Final[Mapping[Kind, OurRun]] = {
    "host_tp": OurRun(engines=1, slots="host", expected=("local",), undigested=True),
    "gpu_tp": OurRun(engines=1, slots="gpu", expected=("local",), undigested=True),
    "host_dp2": OurRun(engines=2, slots="host"),
    "staged_2hosts": OurRun(
        engines=2, slots="host", hosts=HOSTS, routes=("broadcast",), expected=("broadcast",)
    ),
}


def engines_of(run: OurRun, devices: int) -> tuple[EngineSetup, ...]:
    """The engines share the devices evenly; if there are too few, some have the same."""
    tp = max(1, devices // run.engines)
    return tuple(
        EngineSetup(name=f"tp{tp}-{number}", tp=tp, first_device=number * tp % devices)
        for number in range(run.engines)
    )


@dataclass
class Measured:
    """What was measured so far."""

    timed: list[Times] = field(default_factory=list)
    published: list[Publishing] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    """The first version, by the engine's own loader."""
    undigested: list[Times] = field(default_factory=list)
    extra_gpu_bytes: int | None = None
    kept_gpu_bytes: int | None = None
    routes: set[str] = field(default_factory=set)
    """By which the timed updates came."""
    registered: bool = False
    """Whether slots in host memory are registered with the GPUs."""
    checked_bytes: int = 0
    """Compared, over all timed updates."""
    processed: str = ""
    """What went through the engine's own loader."""

    def run(self, name: str, size_bytes: int, registered_bytes: int, note: str) -> Run:
        parts = {
            field: [getattr(times, field) for times in self.timed]
            for field in Times.__struct_fields__
            if field != "seconds"
        }
        published = {
            field: [getattr(one, field) for one in self.published]
            for field in Publishing.__struct_fields__
        }
        off = {
            "undigested_s": [times.seconds for times in self.undigested],
            "undigested_transfer_s": [times.transfer_s for times in self.undigested],
        }
        return run_of(
            name,
            [times.seconds for times in self.timed],
            size_bytes,
            {**parts, **published, "first_version_s": self.first_s, **off},
            extra_gpu_bytes=self.extra_gpu_bytes,
            page_table_bytes=registered_bytes // PAGE_TABLE_SHARE,
            note="; ".join(filter(None, (note, self._said()))),
        )

    def _said(self) -> str:
        routes = f"by {' and '.join(sorted(self.routes))}" if self.routes else ""
        checked = f"{self.checked_bytes / 1e9:.1f} GB compared" if self.checked_bytes else ""
        kept = self.kept_gpu_bytes
        left = "" if kept is None else f"{kept / 2**20:.0f} MiB of extra memory are kept"
        return "; ".join(filter(None, (routes, checked, left, self.processed)))


async def measure_ours(
    name: str,
    run: OurRun,
    fleet: Fleet,
    size_bytes: int,
    repetitions: int,
    deadline_s: float,
    on_run: Callable[[Run], None],
) -> None:
    """One of ours. What was measured is told as soon as it is known, and at the end again, with
    the reason if the run had to end early."""
    measured, note = Measured(), ""
    slots_bytes = SLOTS * size_bytes

    def tell() -> None:
        registered_bytes = slots_bytes if measured.registered else 0
        on_run(measured.run(name, size_bytes, registered_bytes, note))

    try:
        with anyio.move_on_after(deadline_s) as limit:
            await _measure(_Bench(run, fleet), repetitions, measured, tell)
        if limit.cancelled_caught:
            note = f"ended after its {deadline_s:.0f} s"
    except* (BenchFailed, WeightBusError, OSError) as failed:
        note = f"ended early: {first_of(failed)}"
    tell()
    if note:
        say(note)
        await fleet.recover()


async def _measure(
    bench: _Bench, repetitions: int, measured: Measured, on_timed: Callable[[], None]
) -> None:
    engines = await bench.start()
    engines.registered |= bench.run.slots == "host"
    measured.registered = engines.registered and bool(engines.rest)
    if not engines.proven:
        measured.first_s.append(await bench.prove(engines))
    async with bench.following(engines):
        for _ in range(WARM_UPS):
            await bench.update(engines)
        for _ in range(repetitions):
            start = anyio.current_time()
            update = await bench.update(engines)
            measured.checked_bytes += await bench.check(engines)
            measured.timed.append(update.times)
            measured.published.append(update.published)
            measured.routes |= update.routes
            measured.processed = update.processed
            on_timed()
            left_s = anyio.current_effective_deadline() - anyio.current_time()
            if left_s < KEPT_BACK * (anyio.current_time() - start):
                break  # what is slow is measured less often
        await bench.sample_memory(engines, measured)
    if bench.run.undigested:
        async with bench.following(engines, digest=False):
            await bench.update(engines, digest=False)
            for _ in range(UNDIGESTED):
                update = await bench.update(engines, digest=False)
                await bench.check(engines)
                measured.undigested.append(update.times)


class Update(Struct, frozen=True, kw_only=True):
    """One version that was brought."""

    ready: CheckpointReady
    published: Publishing
    routes: frozenset[str]
    times: Times
    processed: str


class _Bench:
    """How versions are brought to the engines of one run.

    Every version is published by the trainers. Where consumers are to see it in another way, as on
    virtual hosts or without a digest, it is said again as another model's, which they follow.
    """

    def __init__(self, run: OurRun, fleet: Fleet) -> None:
        self.run, self._fleet = run, fleet
        self._model = model_of(fleet.setup, run.slots)

    async def start(self) -> Engines:
        setups = engines_of(self.run, self._fleet.setup.devices)
        return await self._fleet.ready_for(setups, self.run.slots)

    async def prove(self, engines: Engines) -> float:
        """The first version, which every engine loads by itself; how long it took."""
        model = f"{self._model}-first"
        async with self._fleet.following(engines, model, routes=("local",), hosts=self.run.hosts):
            ready, _ = await self._fleet.publish(self.run.slots)
            ready = await self._fleet.announce(model, ready, hosts=self.run.hosts)
            heard = await self._hear(engines, model, ready)
        engines.proven = True
        say("the first version is in, and the plan is proven")
        return times_of(ready, heard).seconds

    def following(
        self, engines: Engines, *, digest: bool = True
    ) -> AbstractAsyncContextManager[None]:
        return self._fleet.following(
            engines,
            self._followed(digest),
            routes=self.run.routes,
            hosts=self.run.hosts,
            digest=digest,
        )

    async def update(self, engines: Engines, *, digest: bool = True) -> Update:
        """The next version. Returns when all engines serve it.

        Raises:
            BenchFailed: an engine does not come to serve it, or not as it should.
        """
        ready, published = await self._fleet.publish(self.run.slots)
        model = self._followed(digest)
        if model != self._model:
            hosts = self.run.hosts
            ready = await self._fleet.announce(model, ready, hosts=hosts, digest=digest)
        heard = await self._hear(engines, model, ready)
        for one in heard:
            self._see_that_it_went_well(one, digest)
        times = times_of(ready, heard)
        say(f"version {ready.version} of {model}: {times.seconds:.4f} s ({_parts_of(times)})")
        routes = frozenset(route for one in heard for route in one.complete.routes)
        processed = "; ".join(filter(None, (_processed(one.complete) for one in heard)))
        return Update(
            ready=ready, published=published, routes=routes, times=times, processed=processed
        )

    async def check(self, engines: Engines) -> int:
        return await self._fleet.check(engines, self._fleet.version)

    async def sample_memory(self, engines: Engines, measured: Measured) -> None:
        memory = self._fleet.memory
        if memory is None:
            return
        with memory.sampled() as samples:
            update = await self.update(engines)
        measured.extra_gpu_bytes = samples.over(engines.rest, update.ready.created_ns)
        used = zip(memory.used(), engines.rest, strict=True)
        measured.kept_gpu_bytes = max(now - rest for now, rest in used)

    def _followed(self, digest: bool) -> str:
        """The model that consumers follow."""
        staged = "-staged" if self.run.hosts else ""
        return f"{self._model}{staged}" if digest else f"{self._model}{staged}-undigested"

    async def _hear(self, engines: Engines, model: str, ready: CheckpointReady) -> list[Heard]:
        return [
            await self._fleet.news.hear(model, ready.version, engine.name, engine.tp)
            for engine in engines.setups
        ]

    def _see_that_it_went_well(self, heard: Heard, digest: bool) -> None:
        complete = heard.complete
        if complete.verified != ("verified" if digest else "not_offered"):
            raise BenchFailed(f"{complete.engine} says {complete.verified}")
        if (processed := _processed(complete)) and not self.run.may_process:
            raise BenchFailed(f"{complete.engine}: {processed}")
        if not set(complete.routes) <= set(self.run.expected):
            raise BenchFailed(f"{complete.engine} took {', '.join(complete.routes)}")


def _parts_of(times: Times) -> str:
    """What adds up to an update, in milliseconds."""
    parts = ("announce", "event_to_plan", "prepare", "pause", "transfer")
    return ", ".join(f"{part} {getattr(times, f'{part}_s') * 1e3:.1f}" for part in parts) + " ms"


def _processed(complete: UpdateComplete) -> str:
    """What of an update went through the engine's own loader; empty: nothing."""
    count, every = complete.processed_parameters, complete.direct_parameters
    if not count:
        return ""
    of = f"{count} of {count + every} parameters"
    return f"{of} went through the engine's own loader: {complete.reason}"


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A group's first error."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first

"""What has happened in the demo, and how it knows that every step was right.

Owns nothing: bus and fleet are the command's. An engine's version counts as verified only if the
digest that its ranks added up is the publisher's, and the engine, asked by other ways, shows no
fault (`EngineKind.faults`): it embeds a sentence as the trainer does, and more where it can tell.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import anyio
import anyio.abc
import msgspec
from msgspec import Struct

from weightbus.bus.connection import Bus
from weightbus.bus.received import Received
from weightbus.cli.demo.fleet import DemoFailed, Fleet
from weightbus.cli.demo.kinds import EngineSpec
from weightbus.cli.demo.words import Expected, Publish
from weightbus.schemas.base import Message
from weightbus.schemas.progress import DeadLetter, UpdateComplete, UpdateFailed
from weightbus.tracing.narration import narrate

__all__ = ("Checked", "Say", "Story")

START_S = 150.0
"""From the start of processes that import torch, on a small machine, to their first answer."""
STEP_S = 60.0
"""Training and publishing one more version."""
POLL_S = 0.5
"""How often the processes are looked at while something is waited for."""

Say = Callable[[str], None]
"""Shows one line of plain text."""


class Checked(Struct, frozen=True, kw_only=True):
    """One engine at one version."""

    spec: EngineSpec
    update: UpdateComplete
    faults: tuple[str, ...]
    """What is not as the trainer says; empty: verified."""

    @property
    def seconds(self) -> float:
        """From hearing of the version to serving it."""
        return (self.update.end_ns - self.update.start_ns) / 1e9


class Story:
    """What has happened so far."""

    def __init__(self, bus: Bus, fleet: Fleet, say: Say) -> None:
        self._bus, self._fleet, self._say = bus, fleet, say
        self._updates: dict[tuple[str, int], UpdateComplete] = {}
        self._heard = anyio.Event()
        self.checked: list[Checked] = []
        self.dead_letters = 0

    async def listen(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Hear what the engines report, as any monitor may."""
        async with self._bus.subscribe(UpdateComplete, UpdateFailed, DeadLetter) as messages:
            task_status.started()
            async for received in messages:
                if isinstance(received, Received):
                    self._hear(received.message)

    def _hear(self, message: Message) -> None:
        if isinstance(message, UpdateComplete):
            self._updates[message.engine, message.version] = message
        if isinstance(message, DeadLetter):
            self.dead_letters += 1
        self._say(f"  {narrate(message)}")
        self._heard.set()
        self._heard = anyio.Event()

    async def start(self, engines: Sequence[EngineSpec]) -> None:
        """Start engines; returns once every one of them is present."""
        for spec in engines:
            self._say(
                f"starting engine {spec.engine}: {spec.kind.describe(spec)}, follows {spec.model}"
                f"{spec.host and f', on {spec.host}'}"
            )
            await self._fleet.start_engine(spec)
        for spec in engines:
            await self.wait_present(spec)

    async def wait_present(self, spec: EngineSpec) -> None:
        """Returns once an engine's heartbeat is on the bus."""

        async def present() -> bool:
            engines = await self._bus.presence.list(spec.model)
            return any(state.engine == spec.engine for state in engines)

        await self._wait(present, spec.kind.start_s, f"engine {spec.engine}", "is not present")

    async def publish(self, model: str, version: int) -> Expected:
        """Let the trainer train on and publish."""
        command = msgspec.json.encode(Publish(model=model, version=version))
        answer = await self._fleet.ask_trainer(command, START_S if version == 1 else STEP_S)
        expected = msgspec.json.decode(answer, type=Expected)
        self._say(
            f"{model} version {version}: loss {expected.loss:.3f}, {expected.bytes / 1e6:.1f} MB, "
            f"weights digest {expected.weights_digest}"
        )
        return expected

    async def check(self, spec: EngineSpec, expected: Expected) -> None:
        """Wait until an engine serves a version, then compare everything with the trainer."""
        key = (spec.engine, expected.version)

        async def served() -> bool:
            return key in self._updates

        await self._wait(served, START_S, f"engine {spec.engine}", f"is not at {expected.version}")
        update = self._updates[key]
        faults = [
            *_digest_faults(update, expected),
            *await spec.kind.faults(self._fleet, spec, expected),
        ]
        self.checked.append(Checked(spec=spec, update=update, faults=tuple(faults)))
        self._say(
            f"  {spec.engine} holds version {expected.version}, {spec.kind.holds}"
            if not faults
            else f"  {spec.engine} is WRONG at version {expected.version}: {'; '.join(faults)}"
        )

    async def _wait(
        self, done: Callable[[], Awaitable[bool]], deadline_s: float, who: str, what: str
    ) -> None:
        """Wait for something to become true, while the processes live."""
        end = time.monotonic() + deadline_s
        while not await done():
            self._fleet.check()
            if time.monotonic() > end:
                name = who.removeprefix("engine ")
                raise DemoFailed(
                    who, f"{what} within {deadline_s:g} s; its log: {self._fleet.log_tail(name)}"
                )
            with anyio.move_on_after(POLL_S):
                await self._heard.wait()


def _digest_faults(update: UpdateComplete, expected: Expected) -> list[str]:
    faults = []
    if update.verified != "verified":
        faults.append(f"its update is {update.verified}")
    if update.weights_digest != expected.weights_digest:
        faults.append(f"its weights digest is {update.weights_digest}")
    return faults

"""A simulated trainer: publishes versions into two slots, as `producers` does, and may die."""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim.bus import Bus, Client
from tests.sim.world import World
from weightbus.consumers.round import events as ev
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired

__all__ = ("Source", "Trainer", "TrainerPlan")

MODEL = "sim"


@dataclass
class Slot:
    """Where one version lies. Its generation is even while it is whole."""

    generation: int = 0
    linked: bool = True
    """False: a later trainer process has removed it."""
    version: int | None = None


@dataclass(frozen=True)
class Source:
    """One published version, and where it lies."""

    ready: CheckpointReady
    slot: Slot
    generation: int
    trainer: Trainer
    host: str

    @property
    def content(self) -> int:
        """What every rank holds once it has got this version whole: unique to the publication."""
        return self.ready.created_ns

    @property
    def whole(self) -> bool:
        return self.slot.linked and self.slot.generation == self.generation


@dataclass(frozen=True)
class TrainerPlan:
    """How a trainer behaves."""

    host: str
    period_s: tuple[float, float]
    copy_s: float
    slot_wait_s: float
    in_slots: bool
    """False: it writes files, which stay."""


class Trainer(Client):
    """One trainer process."""

    def __init__(
        self, world: World, bus: Bus, plan: TrainerPlan, number: int, sources: dict[int, Source]
    ) -> None:
        super().__init__(f"trainer-{number}")
        self.slots = (Slot(), Slot())
        self.next_version = 0
        self.until_s = 0.0
        """Nothing is published later than this, except by `publish_last`."""
        self._world = world
        self._bus = bus
        self._plan = plan
        self._sources = sources
        """Content -> source, over all trainers."""
        self._busy = False
        self._last = False

    def start(self, next_version: int, until_s: float) -> None:
        self.next_version = next_version
        self.until_s = until_s
        self._world.after(self._world.between(0.1, 2.0), self._begin)

    def publish_last(self) -> None:
        """Publish one more version, and then none."""
        self._last = True
        if not self._busy:
            self._begin()

    def die(self) -> None:
        self.alive = False
        self._bus.vanish(self)

    def unlink(self) -> None:
        """Its slots are swept by a later trainer."""
        for slot in self.slots:
            slot.linked = False

    def hear(self, event: ev.Event) -> None:
        """A trainer listens to nobody."""

    def reconnected(self) -> None:
        """A trainer misses nothing."""

    def _begin(self) -> None:
        if not self.alive or self._busy:
            return
        if self._world.now_s > self.until_s and not self._last:
            return
        self._busy = True
        version = self.next_version
        self.next_version += 1
        slot = self.slots[version % 2] if self._plan.in_slots else Slot()
        if slot.version is None:
            self._write(slot, version)
            return
        self._bus.publish(
            self,
            CheckpointRetired(model=MODEL, version=slot.version, producer="t", reason="reused"),
        )
        self._world.note(self.name, "retires", slot.version)
        self._wait(slot, version, self._world.now_s + self._plan.slot_wait_s)

    def _wait(self, slot: Slot, version: int, deadline_s: float) -> None:
        """Until nobody reads what is in the slot, nor the newest version, or patience ends."""
        if not self.alive:
            return
        if self._world.now_s < deadline_s and self._read(version):
            self._world.after(0.2, self._wait, slot, version, deadline_s)
        else:
            self._write(slot, version)

    def _read(self, version: int) -> bool:
        return self._bus.reads(version - 2) or self._bus.reads(version - 1)

    def _write(self, slot: Slot, version: int) -> None:
        slot.generation += 1
        slot.version = version
        self._world.after(self._plan.copy_s, self._written, slot, version)

    def _written(self, slot: Slot, version: int) -> None:
        if not self.alive:
            return
        slot.generation += 1
        ready = CheckpointReady(
            model=MODEL,
            version=version,
            producer="t",
            layout_digest="0" * 64,
            created_ns=self._world.now_ns,
        )
        source = Source(ready, slot, slot.generation, self, self._plan.host)
        self._sources[source.content] = source
        self._world.note(self.name, "publishes", version)
        self._bus.publish(self, ready)
        self._busy = False
        if self._last:
            self._last = False
            return
        self._world.after(self._world.between(*self._plan.period_s), self._begin)

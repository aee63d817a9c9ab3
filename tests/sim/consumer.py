"""A simulated consumer process: drives a real `RoundMachine` on the simulated bus and engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.sim.bus import Bus, Client
from tests.sim.checks import Checks
from tests.sim.engine import SimEngine
from tests.sim.trainer import MODEL, Source
from tests.sim.transfer import Groups, SimTransfer, TransferFaults
from tests.sim.world import World
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.config import RoundConfig
from weightbus.consumers.round.machine import RoundMachine
from weightbus.consumers.round.phases import Phase
from weightbus.consumers.transfer.favour import Favour
from weightbus.schemas.base import RouteName
from weightbus.schemas.progress import EngineState
from weightbus.schemas.rounds import RankOffer

__all__ = ("Consumer", "ConsumerFaults")


CHANGING = frozenset({Phase.TRANSFERRING, Phase.CANCELLING, Phase.RESUMING})
"""Phases in which what an engine says of itself is about to change."""

PASSING_CAUSES = ("EngineUnavailable", "RouteUnavailable", "FileUnreadable")
"""Why a `Prepare` may fail and the next one not."""


@dataclass
class ConsumerFaults:
    """Probabilities per instruction."""

    prepare: float = 0.0
    """`Prepare` fails."""
    slow_prepare: float = 0.0
    """`Prepare` takes seconds."""
    prepare_s: float = 0.05
    """How long any other `Prepare` takes at most; not a fault, and stays."""
    resume: float = 0.0
    """`Resume` fails; whether it had an effect is left to chance."""


class Consumer(Client):
    """One consumer process beside one engine."""

    def __init__(
        self,
        world: World,
        bus: Bus,
        groups: Groups,
        engine: SimEngine,
        sources: dict[int, Source],
        config: RoundConfig,
        make_machine: Callable[[RoundConfig], RoundMachine],
        faults: ConsumerFaults,
        transfer_faults: TransferFaults,
        checks: Checks,
    ) -> None:
        super().__init__(config.consumer)
        self.engine = engine
        self.config = config
        self.machine = make_machine(config)
        self.started_s = world.now_s
        self.stopping = False
        self.stalled = False
        self.under_way: set[int] = set()
        """Tokens of instructions that are owed an answer."""
        self.owed_since_s = 0.0
        """When the last of them was given."""
        self._world = world
        self._bus = bus
        self._groups = groups
        self._sources = sources
        self._faults = faults
        self._transfer_faults = transfer_faults
        self._checks = checks
        self.resumed = -1
        """The last version that this process let its engine serve."""
        self._cancelled: set[int] = set()
        """Tokens of instructions that were cancelled and may be answered all the same."""
        self._backlog: list[Callable[[], None]] = []
        """What happened while the process was stalled."""
        self._transfers: dict[int, SimTransfer] = {}
        self._incarnation = engine.incarnation
        self._described = engine.incarnation
        """Of the processes whose needs were described last."""
        self._state: EngineState | None = None
        self._ready_groups: set[str] = set()
        """Ids of groups that have served a whole transfer, and did not break since."""
        self._favour = Favour()
        self._held: set[int] = set()
        """Versions whose reader lease is held."""
        self._do: dict[type[do.Instruction], Callable[[Any], None]] = {
            do.Prepare: self._prepare,
            do.CancelPrepare: self._cancel_prepare,
            do.Campaign: lambda order: bus.campaign(self, order.round, engine.name),
            do.Renew: lambda order: bus.renew(self, order.round),
            do.ReleaseRound: lambda order: bus.release(self, order.round),
            do.Send: self._send,
            do.Transfer: self._transfer,
            do.CancelTransfer: self._cancel_transfer,
            do.Resume: self._resume,
            do.SetState: self._set_state,
            do.ReleaseReader: self._release_reader,
            do.SetTimer: lambda order: world.at(order.at_ns, self._fire, order.name, order.token),
            do.CancelTimer: lambda order: None,
        }

    @property
    def proven(self) -> bool:
        """The engine's processes are those into which the last transfer went."""
        return self._incarnation == self.engine.incarnation

    # Life.

    def start(self) -> None:
        """The process is up: look at the engine, at the last checkpoint, and at who is there."""
        if not self.alive:
            return
        self.engine.lost = False
        if self.engine.paused and not self.engine.touched:
            self.engine.unpause()
        self._world.note(self.name, "starts", self.engine.version)
        self.feed(ev.Started(self.engine.version, self.engine.touched))
        self._bus.catch_up(self)

    def die(self) -> None:
        """SIGKILL: nothing is said and nothing is cleaned up."""
        self.alive = False
        for transfer in self._transfers.values():
            transfer.crash()
        self._bus.vanish(self)

    def stop(self) -> None:
        """SIGTERM."""
        if self.alive:
            self.stopping = True
            self.feed(ev.Stop())

    def stall(self) -> None:
        """The process stands still, and what it keeps alive expires; its connection stays."""
        self.stalled = True
        self._bus.vanish(self)

    def go_on(self) -> None:
        """The process runs again, and finds everything that happened meanwhile."""
        self.stalled = False
        backlog, self._backlog = self._backlog, []
        for happen in backlog:
            happen()
        if self.alive:
            self._bus.catch_up(self)

    def lose_engine(self) -> None:
        """The engine's own processes die and are started anew, empty."""
        self._world.note(self.engine.name, "is empty")
        for transfer in self._transfers.values():
            transfer.lose_engine()
        self.engine.restart()
        self.engine.lost = True
        self._world.after(self._world.between(0.1, 1.0), self._watch_engine)

    def _watch_engine(self) -> None:
        """The driver asks the engine what it serves, now and then."""
        if not self.alive:
            return
        engine, state = self.engine, self._state
        changing = self.machine.member.phase in CHANGING
        if state is not None and not changing and not self.stalled:
            if engine.lost and state.version > engine.version:
                self.feed(ev.EngineLost("its workers were started anew"))
            elif not engine.paused and not engine.touched and state.status == "quarantined":
                self.feed(ev.EngineServes(engine.version))
        if engine.lost or self.machine.member.touched:
            self._world.after(0.5, self._watch_engine)

    def doubt_engine(self) -> None:
        """The engine does not answer in time, and is wrongly taken for lost."""
        if self.machine.member.phase.value not in ("new", "stopped"):
            self._world.note(self.engine.name, "is slow")
            self.feed(ev.EngineLost("no answer"))
            self._world.after(self._world.between(0.1, 1.0), self._watch_engine)

    def hear(self, event: ev.Event) -> None:
        if self.machine.member.phase.value != "new":
            self.feed(event)

    def reconnected(self) -> None:
        if self.stalled:
            return
        if self._state is not None:
            self._bus.put_state(self, self._state)
        for version in self._held:
            self._bus.take_reader(self, version, self.engine.name)
        if (ready := self._bus.ready) is not None:
            self._bus.world.after(0.001, self._deliver, ev.CheckpointSeen(ready, "0" * 32))
            retired = self._bus.retired.get(ready.producer, -1)
            if retired >= 0:
                gone = ev.CheckpointGone(retired, "reused", ready.producer)
                self._bus.world.after(0.001, self._deliver, gone)
        plan = self._bus.plans.get(f"v{self.machine.member.target}")
        if plan is not None:
            self._bus.world.after(0.001, self._deliver, ev.PlanSeen(plan))

    def _deliver(self, event: ev.Event) -> None:
        if self._bus.reaches(self):
            self.hear(event)

    # The driver.

    def feed(self, event: ev.Event) -> None:
        """Let the machine handle an event, and do what it wants done."""
        if not self.alive:
            return
        if self.stalled:
            self._backlog.append(partial(self.feed, event))
            return
        if not isinstance(event, ev.TimerFired):
            self._world.note(self.name, "hears", event)
        orders = self.machine.handle(event, self._world.now_ns)
        for order in orders:
            if not isinstance(order, do.SetTimer | do.CancelTimer):
                self._world.note(self.name, "does", order)
            self._do[type(order)](order)
        self._checks.after_event(self)
        if self.machine.stopped:
            self._exit()

    def _exit(self) -> None:
        self.alive = False
        self._bus.drop_state(self.engine.name)
        self._bus.vanish(self)

    def _fire(self, name: str, token: int) -> None:
        self.feed(ev.TimerFired(name, token))

    def _owe(self, token: int) -> None:
        self.under_way.add(token)
        self.owed_since_s = self._world.now_s

    def _answer(self, token: int, event: ev.Event) -> None:
        """An instruction is answered, once."""
        if self.stalled:
            self._backlog.append(partial(self._answer, token, event))
        elif token in self._cancelled:
            self._cancelled.discard(token)
            self.feed(event)
        elif token in self.under_way:
            self.under_way.discard(token)
            self._transfers.pop(token, None)
            self.feed(event)

    def _set_state(self, order: do.SetState) -> None:
        self._state = EngineState(
            model=MODEL,
            engine=self.engine.name,
            consumer=self.name,
            host_id=self.engine.host,
            status=order.status,
            version=order.version,
            target_version=order.target_version,
            ranks=self.engine.ranks,
        )
        self._bus.put_state(self, self._state)

    def _send(self, order: do.Send) -> None:
        self._checks.said(self, order.message)
        self._bus.publish(self, order.message)

    # Long instructions.

    def _prepare(self, order: do.Prepare) -> None:
        world, faults = self._world, self._faults
        self._checks.prepares(self)
        self._owe(order.token)
        self._held.add(order.ready.version)
        self._bus.take_reader(self, order.ready.version, self.engine.name)
        slow = world.chance(faults.slow_prepare)
        delay_s = world.between(1.0, 8.0) if slow else world.between(0.001, faults.prepare_s)
        at_ns = world.now_ns + int(delay_s * 1e9)
        if at_ns >= order.deadline_ns:
            failure = ev.PrepareFailed(order.token, "DeadlineExceeded", "prepare took too long")
            world.at(order.deadline_ns, self._answer, order.token, failure)
        else:
            world.at(at_ns, self._prepared, order)

    def _prepared(self, order: do.Prepare) -> None:
        if order.token not in self.under_way | self._cancelled:
            return
        token, ready = order.token, order.ready
        source = self._sources[ready.created_ns]
        failure: tuple[str, str] | None = None
        if not self._bus.reaches(self):
            failure = ("BusTimeout", "the bus does not answer")
        elif ready.version <= self._bus.retired.get(ready.producer, -1) and not source.whole:
            failure = ("VersionRetired", "its publisher has withdrawn it")
        elif not source.slot.linked:
            failure = ("SegmentUnavailable", "its segments are gone")
        elif self._world.chance(self._faults.prepare):
            cause = self._world.random.choice(PASSING_CAUSES)
            failure = (cause, "something was missing for a moment")
        if failure is not None:
            self._answer(token, ev.PrepareFailed(token, *failure))
            return
        self._described = self.engine.incarnation
        offers = self._offers(source, ready.version)
        plan = self._bus.plans.get(order.round)
        prepared = ev.Prepared(
            token,
            offers,
            plan,
            ready.layout_digest,
            rendezvous=f"tcp://{self.name}:1",
            groups=tuple(sorted(self._ready_groups)),
        )
        self._answer(token, prepared)

    def _offers(self, source: Source, version: int) -> tuple[RankOffer, ...]:
        near: tuple[RouteName, ...] = ("local",) if source.host == self.engine.host else ()
        streams = self.engine.streams and self._favour.allows(version)
        far: tuple[RouteName, ...] = ("broadcast", "p2p") if streams else ("p2p",)
        return tuple(
            RankOffer(
                rank=rank,
                needs_digest=f"{self.engine.ranks:032x}{rank:032x}",
                need_bytes=1_000_000,
                free_bytes=2**30,
                routes=near + far,
            )
            for rank in range(self.engine.ranks)
        )

    def _cancel_prepare(self, order: do.CancelPrepare) -> None:
        """Its answer may be on its way already."""
        if order.token in self.under_way:
            self.under_way.discard(order.token)
            if self._world.chance(0.5):
                self._cancelled.add(order.token)

    def _transfer(self, order: do.Transfer) -> None:
        self._owe(order.token)
        self._incarnation = self.engine.incarnation
        self._checks.runs(self, order.plan)
        self._transfers[order.token] = SimTransfer(
            self._world,
            self._groups,
            self._transfer_faults,
            self.engine,
            self._sources[order.ready.created_ns],
            order,
            self._described,
            self.name,
            frozenset(self._ready_groups),
            lambda event: self._transferred(order, event),
        )

    def _transferred(self, order: do.Transfer, event: ev.Event) -> None:
        """Groups are kept for the next version, unless they broke."""
        transfer = self._transfers.get(order.token)
        forming = any(group.rendezvous for group in order.plan.groups)
        if transfer is not None and "broadcast" in transfer.routes and forming:
            if transfer.met:
                self._favour.met()
            elif isinstance(event, ev.TransferFailed) and event.cause == "PeerLost":
                self._favour.missed(order.plan.version)
        groups = {group.id for group in order.plan.groups}
        if isinstance(event, ev.TransferDone):
            if "broadcast" in event.routes:
                self._ready_groups |= groups
        else:
            self._drop_groups(groups)
        self._answer(order.token, event)

    def _drop_groups(self, groups: set[str]) -> None:
        self._ready_groups -= groups

    def _cancel_transfer(self, order: do.CancelTransfer) -> None:
        self._transfers[order.token].cancel()

    def _resume(self, order: do.Resume) -> None:
        self._owe(order.token)
        self._world.after(self._world.between(0.001, 0.05), self._resumed, order)

    def _resumed(self, order: do.Resume) -> None:
        """Only the workers that the proof was about may serve."""
        if not self.alive:
            return
        fails = not self.proven or self._world.chance(self._faults.resume)
        if self.proven and (not fails or self._world.chance(0.5)):
            self.engine.resume(order.version)
            self.resumed = order.version
        if fails:
            failure = ev.ResumeFailed(order.token, "EngineUnavailable", "no answer to resume")
            self._answer(order.token, failure)
            self._world.after(self._world.between(0.1, 1.0), self._watch_engine)
        else:
            self._answer(order.token, ev.Resumed(order.token, 0.01))

    def _release_reader(self, order: do.ReleaseReader) -> None:
        self._held.discard(order.version)
        self._bus.drop_reader(self, order.version, self.engine.name)

"""What must hold in every simulation, checked after every step in which it could break.

The engines check for themselves that they never serve a mix and never go back (`engine.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.sim.world import Broken, World
from weightbus.consumers.round.phases import Lead, Phase
from weightbus.consumers.round.work import main_round
from weightbus.schemas.base import Message
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Commit, Proven, RoundComplete, RoundPlan

if TYPE_CHECKING:
    from tests.sim.bus import Bus
    from tests.sim.consumer import Consumer

__all__ = ("Checks",)

OWED = frozenset({Phase.PREPARING, Phase.TRANSFERRING, Phase.CANCELLING, Phase.RESUMING})
"""Phases in which the driver owes an answer."""
ANSWER_S = 10.0
"""By when the driver has answered anything."""
JOIN_AGE_S = 5.0
"""A leader may know an engine by a `Join` that is this much older than its plan."""
PREPARES_IN_A_ROW = 5
"""How many versions an engine takes up before it transfers one or fails: two may be replaced by
newer ones, and then some by another publication of the same version."""
MEMBER_TIMERS = {
    Phase.JOINING: ("join", "negotiate"),
    Phase.REPLANNING: ("join", "replan"),
    Phase.PROVEN: ("proven", "commit"),
}
LEADER_TIMERS = {
    Lead.CANDIDATE: ("campaign",),
    Lead.COLLECTING: ("window", "renew"),
    Lead.WATCHING: ("round", "renew"),
    Lead.REGROUPING: ("window", "round", "renew"),
    Lead.REPLANNING: ("campaign", "round", "renew"),
}


@dataclass
class RoundRecord:
    """Everything that was said about one main round."""

    version: int
    planned_s: float
    members: dict[str, int] = field(default_factory=dict)
    """Engine -> the epoch of the first plan that named it."""
    runners: list[tuple[Consumer, int]] = field(default_factory=list)
    """Consumers that ran a plan of it, and the plan's epoch."""
    deadline_s: float = 0.0
    closed_epoch: int = 0
    """Of the last plan that a leader knew who closed it."""
    proven: set[str] = field(default_factory=set)


class Checks:
    """The invariants that concern more than one engine."""

    def __init__(self, world: World, bus: Bus) -> None:
        self.rounds: dict[str, RoundRecord] = {}
        self.reports: dict[tuple[str, int], list[UpdateComplete | UpdateFailed]] = {}
        """(Engine, version) -> what it reported."""
        self.consumers: dict[str, Consumer] = {}
        """Engine -> its consumer now."""
        self.targets: defaultdict[str, int] = defaultdict(lambda: -1)
        """Engine -> the highest version it ever went for."""
        self.served: defaultdict[str, int] = defaultdict(lambda: -1)
        """Engine -> the highest version that it ever reported complete."""
        self.routes: set[str] = set()
        """Routes by which some update was completed."""
        self.on_said: Callable[[Consumer, Message], None] = lambda _consumer, _message: None
        """Told of every message before it is published."""
        self._world = world
        self._bus = bus
        self._prepares: defaultdict[str, int] = defaultdict(int)
        """Consumer -> how many versions it took up since it transferred one or failed."""
        self._alone: set[tuple[str, int]] = set()
        self._plans: dict[tuple[str, int], RoundPlan] = {}
        """(Round, epoch) -> its one plan."""

    def after_event(self, consumer: Consumer) -> None:
        """A machine has handled an event and its instructions are under way."""
        machine, engine = consumer.machine, consumer.engine
        member, timers = machine.member, machine.timers
        self.targets[engine.name] = max(self.targets[engine.name], member.target)
        if member.phase in OWED:
            if len(consumer.under_way) != 1:
                raise Broken(f"{consumer.name} waits in {member.phase} for {consumer.under_way}")
        else:
            for name in MEMBER_TIMERS.get(member.phase, ()):
                if name not in timers:
                    raise Broken(f"{consumer.name} waits in {member.phase} without timer {name}")
        for known in machine.rounds.known.values():
            for name in LEADER_TIMERS.get(known.phase, ()):
                if f"{name}:{known.round}" not in timers:
                    raise Broken(
                        f"{consumer.name} waits for {known.round} in {known.phase}"
                        f" without timer {name}"
                    )
        if (
            member.phase is Phase.IDLE
            and not engine.lost
            and (engine.paused or member.served != engine.version)
        ):
            raise Broken(f"{consumer.name} takes its engine to serve {member.served}")

    def prepares(self, consumer: Consumer) -> None:
        """A consumer takes a version up."""
        self._prepares[consumer.name] += 1
        if self._prepares[consumer.name] > PREPARES_IN_A_ROW:
            raise Broken(f"{consumer.name} takes versions up and never transfers one")

    def runs(self, consumer: Consumer, plan: RoundPlan) -> None:
        """A consumer begins to run a plan."""
        self._prepares[consumer.name] = 0
        if plan.round in self.rounds:
            self.rounds[plan.round].runners.append((consumer, plan.epoch))

    def said(self, consumer: Consumer, message: Message) -> None:
        """A consumer is about to publish a message."""
        self.on_said(consumer, message)
        match message:
            case UpdateComplete():
                self._check_complete(consumer, message)
            case UpdateFailed():
                self._prepares[consumer.name] = 0
                self._report(message)
            case RoundPlan():
                self._check_plan(message)
            case Proven():
                if consumer.proven and not consumer.engine.holds(message.version):
                    raise Broken(f"{consumer.name} claims proof of {message.version}")
                self.rounds[message.round].proven.add(message.engine)
            case Commit():
                self._check_commit(message)
            case RoundComplete():
                self._check_end(message)

    def _report(self, message: UpdateComplete | UpdateFailed) -> None:
        self.reports.setdefault((message.engine, message.version), []).append(message)

    def _check_complete(self, consumer: Consumer, message: UpdateComplete) -> None:
        engine = consumer.engine
        true = engine.version == message.version and engine.holds(message.version)
        if (engine.paused or not true) and consumer.proven:
            raise Broken(f"{consumer.name} reports {message.version} complete before it is")
        self.routes.update(message.routes)
        self.served[engine.name] = max(self.served[engine.name], message.version)
        self._report(message)

    def _check_plan(self, message: RoundPlan) -> None:
        if message.round != main_round(message.version):
            self._alone.add((message.leader, message.version))
            return
        known = self._plans.setdefault((message.round, message.epoch), message)
        if known != message:
            raise Broken(f"{message.round} has two plans of epoch {message.epoch}")
        record = self.rounds.setdefault(
            message.round, RoundRecord(message.version, self._world.now_s)
        )
        record.deadline_s = max(record.deadline_s, self._world.now_s + message.budgets.round_s)
        for part in message.engines:
            earlier = record.members.get(part.engine, message.epoch)
            record.members[part.engine] = min(earlier, message.epoch)

    def _check_commit(self, message: Commit) -> None:
        record = self.rounds[message.round]
        for engine, epoch in record.members.items():
            if epoch > message.epoch:
                continue
            alone = (engine, message.version) in self._alone
            if engine not in record.proven and not alone and not self._accounted(engine, record):
                raise Broken(f"{message.round} is committed before {engine} has proof")

    def _check_end(self, message: RoundComplete) -> None:
        record = self.rounds.get(message.round)
        if record is None:
            return
        record.closed_epoch = max(record.closed_epoch, message.epoch)
        for engine in message.completed:
            if max(self.served[engine], self.consumers[engine].engine.version) < message.version:
                raise Broken(f"{message.round} is closed as if {engine} had completed")
        if self._world.now_s < record.planned_s + 0.9 * (record.deadline_s - record.planned_s):
            for engine in message.failed:
                if engine in record.members and not self._accounted(engine, record):
                    raise Broken(f"{message.round} is closed before {engine} has reported")

    def _accounted(self, engine: str, record: RoundRecord) -> bool:
        """Whether a leader has a reason not to wait for an engine."""
        consumer = self.consumers[engine]
        return bool(
            (engine, record.version) in self.reports
            or consumer.engine.version >= record.version
            or not consumer.alive
            or consumer.stopping
            or consumer.started_s > record.planned_s - JOIN_AGE_S
            or self._bus.dropped_s.get(engine, -1.0) > record.planned_s - JOIN_AGE_S
            or self.targets[engine] > record.version
        )

    def at_end(self) -> None:
        """The faults are long over."""
        for consumer in self.consumers.values():
            waits_s = self._world.now_s - consumer.owed_since_s
            if consumer.alive and consumer.under_way and waits_s > ANSWER_S:
                raise Broken(f"{consumer.name} has been owed an answer for {waits_s:.0f} s")
            engine = consumer.engine
            serves = engine.version == consumer.resumed >= 0 and not engine.paused
            if consumer.alive and serves and self.served[engine.name] < engine.version:
                raise Broken(f"{consumer.name} has never said that {engine.version} is complete")
        for round_id, record in self.rounds.items():
            for consumer, epoch in record.runners:
                if consumer.alive and epoch > record.closed_epoch:
                    raise Broken(f"{round_id}, run by {consumer.name}, was never closed")

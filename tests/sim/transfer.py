"""A simulated transfer of one version into one engine, with everything that can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.sim.engine import MIX, SimEngine
from tests.sim.trainer import Source
from tests.sim.world import Broken, World
from weightbus.consumers.round import events as ev
from weightbus.consumers.round.instructions import Transfer
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import RoundPlan

__all__ = ("Groups", "SimTransfer", "TransferFaults")

RENDEZVOUS_S = 3.0
"""How long members of a group wait for each other."""


@dataclass
class TransferFaults:
    """Probabilities per transfer."""

    untouched: float = 0.0
    """Fails before the first write."""
    touched: float = 0.0
    """A worker fails while it writes."""
    corrupt: float = 0.0
    """A byte arrives wrong: the proof fails."""
    hang: float = 0.0
    """A worker does not answer until the deadline."""
    unproven: float = 0.0
    """A worker finds that it cannot go on by streaming, and is relayed the version."""


@dataclass
class Groups:
    """Where the members of broadcast groups meet."""

    come: dict[tuple[str, int], dict[str, SimTransfer]] = field(default_factory=dict)
    """(Round, epoch) -> engine -> its transfer, of those that have come."""
    processes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Group's id -> its members' consumers, in order."""
    broken: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Group's id -> (round, epoch) of the plan in which it broke."""

    apart: frozenset[str] = frozenset()
    """Two engines that never meet: neither reaches the address of the other. Empty: all do."""

    def enter(self, plan: RoundPlan, engine: str, consumer: str) -> None:
        """A consumer enters the groups of a plan.

        Raises:
            Broken: a group is taken again by others than it was formed of.
        """
        for group in plan.groups:
            known = list(self.processes.get(group.id, ("",) * len(group.members)))
            if len(known) != len(group.members):
                raise Broken(f"group {group.id} has {len(group.members)} members: {known}")
            for n, member in enumerate(group.members):
                if member.engine == engine and known[n] not in ("", consumer):
                    raise Broken(f"group {group.id} holds {consumer} instead of {known[n]}")
                if member.engine == engine:
                    known[n] = consumer
            self.processes[group.id] = tuple(known)

    def meet(self, plan: RoundPlan, come: Mapping[str, SimTransfer]) -> bool:
        """All members have come; whether their groups work: all are ready in one, or none is, and
        it is formed.

        Raises:
            Broken: all members take a group for ready that broke.
        """
        for group in plan.groups:
            ready = [group.id in come[member.engine]._ready for member in group.members]
            if not any(ready):
                self.broken.pop(group.id, None)
            elif not all(ready):
                return False
            elif self.broken.get(group.id, (plan.round, plan.epoch)) != (plan.round, plan.epoch):
                raise Broken(f"group {group.id} is taken again after it broke")
        return True

    def break_up(self, plan: RoundPlan, engine: str) -> None:
        """An engine is gone before the end of a plan: so are the groups that it is a member of."""
        for group in plan.groups:
            if any(member.engine == engine for member in group.members):
                self.broken.setdefault(group.id, (plan.round, plan.epoch))


class SimTransfer:
    """One engine's part of one plan: open, meet the group, pause, write rank by rank, prove."""

    def __init__(
        self,
        world: World,
        groups: Groups,
        faults: TransferFaults,
        engine: SimEngine,
        source: Source,
        order: Transfer,
        described: int,
        consumer: str,
        ready: frozenset[str],
        answer: Callable[[ev.Event], None],
    ) -> None:
        self._world = world
        self._groups = groups
        self._faults = faults
        self._engine = engine
        self._source = source
        self._order = order
        self._described = described
        """Incarnation of the engine that described its needs."""
        self._consumer = consumer
        self._ready = ready
        """Ids of the groups that its consumer is ready in."""
        self._answer = answer
        self._ended = False
        self._wrote = False
        self._duration_s = world.between(0.02, 1.0)
        (part,) = (part for part in order.plan.engines if part.engine == engine.name)
        self.routes: tuple[RouteName, ...] = tuple(sorted({rank.route for rank in part.ranks}))
        self._group = "broadcast" in self.routes
        self.met = False
        """Its groups have formed, or were ready."""
        world.after(world.between(0.002, 0.05), self._open)
        world.at(order.deadline_ns, self._run_out)

    # What happens to it.

    def cancel(self) -> None:
        self._world.after(
            self._world.between(0.001, 0.2), self._fail, "TransferCancelled", "cancelled"
        )

    def crash(self) -> None:
        """Its consumer dies: nobody is told, and every rank is left where chance has it."""
        if not self._ended:
            self._leave_ranks()
            self._end()

    def lose_engine(self) -> None:
        """The engine's processes die and are started anew: there is nothing to leave behind."""
        if not self._ended:
            self._end()
            self._world.after(0.05, self._answer_lost)

    def _answer_lost(self) -> None:
        self._answer(
            ev.TransferFailed(
                self._order.token, "WorkerLost", "the engine died", touched=True, stage="reload"
            )
        )

    # Its way.

    def _open(self) -> None:
        if self._ended:
            return
        if not self._readable():
            self._fail("SegmentUnavailable", "its source cannot be opened")
        elif self._described != self._engine.incarnation:
            self._fail("WorkerLost", "the workers that were described are gone")
        elif self._world.chance(self._faults.untouched):
            cause = self._world.random.choice(("RouteUnavailable", "EngineUnavailable"))
            self._fail(cause, "failed before the first byte")
        elif self._group:
            self._meet()
        else:
            self._begin()

    def _meet(self) -> None:
        plan = self._order.plan
        expected = {member.engine for group in plan.groups for member in group.members}
        self._groups.enter(plan, self._engine.name, self._consumer)
        come = self._groups.come.setdefault((plan.round, plan.epoch), {})
        come[self._engine.name] = self
        apart = self._groups.apart
        if come.keys() >= expected and not (apart and apart <= expected):
            works = self._groups.meet(plan, come)
            for transfer in list(come.values()):
                if works:
                    transfer.met = True
                    transfer._begin()
                else:
                    transfer._lose_peer()
        else:
            self._world.after(RENDEZVOUS_S, self._miss_group)

    def _miss_group(self) -> None:
        if not self._ended and not self._wrote:
            self._fail("PeerLost", "the group did not meet")

    def _begin(self) -> None:
        """The first byte is about to be written."""
        if self._ended or self._wrote:
            return
        if not self._readable():
            self._fail("TornRead", "the source was written again")
            return
        self._wrote = True
        self._engine.pause()
        for rank in range(self._engine.ranks):
            self._engine.begin_write(rank)
        if self._world.chance(self._faults.hang):
            return
        if self._world.chance(self._faults.touched):
            delay_s = self._duration_s * self._world.random.random()
            self._world.after(delay_s, self._fail, "WorkerLost", "a worker died while writing")
            return
        if "local" not in self.routes and self._world.chance(self._faults.unproven):
            self._world.after(self._duration_s * self._world.random.random(), self._relay)
            return
        self._world.after(self._duration_s, self._prove)

    def _relay(self) -> None:
        """`ProofNeeded`: its peers go on without it, and it gets the version by itself."""
        if not self._ended:
            self._leave_group()
            self._world.after(self._duration_s, self._prove)

    def _prove(self) -> None:
        if self._ended:
            return
        if not self._readable():
            self._fail("TornRead", "the source was written again")
            return
        corrupt = self._world.chance(self._faults.corrupt)
        for rank in range(self._engine.ranks):
            wrong = corrupt and rank == 0
            self._engine.end_write(rank, MIX if wrong else self._source.content)
        if corrupt:
            self._fail("DigestMismatch", "the digests do not add up")
            return
        self._end()
        self._answer(
            ev.TransferDone(
                self._order.token,
                "verified",
                self.routes,
                bytes=self._engine.ranks,
                weights_digest=f"{self._source.content:016x}",
            )
        )

    def _run_out(self) -> None:
        self._fail("DeadlineExceeded", "the transfer took too long")

    def _fail(self, cause: str, reason: str) -> None:
        if self._ended:
            return
        if self._wrote:
            self._leave_ranks()
        self._end()
        self._answer(
            ev.TransferFailed(self._order.token, cause, reason, touched=self._wrote, stage="reload")
        )

    def _leave_ranks(self) -> None:
        """A write was cut short: some ranks are done, others are not."""
        if self._wrote:
            for rank in range(self._engine.ranks):
                done = self._world.chance(0.5) and self._readable()
                self._engine.end_write(rank, self._source.content if done else MIX)

    def _end(self) -> None:
        self._ended = True
        plan = self._order.plan
        come = self._leave_group()
        if come is not None and not (self._wrote and self._engine.holds(plan.version)):
            self._groups.break_up(plan, self._engine.name)
            for peer in come.values():
                self._world.after(self._world.between(0.01, 0.5), peer._lose_peer)

    def _leave_group(self) -> dict[str, SimTransfer] | None:
        """Its peers; None: it is in no group, or has left it."""
        plan = self._order.plan
        come = self._groups.come.get((plan.round, plan.epoch), {})
        if come.get(self._engine.name) is not self:
            return None
        del come[self._engine.name]
        self._group = False
        return come

    def _lose_peer(self) -> None:
        if self._group:
            self._fail("PeerLost", "a member of the group is gone")

    def _readable(self) -> bool:
        local = self.routes == ("local",)
        return self._source.whole and (local or self._source.trainer.alive)

"""A simulated transfer of one version into one engine, with everything that can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim.engine import MIX, SimEngine
from tests.sim.trainer import Source
from tests.sim.world import World
from weightbus.consumers.round import events as ev
from weightbus.consumers.round.instructions import Transfer
from weightbus.schemas.base import RouteName

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


@dataclass
class Groups:
    """Where the members of broadcast groups meet."""

    members: dict[tuple[str, int], dict[str, SimTransfer]] = field(default_factory=dict)
    """(Round, epoch) -> engine -> its transfer, of those that have come."""


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
        self._answer = answer
        self._ended = False
        self._wrote = False
        self._duration_s = world.between(0.02, 1.0)
        (part,) = (part for part in order.plan.engines if part.engine == engine.name)
        self._routes: tuple[RouteName, ...] = tuple(sorted({rank.route for rank in part.ranks}))
        self._group = "broadcast" in self._routes
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
        expected = {
            part.engine
            for part in plan.engines
            if any(rank.route == "broadcast" for rank in part.ranks)
        }
        come = self._groups.members.setdefault((plan.round, plan.epoch), {})
        come[self._engine.name] = self
        if come.keys() >= expected:
            for transfer in list(come.values()):
                transfer._begin()
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
                self._routes,
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
        come = self._groups.members.get((plan.round, plan.epoch), {})
        if come.get(self._engine.name) is self:
            del come[self._engine.name]
            if not (self._wrote and self._engine.holds(plan.version)):
                for peer in come.values():
                    self._world.after(self._world.between(0.01, 0.5), peer._lose_peer)

    def _lose_peer(self) -> None:
        self._fail("PeerLost", "a member of the group is gone")

    def _readable(self) -> bool:
        local = self._routes == ("local",)
        return self._source.whole and (local or self._source.trainer.alive)

"""The member's half of the round machine: what an event means to one engine. Does no I/O.

Phases and rules are in `table.py`; here is what happens in a transition, out of the steps of
`steps.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightbus.consumers.errors import VersionRetired
from weightbus.consumers.round.config import Planner, RoundConfig
from weightbus.consumers.round.effects import NS_PER_S, Effects, Timer, timer_of
from weightbus.consumers.round.errors import UnexpectedEvent
from weightbus.consumers.round.events import (
    AbortSeen,
    CheckpointGone,
    CheckpointSeen,
    CommitSeen,
    EngineLost,
    EngineServes,
    Event,
    PlanSeen,
    Prepared,
    PrepareFailed,
    Resumed,
    ResumeFailed,
    RoundCompleteSeen,
    Started,
    Stop,
    TimerFired,
    TransferDone,
    TransferFailed,
)
from weightbus.consumers.round.phases import Lead, Phase
from weightbus.consumers.round.rounds import Rounds
from weightbus.consumers.round.steps import Steps
from weightbus.consumers.round.work import concerns, in_group

__all__ = ("Member", "MemberHandler", "MemberTable")

CANCELLED = "TransferCancelled"
"""Cause of a transfer that was ended by `CancelTransfer`."""

MAX_REPLACED = 2
"""Versions in a row that newer ones may replace before they get as far as a transfer: the next one
is brought to its end, or a publisher faster than a `Prepare` would keep an engine from every
version."""


class Member(Steps):
    """One engine. Its handlers are called through its table only."""

    def __init__(
        self,
        config: RoundConfig,
        planner: Planner,
        effects: Effects,
        rounds: Rounds,
        table: MemberTable,
    ) -> None:
        super().__init__(config, planner, effects, rounds)
        self._table = table
        self._events = frozenset(key for row in table.values() for key in row)

    def handle(self, event: Event) -> None:
        """Handle an event, if it concerns the member's half.

        Raises:
            UnexpectedEvent: it cannot happen in this phase.
        """
        key = timer_of(event) if isinstance(event, TimerFired) else type(event)
        if key not in self._events:
            return
        handler = self._table[self.phase].get(key)
        if handler is None:
            raise UnexpectedEvent(self.phase.value, str(key))
        handler(self, event)

    # Handlers: starting and stopping.

    def start(self, event: Started) -> None:
        self.served = self.floor = event.served_version
        self.touched = event.touched
        self._settle()

    def stop_at_once(self, event: Stop) -> None:
        self._stopping = True
        self._rounds.finish()
        if self._work is not None:
            self._let_go()
        self._settle()

    def stop_after_transfer(self, event: Stop) -> None:
        self._stopping = True
        self._rounds.finish()
        if self.phase is Phase.TRANSFERRING:
            self._cancel_transfer()

    def stop_after_resume(self, event: Stop) -> None:
        self._stopping = True
        self._rounds.finish()
        if self.phase is Phase.PROVEN:
            self._resume()

    # Handlers: versions.

    def learn(self, event: CheckpointSeen) -> None:
        self._see(event)

    def learn_and_settle(self, event: CheckpointSeen) -> None:
        if self._see(event):
            self._settle()

    def learn_and_reconsider(self, event: CheckpointSeen) -> None:
        """Nothing is being transferred: go for a better version if this made one, unless that has
        been done too often."""
        candidate = self._in_hand().candidate
        if not self._see(event) or self._best() is candidate:
            return
        if self._versions.replaces(candidate) or self._replaced < MAX_REPLACED:
            self._replaced += 1
            self._let_go()
            self._settle()

    def forget(self, event: CheckpointGone) -> None:
        self._versions.retire(event.version, event.producer)

    def forget_and_settle(self, event: CheckpointGone) -> None:
        self.forget(event)
        self._settle()

    def forget_and_reconsider(self, event: CheckpointGone) -> None:
        self.forget(event)
        candidate = self._in_hand().candidate
        if event.version == candidate.version and candidate.comes_from(event.producer):
            self._fail(VersionRetired(event.version, event.reason), "negotiate")

    def retry(self, event: TimerFired) -> None:
        self._settle()

    # Handlers: the engine.

    def lose_engine(self, event: EngineLost) -> None:
        """It serves nothing any more: even the version it served is worth going for again."""
        self.touched = True

    def lose_engine_and_settle(self, event: EngineLost) -> None:
        self.lose_engine(event)
        self._settle()

    def find_engine(self, event: EngineServes) -> None:
        """It has not lost what it served, or what it was to serve."""
        if self._recover(event.version):
            self._settle()

    def find_engine_and_reconsider(self, event: EngineServes) -> None:
        """What is in hand may be what is served: it need not be brought again."""
        if self._recover(event.version) and self._in_hand().version <= self.floor:
            self._let_go()
            self._settle()

    # Handlers: negotiation.

    def prepared(self, event: Prepared) -> None:
        work = self._in_hand()
        if event.token != work.token:
            return
        work.prepared = True
        work.offers, work.layout_digest = event.offers, event.layout_digest
        work.rendezvous, work.groups = event.rendezvous, event.groups
        work.origin = event.origin
        late = event.planned is not None and concerns(event.planned, work.candidate.ready)
        again = work.candidate.failures > 0 or work.version <= self.floor
        if late or again:
            self._go_alone()
            return
        leadership = self._rounds.open(work.version)
        if leadership.phase is not Lead.HEARD or leadership.plan is not None:
            self._go_alone()
            return
        self.phase = Phase.JOINING
        self._effects.send(self._join())
        self._repeat(Timer.JOIN)
        self._effects.set_timer(Timer.NEGOTIATE, self._effects.at_ns(self._config.negotiate_s))
        leadership.enter(work.candidate.ready, event.layout_digest, event.origin)

    def prepare_failed(self, event: PrepareFailed) -> None:
        work = self._in_hand()
        if event.token == work.token:
            work.prepared = True
            self._report_failure(event.cause, event.reason, "negotiate")

    def join_again(self, event: TimerFired) -> None:
        self._effects.send(self._join())
        self._repeat(Timer.JOIN)

    def take_plan(self, event: PlanSeen) -> None:
        if self._in_hand().awaits(event.plan):
            self._follow(event.plan)

    def lose_patience(self, event: TimerFired) -> None:
        self._go_alone()

    def end_of_round(self, event: RoundCompleteSeen) -> None:
        """The round that a plan was waited for is over."""
        if self._in_hand().ended_by(event.complete):
            self._go_alone()

    def keep_abort(self, event: AbortSeen) -> None:
        work = self._in_hand()
        if event.abort.round == work.round:
            work.aborted_epoch = max(work.aborted_epoch, event.abort.epoch)

    # Handlers: the transfer.

    def keep_plan(self, event: PlanSeen) -> None:
        if self._in_hand().awaits(event.plan):
            self._in_hand().latest = event.plan

    def weigh_plan(self, event: PlanSeen) -> None:
        """A later plan while one is run: it counts only if others depend on this engine in it, or
        this one on others in the one that is run."""
        if not self._in_hand().awaits(event.plan):
            return
        self._in_hand().latest = event.plan
        part = self._in_hand().part_of(event.plan)
        if part is not None and (in_group(part) or self._in_hand().depends):
            self._cancel_transfer()

    def obey_abort(self, event: AbortSeen) -> None:
        self.keep_abort(event)
        work = self._in_hand()
        if work.depends and work.running.epoch <= work.aborted_epoch:
            self._cancel_transfer()

    def transferred(self, event: TransferDone) -> None:
        """Every rank holds the version and the proof holds: serve it, or wait for the others."""
        work = self._answered(event)
        work.done = event
        plan = work.running
        if plan.commit == "each" or len(plan.engines) == 1 or self._stopping:
            self._resume()
            return
        self.phase = Phase.PROVEN
        work.repeats = 0
        self._effects.send(work.proven())
        self._repeat(Timer.PROVEN)
        self._effects.set_timer(Timer.COMMIT, self._effects.at_ns(plan.budgets.commit_s))

    def transfer_failed(self, event: TransferFailed) -> None:
        work = self._answered(event)
        self.touched = self.touched or event.touched
        broken = event.cause == CANCELLED or (
            self._in_hand().depends and event.cause in self._config.peer_causes
        )
        if work.alone or self._stopping or not broken:
            self._report_failure(event.cause, event.reason, event.stage)
        elif work.runs >= self._config.group_attempts:
            self._go_alone()
        else:
            self._await_next_plan()

    def _await_next_plan(self) -> None:
        """The group broke: wait for the plan of the next epoch, which may be there already."""
        work = self._in_hand()
        self.phase = Phase.REPLANNING
        work.repeats, work.broken_epoch = 0, work.running.epoch
        latest, work.latest = work.latest, None
        if latest is not None:
            self._follow(latest)
        if self.phase is Phase.REPLANNING:
            self._effects.send(self._join())
            self._repeat(Timer.JOIN)
            self._effects.set_timer(Timer.REPLAN, self._effects.at_ns(self._config.replan_s))

    # Handlers: commit and resume.

    def prove_again(self, event: TimerFired) -> None:
        self._effects.send(self._in_hand().proven())
        self._repeat(Timer.PROVEN)

    def commit(self, event: CommitSeen) -> None:
        work = self._in_hand()
        if event.commit.round == work.round and event.commit.epoch >= work.running.epoch:
            self._resume()

    def commit_alone(self, event: TimerFired) -> None:
        self._resume()

    def commit_at_end(self, event: RoundCompleteSeen) -> None:
        if self._in_hand().ended_by(event.complete):
            self._resume()

    def resumed(self, event: Resumed) -> None:
        work = self._answered(event)
        self.served, self.touched = work.version, False
        self._versions.serve(work.version)
        self._effects.send(work.complete(event.paused_s, self._effects.now_ns))
        self._end("")

    def resume_failed(self, event: ResumeFailed) -> None:
        """The engine may serve the version all the same: if so, that is said when it is known."""
        work = self._answered(event)
        work.doubted_ns = self._effects.now_ns - round(event.paused_s * NS_PER_S)
        self.touched, self._doubtful = True, work
        self._report_failure(event.cause, event.reason, "commit")


MemberHandler = Callable[[Member, Any], None]
MemberTable = Mapping[Phase, Mapping[type[Event] | Timer, MemberHandler]]
"""Phase -> event (or timer) -> handler."""

"""The member's half of the round machine: what an engine does about its own version. Does no I/O.

Phases and rules are in `table.py`; here is what happens in a transition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightbus.consumers.errors import PlanError, VersionRetired
from weightbus.consumers.round.config import Planner, PlanRequest, RoundConfig
from weightbus.consumers.round.effects import Effects, Timer, timer_of
from weightbus.consumers.round.errors import UnexpectedEvent, VersionNotNew
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
from weightbus.consumers.round.instructions import (
    CancelPrepare,
    CancelTransfer,
    Prepare,
    ReleaseReader,
    Resume,
    SetState,
    Transfer,
)
from weightbus.consumers.round.phases import Lead, Phase
from weightbus.consumers.round.rounds import Rounds
from weightbus.consumers.round.versions import Candidate, Versions
from weightbus.consumers.round.work import (
    NO_VERSION,
    Work,
    concerns,
    in_group,
    main_round,
    solo_round,
)
from weightbus.schemas.base import Stage
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import EngineStatus, UpdateFailed
from weightbus.schemas.rounds import Join, RoundPlan

__all__ = ("Member", "MemberHandler", "MemberTable")

CANCELLED = "TransferCancelled"
"""Cause of a transfer that was ended by `CancelTransfer`."""


WAITS = (Timer.JOIN, Timer.NEGOTIATE, Timer.REPLAN, Timer.PROVEN, Timer.COMMIT)
"""Timers of the version in hand."""

MAX_REPLACED = 2
"""Versions in a row that newer ones may replace before they get as far as a transfer: the next one
is brought to its end, or a publisher faster than a `Prepare` would keep an engine from every
version."""


class Member:
    """One engine. Its handlers are called through its table only."""

    def __init__(
        self,
        config: RoundConfig,
        planner: Planner,
        effects: Effects,
        rounds: Rounds,
        table: MemberTable,
    ) -> None:
        self.phase = Phase.NEW
        self.served = NO_VERSION
        """The version that the engine serves, or served before it was touched."""
        self.floor = NO_VERSION
        """The last version that was, or may have been, served."""
        self.touched = False
        """The engine serves nothing: its parameters may be a mix."""
        self._config = config
        self._planner = planner
        self._effects = effects
        self._rounds = rounds
        self._table = table
        self._events = frozenset(key for row in table.values() for key in row)
        self._versions = Versions(config)
        self._work: Work | None = None
        self._stopping = False
        self._replaced = 0
        """Versions put down for a better one since the last transfer began."""
        self._solo_rounds = 0
        self._announced: SetState | None = None

    @property
    def target(self) -> int:
        """The version in hand; -1: none."""
        return NO_VERSION if self._work is None else self._work.version

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

    def announce(self) -> None:
        """Put the engine's state if it has changed."""
        status: EngineStatus = "starting" if self.served == NO_VERSION else "serving"
        if self._stopping or self.phase is Phase.STOPPED:
            status = "stopping"
        elif self.touched:
            status = "quarantined"
        elif self._work is not None:
            status = "updating"
        state = SetState(status, self._serving(), self.target)
        if state != self._announced and self.phase is not Phase.NEW:
            self._announced = state
            self._effects.put(state)

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
        if self.touched and event.version == self.floor > NO_VERSION:
            self.served, self.touched = event.version, False
            self._versions.serve(event.version)
            self._settle()

    # Handlers: negotiation.

    def prepared(self, event: Prepared) -> None:
        work = self._in_hand()
        if event.token != work.token:
            return
        work.prepared = True
        work.offers, work.layout_digest = event.offers, event.layout_digest
        work.rendezvous, work.groups = event.rendezvous, event.groups
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
        leadership.enter(work.candidate.ready, event.layout_digest)

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
        self._answered(event)
        self.touched = True
        self._report_failure(event.cause, event.reason, "commit")

    # Steps.

    def _settle(self) -> None:
        """Nothing is in hand: go for the best version there is, now or later, or rest."""
        self._effects.cancel_timers(Timer.RETRY)
        if self._stopping:
            self.phase = Phase.STOPPED
            return
        self.phase = Phase.QUARANTINED if self.touched else Phase.IDLE
        best = self._best()
        if best is None:
            return
        if best.not_before_ns > self._effects.now_ns:
            self._effects.set_timer(Timer.RETRY, best.not_before_ns)
            return
        first = best.failures == 0 and best.version > self.floor
        self._work = Work(
            config=self._config,
            candidate=best,
            start_ns=best.received_ns if first else self._effects.now_ns,
            round=main_round(best.version),
            token=self._effects.token(),
        )
        self.phase = Phase.PREPARING
        deadline_ns = self._effects.at_ns(self._config.budgets.prepare_s)
        self._effects.put(Prepare(self._work.token, best.ready, self._work.round, deadline_ns))

    def _let_go(self) -> None:
        """Put the version in hand down, whether it is served or not."""
        work = self._in_hand()
        if not work.prepared:
            self._effects.put(CancelPrepare(work.token))
        self._effects.cancel_timers(*WAITS)
        self._rounds.leave(work.version)
        self._effects.put(ReleaseReader(work.version))
        self._work = None

    def _go_alone(self) -> None:
        """A round of this engine alone: plan it and run it."""
        work = self._in_hand()
        self._effects.cancel_timers(*WAITS)
        self._rounds.leave(work.version)
        self._solo_rounds += 1
        work.alone = True
        work.round = solo_round(work.version, self._config, self._solo_rounds)
        work.latest = None
        request = PlanRequest(
            joins=(self._join(),),
            ready=work.candidate.ready,
            round=work.round,
            epoch=1,
            leader=self._config.engine,
            late=True,
            commit="each",
            budgets=self._config.budgets,
            now_ns=self._effects.now_ns,
        )
        try:
            plan = self._planner(request)
        except WeightBusError as error:
            self._fail(error, "negotiate")
            return
        self._effects.send(plan)
        self._run(plan)

    def _follow(self, plan: RoundPlan) -> None:
        """A plan that was waited for: run it, unless it has been withdrawn or leaves us out."""
        part = self._in_hand().part_of(plan)
        if part is None:
            self._go_alone()
        elif plan.epoch > self._in_hand().aborted_epoch or not in_group(part):
            self._run(plan)

    def _run(self, plan: RoundPlan) -> None:
        work = self._in_hand()
        if self._in_hand().part_of(plan) is None:
            engine = self._config.engine
            self._fail(
                PlanError(f"plan of round {plan.round}", "made", f"must name {engine}"), None
            )
            return
        self._effects.cancel_timers(*WAITS)
        self._replaced = 0
        work.plan = plan
        work.runs += 1
        work.token = self._effects.token()
        self.phase = Phase.TRANSFERRING
        deadline_ns = self._effects.at_ns(plan.budgets.transfer_s)
        self._effects.put(Transfer(work.token, plan, work.candidate.ready, work.alone, deadline_ns))

    def _cancel_transfer(self) -> None:
        self.phase = Phase.CANCELLING
        self._effects.put(CancelTransfer(self._in_hand().token))

    def _resume(self) -> None:
        """The version in hand is whole and proven: serve it."""
        work = self._in_hand()
        self._effects.cancel_timers(*WAITS)
        self.floor = max(self.floor, work.version)
        work.token = self._effects.token()
        self.phase = Phase.RESUMING
        deadline_ns = self._effects.at_ns(work.running.budgets.commit_s)
        self._effects.put(Resume(work.token, work.version, deadline_ns))

    def _repeat(self, timer: Timer) -> None:
        """Say it again after a pause that doubles every time."""
        work, config = self._in_hand(), self._config
        pause_s = min(config.repeat_s * 2**work.repeats, config.repeat_max_s)
        work.repeats += 1
        self._effects.set_timer(timer, self._effects.at_ns(pause_s))

    def _fail(self, error: WeightBusError, stage: Stage | None) -> None:
        self._report_failure(type(error).__name__, str(error), stage)

    def _report_failure(self, cause: str, reason: str, stage: Stage | None) -> None:
        """The attempt has failed: say so, and see what is next."""
        work, now_ns = self._in_hand(), self._effects.now_ns
        self._versions.fail(work.candidate, cause, now_ns)
        self._effects.send(
            work.failed(
                cause,
                reason,
                stage,
                served_version=self._serving(),
                quarantined=self.touched,
                now_ns=now_ns,
            )
        )
        self._end(f"{cause}: {reason}")

    def _end(self, failure: str) -> None:
        """The attempt is over and reported."""
        closing = self._in_hand().end_alone(failure, self._effects.now_ns)
        if closing is not None:
            self._effects.send(closing)
        self._let_go()
        self._settle()

    def _see(self, event: CheckpointSeen) -> bool:
        """Whether the event says anything new. A step back is refused, and that is all."""
        if self._versions.goes_back(event.ready, self.floor):
            self._refuse(event)
            return False
        return self._versions.see(event.ready, event.trace_id, self._effects.now_ns)

    def _refuse(self, event: CheckpointSeen) -> None:
        """Say that a version is older than the one that is, or may be, served."""
        version, now_ns = event.ready.version, self._effects.now_ns
        error = VersionNotNew(version, self.floor)
        self._effects.send(
            UpdateFailed(
                model=self._config.model,
                version=version,
                round=main_round(version),
                engine=self._config.engine,
                cause=type(error).__name__,
                reason=str(error),
                served_version=self._serving(),
                quarantined=self.touched,
                start_ns=now_ns,
                end_ns=now_ns,
                trace_id=event.trace_id,
            )
        )

    # Questions.

    def _join(self) -> Join:
        return self._in_hand().join(self._serving(), self._effects.now_ns)

    def _serving(self) -> int:
        """The version that the engine serves now; -1: none."""
        return NO_VERSION if self.touched else self.served

    def _in_hand(self) -> Work:
        assert self._work is not None, f"phase {self.phase.value} has a version in hand"
        return self._work

    def _answered(self, event: TransferDone | TransferFailed | Resumed | ResumeFailed) -> Work:
        """The work whose instruction is answered; it is owed exactly one answer."""
        work = self._in_hand()
        if event.token != work.token:
            raise UnexpectedEvent(self.phase.value, f"answer {event.token} to {work.token}")
        return work

    def _best(self) -> Candidate | None:
        return self._versions.best(self.floor, touched=self.touched)


MemberHandler = Callable[[Member, Any], None]
MemberTable = Mapping[Phase, Mapping[type[Event] | Timer, MemberHandler]]
"""Phase -> event (or timer) -> handler."""

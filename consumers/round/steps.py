"""What a member of rounds does, step by step, whatever event it is done for. Does no I/O.

Owns the member's state: its phase, the version in hand, and what the engine serves. Which step
follows from which event is in `member.py`.
"""

from __future__ import annotations

from weightbus.consumers.errors import PlanError
from weightbus.consumers.round.config import Planner, PlanRequest, RoundConfig
from weightbus.consumers.round.effects import NS_PER_S, Effects, Timer
from weightbus.consumers.round.errors import UnexpectedEvent, VersionNotNew
from weightbus.consumers.round.events import (
    CheckpointSeen,
    Resumed,
    ResumeFailed,
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
from weightbus.consumers.round.phases import Phase
from weightbus.consumers.round.rounds import Rounds
from weightbus.consumers.round.versions import Candidate, Versions
from weightbus.consumers.round.work import NO_VERSION, Work, in_group, main_round, solo_round
from weightbus.schemas.base import Stage
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import EngineStatus, UpdateFailed
from weightbus.schemas.rounds import Join, RoundPlan

__all__ = ("Steps",)

WAITS = (Timer.JOIN, Timer.NEGOTIATE, Timer.REPLAN, Timer.PROVEN, Timer.COMMIT)
"""Timers of the version in hand."""


class Steps:
    """One engine, without the handlers of its events."""

    def __init__(
        self, config: RoundConfig, planner: Planner, effects: Effects, rounds: Rounds
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
        self._versions = Versions(config)
        self._work: Work | None = None
        self._doubtful: Work | None = None
        """Whole and proven, but the last `Resume` failed: the engine may serve it all the same. A
        transfer that begins says nothing about that: it may fail before it touches anything."""
        self._stopping = False
        self._replaced = 0
        """Versions put down for a better one since the last transfer began."""
        self._solo_rounds = 0
        self._announced: SetState | None = None

    @property
    def target(self) -> int:
        """The version in hand; -1: none."""
        return NO_VERSION if self._work is None else self._work.version

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
            origin=work.origin,
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
        self._doubtful = None
        work.token = self._effects.token()
        self.phase = Phase.RESUMING
        deadline_ns = self._effects.at_ns(work.running.budgets.commit_s)
        self._effects.put(Resume(work.token, work.version, deadline_ns))

    def _recover(self, version: int) -> bool:
        """The engine serves `version`; whether that was not known. If its `Resume` only seemed to
        fail, the update is complete after all, and that takes back that it failed."""
        if not (self.touched and version == self.floor > NO_VERSION):
            return False
        self.served, self.touched = version, False
        self._versions.serve(version)
        work, self._doubtful = self._doubtful, None
        if work is not None and work.version == version:
            now_ns = self._effects.now_ns
            paused_s = (now_ns - work.doubted_ns) / NS_PER_S
            self._effects.send(work.complete(paused_s, now_ns))
        return True

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
        self._versions.fail(work.candidate, cause, now_ns, prepared=stage != "negotiate")
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

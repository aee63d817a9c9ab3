"""The leader's half of the round machine: one round as one of its engines sees it. Does no I/O.

Phases and rules are in `table.py`; here is what happens in a transition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from weightbus.consumers.round.config import Planner, PlanRequest, RoundConfig
from weightbus.consumers.round.effects import Effects, Timer
from weightbus.consumers.round.events import (
    EngineGone,
    EngineSeen,
    Event,
    JoinSeen,
    LeaseHeld,
    LeaseWon,
    PlanSeen,
    ProvenSeen,
    RoundCompleteSeen,
    UpdateSeen,
    WentAlone,
)
from weightbus.consumers.round.instructions import Campaign, ReleaseRound, Renew
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import EngineState, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Abort, Commit, EngineRoute, Join, RoundComplete, RoundPlan

__all__ = (
    "Lead",
    "LeaderHandler",
    "LeaderTable",
    "Leadership",
    "concerns",
    "in_group",
    "main_round",
)

MAX_ENGINES = 4096
"""What a plan can name."""
REASON_CHARS = 4096
"""What messages hold of a reason."""
GONE = "its consumer is gone"
"""Why a member that left presence does not serve the version."""


class Lead(Enum):
    """Where a round is, for one of its engines."""

    HEARD = "heard"
    CANDIDATE = "candidate"
    COLLECTING = "collecting"
    WATCHING = "watching"
    REGROUPING = "regrouping"
    REPLANNING = "replanning"
    OVER = "over"


LEADING = frozenset({Lead.COLLECTING, Lead.WATCHING, Lead.REGROUPING, Lead.REPLANNING})


def main_round(version: int) -> str:
    """Id of the round that brings `version` to all engines that are present."""
    return f"v{version}"


def concerns(message: Join | RoundPlan, ready: CheckpointReady) -> bool:
    """Whether a message is about this very checkpoint; a version may be published again.

    A sender that does not tell (0) is believed.
    """
    return message.checkpoint_ns in (0, ready.created_ns)


def in_group(part: EngineRoute) -> bool:
    """Whether some rank of an engine depends on other engines."""
    return any(rank.route == "broadcast" for rank in part.ranks)


class Leadership:
    """One round. Its handlers are called through its table only."""

    def __init__(
        self,
        version: int,
        config: RoundConfig,
        planner: Planner,
        effects: Effects,
        present: Mapping[str, EngineState],
    ) -> None:
        self.round = main_round(version)
        self.version = version
        self.phase = Lead.HEARD
        self.plan: RoundPlan | None = None
        """The plan of the latest epoch that is known."""
        self._config = config
        self._planner = planner
        self._effects = effects
        self._present = present
        """The other engines of the model; owned by the machine."""
        self._ready: CheckpointReady | None = None
        self._layout_digest: str | None = None
        self._leader: str | None = None
        """Engine id of the last known leader."""
        self._epoch = 0
        """Of the lease that was won last: the next plan has it; 0: none was won."""
        self._joins: dict[str, Join] = {}
        self._members: set[str] = set()
        """Every engine that any plan of the round names."""
        self._reports: dict[str, UpdateComplete | UpdateFailed] = {}
        self._serving: set[str] = set()
        """Engines whose presence says that they serve this version or a later one."""
        self._lost: dict[str, str] = {}
        """Engine id -> why it will not report."""
        self._alone: set[str] = set()
        """Engines that go for this version in a round of their own."""
        self._proven: set[str] = set()
        self._aborted_epoch = 0
        """Of the last plan whose group was given up; 0: none was."""
        self._committed_epoch = 0
        """Of the last plan that was committed; 0: none was."""
        self._planned_ns = 0
        self._deadline_ns = 0
        self._give_up_ns = 0
        self._said_ns = 0

    # What the member's half asks for.

    def enter(self, ready: CheckpointReady, layout_digest: str | None) -> None:
        """The engine joins the round, of which it has only heard so far, for `ready`."""
        self._ready = ready
        self._layout_digest = layout_digest
        self.phase = Lead.CANDIDATE
        self._campaign()

    def leave(self) -> None:
        """The engine goes on without the round; what it has planned, it leads to the end."""
        planned = self._config.engine in self._members
        if self.phase in (Lead.HEARD, Lead.COLLECTING) or (
            self.phase is Lead.CANDIDATE and not planned
        ):
            self.finish()

    def finish(self) -> None:
        """Nothing more is to be done for the round here."""
        if self.phase in LEADING:
            self._effects.put(ReleaseRound(self.round))
        self._cancel_timers()
        self.phase = Lead.OVER

    # Handlers: the lease.

    def won(self, event: LeaseWon) -> None:
        """Lead: collect joins, or watch over the plan that an earlier leader made."""
        self._epoch = event.epoch
        self._leader = self._config.engine
        self._effects.cancel_timers(self._timer(Timer.CAMPAIGN))
        self._set_timer(Timer.RENEW, self._config.round_ttl_s / 3)
        if self.plan is None:
            self.phase = Lead.COLLECTING
            self._set_timer(Timer.WINDOW, self._config.join_window_s)
            self._plan_if_all_joined()
        else:
            self._watch()

    def won_again(self, event: LeaseWon) -> None:
        """Two campaigns were under way, and both were answered."""
        self._epoch = max(self._epoch, event.epoch)

    def won_next_epoch(self, event: LeaseWon) -> None:
        """Plan for those of the broken group that have joined again."""
        if event.epoch <= self._epoch:
            return
        self._epoch = event.epoch
        self._effects.cancel_timers(self._timer(Timer.CAMPAIGN))
        joins = {engine: self._joins[engine] for engine in self._rest() if self._broke(engine)}
        if joins:
            self._make_plan(joins)
        else:
            self._watch()

    def won_too_late(self, event: LeaseWon) -> None:
        """The round was left while a campaign was under way."""
        self._effects.put(ReleaseRound(event.round))

    def held(self, event: LeaseHeld) -> None:
        self._leader = event.leader

    def step_down(self, event: Event) -> None:
        """Someone else leads, or will: watch for the end, and campaign again in a while."""
        self._cancel_timers()
        self.phase = Lead.CANDIDATE
        self._set_timer(Timer.CAMPAIGN, self._config.round_ttl_s)

    def campaign_again(self, event: Event) -> None:
        if self.plan is not None and self._effects.now_ns > self._give_up_ns:
            self.finish()
        else:
            self._campaign()

    def renew(self, event: Event) -> None:
        self._effects.put(Renew(self.round))
        self._set_timer(Timer.RENEW, self._config.round_ttl_s / 3)

    # Handlers: joins and plans.

    def keep_join(self, event: JoinSeen) -> None:
        """The last join of an engine counts; an old one that comes late does not."""
        join = event.join
        known = self._joins.get(join.engine)
        if known is None and len(self._joins) >= MAX_ENGINES:
            return
        if (
            known is None
            or known.consumer != join.consumer
            or known.broken_epoch <= join.broken_epoch
        ):
            self._joins[join.engine] = join
        if join.engine not in self._members:
            self._lost.pop(join.engine, None)
        self._reconsider()

    def answer_join(self, event: JoinSeen) -> None:
        """Whoever joins after the plan has not heard it, or its group broke. The plan is said
        again, but not all the time."""
        self.keep_join(event)
        broke = self._broke(event.join.engine)
        if self.plan is not None and not broke and self._effects.now_ns >= self._said_ns:
            self._said_ns = self._effects.at_ns(self._config.repeat_s)
            self._effects.send(self.plan)

    def window_ended(self, event: Event) -> None:
        """Whoever has not joined by now is not waited for."""
        self._make_plan(self._joins)

    def keep_plan(self, event: PlanSeen) -> None:
        self._take_plan(event.plan)

    def heard_plan(self, event: PlanSeen) -> None:
        """A plan while leading: ours comes back; a later one ends our leading; an earlier one, of a
        leader before us, is under way, so that nothing is left but to watch."""
        before = self.plan
        self._take_plan(event.plan)
        if event.plan.epoch > self._epoch:
            self.step_down(event)
        elif self.plan is not before:
            self._watch()

    # Handlers: reports and presence.

    def keep_report(self, event: UpdateSeen) -> None:
        """The last report of an engine counts; but once complete, complete."""
        update = event.update
        if not isinstance(self._reports.get(update.engine), UpdateComplete):
            self._reports[update.engine] = update
        self._reconsider()

    def keep_proof(self, event: ProvenSeen) -> None:
        self._proven.add(event.proven.engine)
        self._reconsider()

    def answer_proof(self, event: ProvenSeen) -> None:
        """Whoever still says so after the commit has not heard it."""
        if self.plan is not None and self.plan.epoch == self._committed_epoch:
            self._say_commit(self.plan)
        self.keep_proof(event)

    def keep_solo(self, event: WentAlone) -> None:
        self._alone.add(event.engine)
        self._reconsider()

    def keep_state(self, event: EngineSeen) -> None:
        """Presence tells what a lost report would have told, and who has left the round."""
        state = event.state
        join = self._joins.get(state.engine)
        if state.version >= self.version:
            self._serving.add(state.engine)
        elif state.target_version > self.version:
            self._lost[state.engine] = f"it went on to version {state.target_version}"
        elif state.status == "stopping":
            self._lost[state.engine] = "it is stopping"
        elif join is not None and join.consumer != state.consumer:
            self._lost[state.engine] = "its consumer was started again"
        elif self._lost.get(state.engine) == GONE:
            del self._lost[state.engine]
        self._reconsider()

    def keep_loss(self, event: EngineGone) -> None:
        self._lost[event.engine] = GONE
        self._reconsider()

    def suspect_leader(self, event: EngineGone) -> None:
        """If the leader is gone, its lease is about to expire."""
        self.keep_loss(event)
        if event.engine == self._leader:
            self._campaign()

    def regroup_window_ended(self, event: Event) -> None:
        self._win_next_epoch()

    def budget_ended(self, event: Event) -> None:
        self._close("it did not report within the round's budget")

    def heard_end(self, event: RoundCompleteSeen) -> None:
        """Another leader has closed the round; one of an earlier epoch does not know the plan."""
        if self.plan is None or event.complete.epoch >= self.plan.epoch:
            self.finish()

    # Steps.

    def _reconsider(self) -> None:
        """There is news: is it enough to go on?"""
        match self.phase:
            case Lead.COLLECTING:
                self._plan_if_all_joined()
            case Lead.WATCHING:
                self._look()
            case Lead.REGROUPING:
                self._replan_if_regrouped()

    def _campaign(self) -> None:
        self._effects.put(Campaign(self.round))
        self._set_timer(Timer.CAMPAIGN, self._config.round_ttl_s)

    def _plan_if_all_joined(self) -> None:
        for state in self._present.values():
            expected = (
                state.version < self.version
                and state.target_version <= self.version
                and state.status != "stopping"
            )
            heard_of = state.engine in self._joins or self._gave_up(state.engine)
            if expected and not heard_of:
                return
        self._make_plan(self._joins)

    def _make_plan(self, joins: Mapping[str, Join]) -> None:
        """Plan for `joins` in the epoch that was won, and say so."""
        ready = self._ready
        assert ready is not None, "only an engine that has entered the round leads it"
        chosen = tuple(
            join
            for engine, join in sorted(joins.items())
            if engine not in self._lost and concerns(join, ready)
        )
        request = PlanRequest(
            joins=chosen,
            ready=ready,
            round=self.round,
            epoch=self._epoch,
            leader=self._config.engine,
            late=False,
            commit=self._config.commit,
            budgets=self._config.budgets,
            now_ns=self._effects.now_ns,
        )
        try:
            plan = self._planner(request)
        except WeightBusError as error:
            self._close(f"no plan: {type(error).__name__}: {error}")
            return
        self._take_plan(plan)
        self._said_ns = self._effects.at_ns(self._config.repeat_s)
        self._effects.send(plan)
        self._watch()

    def _take_plan(self, plan: RoundPlan) -> None:
        if self._ready is not None and not concerns(plan, self._ready):
            return
        self._members.update(part.engine for part in plan.engines)
        if self.plan is not None and plan.epoch <= self.plan.epoch:
            return
        if self.plan is None:
            self._planned_ns = self._effects.now_ns
        self.plan = plan
        self._deadline_ns = self._effects.at_ns(plan.budgets.round_s)
        self._give_up_ns = self._effects.at_ns(2 * plan.budgets.round_s)

    def _watch(self) -> None:
        self.phase = Lead.WATCHING
        self._effects.cancel_timers(self._timer(Timer.WINDOW), self._timer(Timer.CAMPAIGN))
        self._effects.set_timer(self._timer(Timer.ROUND), self._deadline_ns)
        self._look()

    def _look(self) -> None:
        """While watching: is a group broken, is all proven, is all done?"""
        plan = self.plan
        assert plan is not None, "a round is watched from its first plan on"
        group = self._group()
        lost = tuple(engine for engine in group if self._gave_up(engine))
        broken = lost or any(self._broke(engine) for engine in group)
        if broken and self._rest() and plan.epoch > self._aborted_epoch:
            self._abort(plan, lost)
            return
        waiting = {engine for engine in self._members if not self._settled(engine)}
        if not waiting:
            self._close("")
            return
        unproven = waiting - self._alone - self._proven
        if plan.commit == "together" and not unproven and plan.epoch > self._committed_epoch:
            self._say_commit(plan)

    def _abort(self, plan: RoundPlan, lost: tuple[str, ...]) -> None:
        """The group of `plan` is broken: say so, and collect its members again."""
        self._aborted_epoch = plan.epoch
        self.phase = Lead.REGROUPING
        self._set_timer(Timer.WINDOW, self._config.regroup_s)
        reason = "; ".join(f"{engine}: {self._why(engine)}" for engine in lost)
        self._effects.send(
            Abort(
                model=self._config.model,
                version=self.version,
                round=self.round,
                epoch=plan.epoch,
                lost=lost,
                reason=reason[:REASON_CHARS],
            )
        )
        self._replan_if_regrouped()

    def _replan_if_regrouped(self) -> None:
        if all(self._broke(engine) for engine in self._rest()):
            self._win_next_epoch()

    def _win_next_epoch(self) -> None:
        self.phase = Lead.REPLANNING
        self._effects.cancel_timers(self._timer(Timer.WINDOW))
        self._campaign()

    def _say_commit(self, plan: RoundPlan) -> None:
        self._committed_epoch = plan.epoch
        self._effects.send(
            Commit(
                model=self._config.model,
                version=self.version,
                round=self.round,
                epoch=plan.epoch,
            )
        )

    def _close(self, missing: str) -> None:
        """Say `RoundComplete`; `missing` is the reason of those who have not reported."""
        members = sorted(self._members or self._joins)
        failed = {
            engine: (self._why(engine) or missing)[:REASON_CHARS]
            for engine in members
            if not self._completed(engine)
        }
        reports = [self._reports.get(engine) for engine in members]
        self._effects.send(
            RoundComplete(
                model=self._config.model,
                version=self.version,
                round=self.round,
                epoch=self._epoch if self.plan is None else self.plan.epoch,
                leader=self._config.engine,
                completed=tuple(engine for engine in members if engine not in failed),
                failed=failed,
                layout_digest=self._layout_digest,
                bytes=sum(r.bytes for r in reports if isinstance(r, UpdateComplete)),
                engines=len(members),
                started_ns=self._planned_ns,
                ended_ns=self._effects.now_ns,
                trace_id=next((r.trace_id for r in reports if r is not None), ""),
            )
        )
        self.finish()

    # Questions.

    def _group(self) -> list[str]:
        """Engines of the current plan that depend on each other."""
        plan = self.plan
        return [] if plan is None else [part.engine for part in plan.engines if in_group(part)]

    def _rest(self) -> list[str]:
        """Engines of the current plan's group that still have to get the version."""
        return [
            engine
            for engine in self._group()
            if not (self._settled(engine) or engine in self._alone or engine in self._proven)
        ]

    def _broke(self, engine: str) -> bool:
        """Whether an engine has said that the group of the current plan broke."""
        join, plan = self._joins.get(engine), self.plan
        return join is not None and plan is not None and join.broken_epoch >= plan.epoch > 0

    def _completed(self, engine: str) -> bool:
        return engine in self._serving or isinstance(self._reports.get(engine), UpdateComplete)

    def _gave_up(self, engine: str) -> bool:
        """Whether an engine will not get the version in this round."""
        return not self._completed(engine) and (
            engine in self._lost or engine in self._reports or engine in self._alone
        )

    def _settled(self, engine: str) -> bool:
        return engine in self._reports or engine in self._lost or engine in self._serving

    def _why(self, engine: str) -> str:
        report = self._reports.get(engine)
        if isinstance(report, UpdateFailed):
            return f"{report.cause}: {report.reason}"
        return self._lost.get(engine, "")

    # Timers.

    def _timer(self, timer: Timer) -> str:
        return f"{timer}:{self.round}"

    def _set_timer(self, timer: Timer, delay_s: float) -> None:
        self._effects.set_timer(self._timer(timer), self._effects.at_ns(delay_s))

    def _cancel_timers(self) -> None:
        self._effects.cancel_timers(
            *map(self._timer, (Timer.CAMPAIGN, Timer.WINDOW, Timer.RENEW, Timer.ROUND))
        )


LeaderHandler = Callable[[Leadership, Any], None]
LeaderTable = Mapping[Lead, Mapping[type[Event] | Timer, LeaderHandler]]
"""Phase -> event (or timer) -> handler."""

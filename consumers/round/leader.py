"""The leader's half of the round machine: one round as one of its engines sees it. Does no I/O.

Phases and rules are in `table.py`; here is what happens in a transition.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from weightbus.consumers.round.config import Origin, Planner, PlanRequest, RoundConfig
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
from weightbus.consumers.round.phases import Lead
from weightbus.consumers.round.roll import Roll
from weightbus.consumers.round.work import REASON_CHARS, concerns, main_round
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import EngineState, UpdateComplete
from weightbus.schemas.rounds import Abort, Commit, RoundComplete, RoundPlan

__all__ = ("LeaderHandler", "LeaderTable", "Leadership")

LEADING = frozenset({Lead.COLLECTING, Lead.WATCHING, Lead.REGROUPING, Lead.REPLANNING})


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
        self._roll = Roll(version)
        self._config = config
        self._planner = planner
        self._effects = effects
        self._present = present
        """The other engines of the model; owned by the machine."""
        self._ready: CheckpointReady | None = None
        self._layout_digest: str | None = None
        self._origin = Origin()
        self._leader: str | None = None
        """Engine id of the last known leader."""
        self._epoch = 0
        """Of the lease that was won last: the next plan has it; 0: none was won."""
        self._aborted_epoch = 0
        """Of the last plan whose group was given up; 0: none was."""
        self._committed_epoch = 0
        """Of the last plan that was committed; 0: none was."""
        self._planned_ns = 0
        self._deadline_ns = 0
        self._give_up_ns = 0
        self._said_ns = 0

    @property
    def plan(self) -> RoundPlan | None:
        """The plan of the latest epoch that is known."""
        return self._roll.plan

    # What the member's half asks for.

    def enter(self, ready: CheckpointReady, layout_digest: str | None, origin: Origin) -> None:
        """The engine joins the round, of which it has only heard so far, for `ready`."""
        self._ready = ready
        self._layout_digest = layout_digest
        self._origin = origin
        self.phase = Lead.CANDIDATE
        self._campaign()

    def leave(self) -> None:
        """The engine goes on without the round; what it has planned, it leads to the end."""
        planned = self._config.engine in self._roll.members
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
        again = {engine for engine in self._roll.rest_of_group() if self._roll.broke(engine)}
        if again:
            self._make_plan(again)
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
        self._roll.keep_join(event.join)
        self._reconsider()

    def answer_join(self, event: JoinSeen) -> None:
        """Whoever joins after the plan has not heard it, or its group broke. The plan is said
        again, but not all the time."""
        self.keep_join(event)
        broke = self._roll.broke(event.join.engine)
        if self.plan is not None and not broke and self._effects.now_ns >= self._said_ns:
            self._said_ns = self._effects.at_ns(self._config.repeat_s)
            self._effects.send(self.plan)

    def window_ended(self, event: Event) -> None:
        """Whoever has not joined by now is not waited for."""
        self._make_plan(self._roll.joins)

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
        self._roll.keep_report(event.update)
        self._reconsider()

    def keep_proof(self, event: ProvenSeen) -> None:
        self._roll.proven.add(event.proven.engine)
        self._reconsider()

    def answer_proof(self, event: ProvenSeen) -> None:
        """Whoever still says so after the commit has not heard it."""
        if self.plan is not None and self.plan.epoch == self._committed_epoch:
            self._say_commit(self.plan)
        self.keep_proof(event)

    def keep_solo(self, event: WentAlone) -> None:
        self._roll.alone.add(event.engine)
        self._reconsider()

    def keep_state(self, event: EngineSeen) -> None:
        self._roll.keep_state(event.state)
        self._reconsider()

    def keep_loss(self, event: EngineGone) -> None:
        self._roll.keep_loss(event.engine)
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
            heard_of = state.engine in self._roll.joins or self._roll.gave_up(state.engine)
            if expected and not heard_of:
                return
        self._make_plan(self._roll.joins)

    def _make_plan(self, engines: Container[str]) -> None:
        """Plan for those of `engines` that can be planned for, in the epoch that was won."""
        ready = self._ready
        assert ready is not None, "only an engine that has entered the round leads it"
        candidates = self._roll.candidates(ready)
        request = PlanRequest(
            joins=tuple(join for engine, join in candidates.items() if engine in engines),
            origin=self._origin,
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
        first = self.plan is None
        if not self._roll.keep_plan(plan):
            return
        if first:
            self._planned_ns = self._effects.now_ns
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
        roll = self._roll
        group = roll.group()
        lost = tuple(engine for engine in group if roll.gave_up(engine))
        broken = lost or any(roll.broke(engine) for engine in group)
        if broken and roll.rest_of_group() and plan.epoch > self._aborted_epoch:
            self._abort(plan, lost)
            return
        waited_for = roll.waited_for()
        if not waited_for:
            self._close("")
            return
        unproven = waited_for - roll.alone - roll.proven
        if plan.commit == "together" and not unproven and plan.epoch > self._committed_epoch:
            self._say_commit(plan)

    def _abort(self, plan: RoundPlan, lost: tuple[str, ...]) -> None:
        """The group of `plan` is broken: say so, and collect its members again."""
        self._aborted_epoch = plan.epoch
        self.phase = Lead.REGROUPING
        self._set_timer(Timer.WINDOW, self._config.regroup_s)
        reason = "; ".join(f"{engine}: {self._roll.why(engine)}" for engine in lost)
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
        if all(self._roll.broke(engine) for engine in self._roll.rest_of_group()):
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
        roll = self._roll
        members = sorted(roll.members or roll.joins)
        failed = {
            engine: (roll.why(engine) or missing)[:REASON_CHARS]
            for engine in members
            if not roll.completed(engine)
        }
        reports = [roll.reports.get(engine) for engine in members]
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

"""The simulation would notice: machines with one broken transition, and what it breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.sim.__main__ import main
from tests.sim.consumer import Consumer
from tests.sim.scenario import MakeMachine, Simulation
from tests.sim.world import Broken
from weightbus.consumers.planner import plan_request
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.config import RoundConfig
from weightbus.consumers.round.effects import Timer
from weightbus.consumers.round.errors import UnexpectedEvent
from weightbus.consumers.round.leader import Leadership
from weightbus.consumers.round.machine import RoundMachine
from weightbus.consumers.round.member import Member
from weightbus.consumers.round.phases import Lead, Phase
from weightbus.consumers.round.table import LEADER_TABLE, MEMBER_TABLE

SEEDS = 200
"""Every mutation is caught within so many."""

NEWEST = 2**62
"""Newer than every version: served, it leaves none to go for."""

Key = tuple[Phase | Lead, type[ev.Event] | Timer]
Handler = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Mutation:
    """Transitions put in the place of the right ones, and what the simulation then says."""

    name: str
    transitions: Mapping[Key, Handler]
    symptom: str

    @property
    def make(self) -> MakeMachine:
        member = {phase: dict(row) for phase, row in MEMBER_TABLE.items()}
        leader = {phase: dict(row) for phase, row in LEADER_TABLE.items()}
        for (phase, key), handler in self.transitions.items():
            if isinstance(phase, Phase):
                member[phase][key] = handler
            else:
                leader[phase][key] = handler

        def make(config: RoundConfig) -> RoundMachine:
            return RoundMachine(config, plan_request, member_table=member, leader_table=leader)

        return make


def nothing(half: object, event: object) -> None:
    """The event is ignored."""


def resume_without_proof(member: Member, event: ev.TransferFailed) -> None:
    member.transferred(ev.TransferDone(event.token, "verified", ("local",)))


def forget_the_touch(member: Member, event: ev.TransferFailed) -> None:
    touched = member.touched
    member.transfer_failed(event)
    member.touched = touched


def go_for_whatever_comes(member: Member, event: ev.CheckpointSeen) -> None:
    member._versions.serve(NEWEST)
    member.floor = event.ready.version - 1
    member.learn_and_settle(event)


def trust_a_failed_resume(member: Member, event: ev.ResumeFailed) -> None:
    member.resumed(ev.Resumed(event.token))


def forget_what_may_be_served(member: Member, event: ev.ResumeFailed) -> None:
    member.floor = member.served
    member.resume_failed(event)


def forget_the_doubt(member: Member, event: ev.ResumeFailed) -> None:
    member.resume_failed(event)
    member._doubtful = None


def only_wait(leadership: Leadership, event: ev.TimerFired) -> None:
    leadership.step_down(event)


def close_at_the_first_report(leadership: Leadership, event: ev.UpdateSeen) -> None:
    leadership.keep_report(event)
    if leadership.phase is Lead.WATCHING:
        leadership.budget_ended(event)


def lead_in_an_epoch_of_its_own_making(leadership: Leadership, event: ev.LeaseWon) -> None:
    leadership.won(ev.LeaseWon(event.round, 1))


def commit_at_the_first_proof(leadership: Leadership, event: ev.ProvenSeen) -> None:
    leadership.keep_proof(event)
    if leadership.phase is Lead.WATCHING and leadership.plan is not None:
        leadership._say_commit(leadership.plan)


def go_for_every_newer_version(member: Member, event: ev.CheckpointSeen) -> None:
    member._replaced = 0
    member.learn_and_reconsider(event)


def stay_in_a_broken_group(member: Member, event: ev.TransferFailed) -> None:
    member.transfer_failed(event)
    if member.phase is Phase.REPLANNING:
        member._effects.cancel_timers(Timer.REPLAN)


MUTATIONS = (
    Mutation(
        "resumes without proof",
        {(Phase.TRANSFERRING, ev.TransferFailed): resume_without_proof},
        "claims version",
    ),
    Mutation(
        "ignores that parameters were touched",
        {(Phase.TRANSFERRING, ev.TransferFailed): forget_the_touch},
        "takes its engine to serve",
    ),
    Mutation(
        "accepts an older version",
        {(Phase.IDLE, ev.CheckpointSeen): go_for_whatever_comes},
        "goes back",
    ),
    Mutation(
        "takes a failed resume for a good one",
        {(Phase.RESUMING, ev.ResumeFailed): trust_a_failed_resume},
        "complete before it is",
    ),
    Mutation(
        "forgets that a failed resume may have worked",
        {(Phase.RESUMING, ev.ResumeFailed): forget_what_may_be_served},
        "goes back",
    ),
    Mutation(
        "never says that a resume worked after all",
        {(Phase.RESUMING, ev.ResumeFailed): forget_the_doubt},
        "has never said that",
    ),
    Mutation(
        "never campaigns again",
        {(Lead.CANDIDATE, Timer.CAMPAIGN): only_wait},
        "was never closed",
    ),
    Mutation(
        "closes the round at the first report",
        {(Lead.WATCHING, ev.UpdateSeen): close_at_the_first_report},
        "is closed before",
    ),
    Mutation(
        "numbers its epochs itself",
        {(Lead.CANDIDATE, ev.LeaseWon): lead_in_an_epoch_of_its_own_making},
        "two plans of epoch 1",
    ),
    Mutation(
        "commits at the first proof",
        {(Lead.WATCHING, ev.ProvenSeen): commit_at_the_first_proof},
        "is committed before",
    ),
    Mutation(
        "waits for a plan without a deadline",
        {(Phase.TRANSFERRING, ev.TransferFailed): stay_in_a_broken_group},
        "without timer replan",
    ),
    Mutation(
        "waits for ever for a plan that does not come",
        {(Phase.JOINING, ev.PlanSeen): nothing, (Phase.JOINING, Timer.NEGOTIATE): nothing},
        "without timer negotiate",
    ),
    Mutation(
        "goes for every newer version",
        {(Phase.PREPARING, ev.CheckpointSeen): go_for_every_newer_version},
        "never transfers one",
    ),
    Mutation(
        "forgets what comes during a transfer",
        {(Phase.TRANSFERRING, ev.CheckpointSeen): nothing},
        "has not said why",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_simulation_notices_when_a_transition_is_broken(mutation: Mutation) -> None:
    for seed in range(SEEDS):
        try:
            Simulation(seed, mutation.make).run()
        except Broken as error:
            if mutation.symptom in str(error):
                return
    pytest.fail(f"a machine that {mutation.name} passes {SEEDS} seeds")


class AnswersTwice(Consumer):
    """A driver that gives the answer to a `Transfer` or a `Resume` once more."""

    def _answer(self, token: int, event: ev.Event) -> None:
        super()._answer(token, event)
        if isinstance(event, ev.TransferDone | ev.TransferFailed | ev.Resumed):
            self.feed(event)


class ForgetsToAnswer(Consumer):
    """A driver that does not report a transfer that fails."""

    def _answer(self, token: int, event: ev.Event) -> None:
        if not isinstance(event, ev.TransferFailed):
            super()._answer(token, event)


class AnswersBeforeTheEnd(Consumer):
    """A driver that calls a transfer cancelled while it goes on, and answers again at its end."""

    def _cancel_transfer(self, order: do.CancelTransfer) -> None:
        early = ev.TransferFailed(order.token, "TransferCancelled", "cancelled", touched=False)
        self._world.after(0.001, self.feed, early)


class KeepsBrokenGroups(Consumer):
    """A driver that takes a group for ready after it broke."""

    def _drop_groups(self, groups: set[str]) -> None:
        pass


@pytest.mark.parametrize(
    ("driver", "symptom"),
    [
        (AnswersTwice, "cannot happen in phase"),
        (ForgetsToAnswer, "has been owed an answer"),
        (AnswersBeforeTheEnd, "cannot happen in phase"),
        (KeepsBrokenGroups, "is taken again after it broke"),
    ],
)
def test_simulation_notices_when_the_driver_breaks_its_word(
    driver: type[Consumer], symptom: str
) -> None:
    for seed in range(SEEDS):
        try:
            Simulation(seed, driver=driver).run()
        except (Broken, UnexpectedEvent) as error:
            if symptom in str(error):
                return
    pytest.fail(f"{driver.__name__} passes {SEEDS} seeds")


def test_command_shows_the_log_and_how_to_replay_when_a_seed_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--seeds", "20"], MUTATIONS[0].make) == 1
    *log, failure, replay = capsys.readouterr().out.splitlines()
    seed = int(failure.split()[1])
    assert "failed: Broken: engine" in failure
    assert replay == f"replay: python -m tests.sim --seeds 1 --first {seed} --log"
    assert "TransferFailed" in "".join(log)


def test_command_says_how_many_held_when_none_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--first", "5"]) == 0
    assert capsys.readouterr().out.startswith("3 seeds held")

"""The tables, and how events are passed to the two halves."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from tests.unit.consumers.machines import Driver, join, plan_of, ready
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.effects import Effects, Timer
from weightbus.consumers.round.errors import UnexpectedEvent
from weightbus.consumers.round.phases import Lead, Phase
from weightbus.consumers.round.rounds import _CONCERNED
from weightbus.consumers.round.table import LEADER_TABLE, MEMBER_TABLE
from weightbus.schemas.rounds import RoundPlan

MEMBER_KEYS = {key for row in MEMBER_TABLE.values() for key in row}
LEADER_KEYS = {key for row in LEADER_TABLE.values() for key in row}


def test_tables_have_a_row_for_every_phase() -> None:
    assert set(MEMBER_TABLE) == set(Phase)
    assert set(LEADER_TABLE) == set(Lead)


def test_tables_take_every_event_and_every_timer() -> None:
    assert set(get_args(ev.Event)) - {ev.TimerFired} | set(Timer) == MEMBER_KEYS | LEADER_KEYS


def test_rounds_find_whom_an_event_concerns_when_the_leader_s_table_takes_it() -> None:
    assert {key for key in LEADER_KEYS if not isinstance(key, Timer)} | {ev.TimerFired} == set(
        _CONCERNED
    )


@pytest.mark.parametrize(
    "event",
    [ev.CheckpointSeen(ready(1)), ev.TransferDone(1, "verified", ()), ev.Resumed(1)],
)
def test_event_raises_when_the_phase_does_not_have_it(event: ev.Event) -> None:
    with pytest.raises(UnexpectedEvent, match="phase new"):
        Driver().feed(event)


def test_start_raises_when_it_comes_twice() -> None:
    with pytest.raises(UnexpectedEvent, match="Started"):
        Driver().start().start()


@pytest.mark.parametrize("name", ["join", "negotiate"])
def test_timer_is_ignored_when_it_was_cancelled(name: str) -> None:
    driver = Driver().start().joined(1)
    token = driver.last(do.SetTimer, name).token
    driver.planned(plan_of(1, {"a": "local"}))
    assert driver.feed(ev.TimerFired(name, token)) == ()


def test_timer_is_ignored_when_it_was_set_anew() -> None:
    driver = Driver().start().joined(1)
    token = driver.last(do.SetTimer, "join").token
    driver.fire("join")
    assert driver.feed(ev.TimerFired("join", token)) == ()


def test_own_messages_change_nothing_when_the_bus_brings_them_back() -> None:
    driver = Driver().start().joined(1)
    driver.feed(ev.LeaseWon("v1", 9))
    (plan,) = driver.said(RoundPlan)
    before = len(driver.orders)
    driver.feed(ev.JoinSeen(join("a", 1, consumer="a-1")))
    driver.feed(ev.PlanSeen(plan))
    assert [type(order) for order in driver.orders[before:]] in ([], [do.Send])


def test_round_in_hand_is_kept_when_many_newer_ones_are_only_heard_of() -> None:
    driver = Driver().start().joined(1)
    for version in range(2, 60):
        driver.feed(ev.JoinSeen(join("b", version)))
    assert driver.leadership(1).phase is Lead.CANDIDATE
    assert len(driver.machine.rounds.known) == 16


def test_state_is_put_only_when_it_has_changed() -> None:
    driver = Driver().start(served=3)
    assert driver.count(do.SetState) == 1
    driver.feed(ev.JoinSeen(join("b", 4)))
    assert driver.count(do.SetState) == 1


def test_effects_number_every_action_when_many_are_wanted() -> None:
    effects = Effects()
    effects.set_timer("a", 1)
    effects.set_timer("a", 2)
    effects.cancel_timers("a", "b")
    first, second, cancel = effects.end()
    assert isinstance(first, do.SetTimer)
    assert isinstance(second, do.SetTimer)
    assert first.token != second.token
    assert cancel == do.CancelTimer("a")
    assert effects.end() == ()


def test_machine_starts_no_loop_and_loads_no_engine_when_it_is_imported() -> None:
    code = (
        "import sys; import weightbus.consumers.round.machine;"
        "print({'torch', 'numpy', 'nats', 'zmq', 'anyio', 'random'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

"""What an engine does for all engines of a round, if the lease falls to it."""

from __future__ import annotations

import pytest

from tests.unit.consumers.machines import Driver, join, make_plan, plan_of, state
from weightbus.consumers.errors import PlanError
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.config import PlanRequest
from weightbus.consumers.round.phases import Lead
from weightbus.consumers.round.rounds import MAX_ROUNDS
from weightbus.schemas.base import RouteName
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Abort, Commit, Proven, RoundComplete, RoundPlan


def complete(engine: str, version: int = 1) -> ev.UpdateSeen:
    return ev.UpdateSeen(
        UpdateComplete(
            model="m",
            version=version,
            round=f"v{version}",
            engine=engine,
            verified="verified",
            routes=("local",),
            bytes=3,
            start_ns=0,
            end_ns=1,
        )
    )


def failed(engine: str, version: int = 1) -> ev.UpdateSeen:
    return ev.UpdateSeen(
        UpdateFailed(
            model="m",
            version=version,
            round=f"v{version}",
            engine=engine,
            cause="WorkerLost",
            reason="died",
        )
    )


def proven(engine: str) -> ev.ProvenSeen:
    return ev.ProvenSeen(Proven(model="m", version=1, round="v1", epoch=9, engine=engine))


def collecting(*others: str, **config: object) -> Driver:
    """Leads round v1 in epoch 9, while `others` are present."""
    driver = Driver(**config).start()
    for engine in others:
        driver.feed(ev.EngineSeen(state(engine)))
    driver.joined(1, "local")
    driver.feed(ev.LeaseWon("v1", 9))
    return driver


def watching(*others: str, **config: object) -> Driver:
    """Has planned round v1 for itself and `others`, in epoch 9."""
    driver = collecting(*others, **config)
    for engine in others:
        driver.feed(ev.JoinSeen(join(engine, 1)))
    return driver


def watching_group(*others: str) -> Driver:
    """As `watching`, but `others` are a broadcast group; the leader itself goes `local`."""
    driver = collecting(*others)
    for engine in others:
        driver.feed(ev.JoinSeen(join(engine, 1, route="broadcast")))
    return driver


def lead(driver: Driver) -> Lead:
    return driver.leadership(1).phase


# Candidates.


def test_candidate_campaigns_again_when_its_timer_fires() -> None:
    driver = Driver().start().joined(1)
    driver.feed(ev.LeaseHeld("v1", "b"))
    assert driver.count(do.Campaign) == 1
    driver.fire("campaign:v1")
    assert driver.count(do.Campaign) == 2


def test_candidate_campaigns_at_once_when_the_leader_is_gone() -> None:
    driver = Driver().start().joined(1)
    driver.feed(ev.LeaseHeld("v1", "b"))
    driver.feed(ev.EngineGone("c"))
    assert driver.count(do.Campaign) == 1
    driver.feed(ev.EngineGone("b"))
    assert driver.count(do.Campaign) == 2


def test_candidate_watches_for_the_end_when_its_own_update_is_done() -> None:
    driver = Driver().start().joined(1).planned(plan_of(1, {"a": "local", "b": "local"}))
    driver.transferred().resumed()
    assert lead(driver) is Lead.CANDIDATE
    driver.feed(ev.LeaseWon("v1", 12))
    assert lead(driver) is Lead.WATCHING
    driver.feed(complete("b"))
    (end,) = driver.said(RoundComplete)
    assert (end.epoch, end.completed) == (1, ("a", "b"))


def test_candidate_gives_up_when_the_round_is_long_over_its_budget() -> None:
    driver = Driver().start().joined(1).planned(plan_of(1, {"a": "local", "b": "local"}))
    driver.transferred().resumed()
    driver.now_ns += 400 * 10**9
    driver.fire("campaign:v1")
    assert lead(driver) is Lead.OVER


def test_lease_is_given_back_when_the_round_was_left_meanwhile() -> None:
    driver = Driver().start().joined(1).see(2)
    driver.feed(ev.LeaseWon("v1", 9))
    assert driver.orders[-1] == do.ReleaseRound("v1")


def test_lease_is_given_back_when_the_round_is_not_known() -> None:
    driver = Driver().start()
    assert driver.feed(ev.LeaseWon("v1", 9)) == (do.ReleaseRound("v1"),)
    assert driver.feed(ev.LeaseHeld("v1", "b")) == ()


# Collecting.


def test_leader_plans_at_once_when_it_is_alone() -> None:
    driver = collecting()
    (plan,) = driver.said(RoundPlan)
    assert (plan.epoch, plan.leader) == (9, "a")
    assert driver.last(do.Transfer).plan == plan


def test_leader_waits_when_a_present_engine_has_not_joined() -> None:
    driver = collecting("b")
    assert driver.said(RoundPlan) == []
    driver.feed(ev.JoinSeen(join("b", 1)))
    (plan,) = driver.said(RoundPlan)
    assert [part.engine for part in plan.engines] == ["a", "b"]


def test_leader_plans_with_earlier_joins_when_they_came_before_its_own() -> None:
    driver = Driver().start()
    driver.feed(ev.EngineSeen(state("b")))
    driver.feed(ev.JoinSeen(join("b", 1)))
    driver.joined(1)
    driver.feed(ev.LeaseWon("v1", 9))
    assert len(driver.said(RoundPlan)[0].engines) == 2


def test_leader_plans_without_it_when_an_engine_misses_the_window() -> None:
    driver = collecting("b")
    driver.fire("window:v1")
    (plan,) = driver.said(RoundPlan)
    assert [part.engine for part in plan.engines] == ["a"]


@pytest.mark.parametrize(
    "event",
    [
        ev.EngineGone("b"),
        ev.EngineSeen(state("b", status="stopping")),
        ev.EngineSeen(state("b", version=1)),
        ev.EngineSeen(state("b", target=2)),
        failed("b"),
        ev.PlanSeen(plan_of(1, {"b": "local"}, round="v1-b-x-1")),
    ],
    ids=["gone", "stopping", "serves it", "went on", "failed", "goes alone"],
)
def test_leader_does_not_wait_when_an_engine_will_not_join(event: ev.Event) -> None:
    driver = collecting("b")
    driver.feed(event)
    assert len(driver.said(RoundPlan)) == 1


def test_join_does_not_count_when_it_is_for_an_earlier_publication() -> None:
    driver = Driver().start()
    driver.see(1, created_ns=99).prepared()
    driver.feed(ev.JoinSeen(join("b", 1)))
    driver.feed(ev.LeaseWon("v1", 9))
    (plan,) = driver.said(RoundPlan)
    assert [part.engine for part in plan.engines] == ["a"]


def test_round_is_closed_and_engines_go_alone_when_no_plan_can_be_made() -> None:
    driver = Driver().start().joined(1)

    def refuse(request: PlanRequest) -> RoundPlan:
        if request.late:
            return make_plan(request)
        raise PlanError("round", request.round, "no")

    driver.planner = refuse
    driver.feed(ev.LeaseWon("v1", 9))
    (end,) = driver.said(RoundComplete)
    assert "PlanError" in end.failed["a"]
    assert do.ReleaseRound("v1") in driver.orders
    assert driver.last(do.Transfer).late


def test_leader_keeps_its_lease_when_the_renewal_is_due() -> None:
    driver = collecting("b", join_window_s=10.0)
    driver.fire("renew:v1")
    assert driver.count(do.Renew) == 1
    assert "renew:v1" in driver.machine.timers


def test_leader_only_watches_when_an_earlier_leader_s_plan_comes() -> None:
    driver = collecting("b")
    driver.planned(plan_of(1, {"a": "local", "b": "local"}, epoch=5))
    assert lead(driver) is Lead.WATCHING
    assert driver.last(do.Transfer).plan.epoch == 5
    assert "window:v1" not in driver.machine.timers


def test_leader_steps_down_when_a_later_leader_s_plan_comes() -> None:
    driver = collecting("b")
    driver.planned(plan_of(1, {"a": "local", "b": "local"}, epoch=11))
    assert lead(driver) is Lead.CANDIDATE
    assert driver.last(do.Transfer).plan.epoch == 11


def test_leader_steps_down_when_its_lease_is_lost() -> None:
    driver = collecting("b")
    driver.feed(ev.LeaseLost("v1"))
    assert lead(driver) is Lead.CANDIDATE
    assert {"window:v1", "renew:v1"}.isdisjoint(driver.machine.timers)
    assert "campaign:v1" in driver.machine.timers


def test_leader_gives_the_round_up_when_a_newer_version_comes() -> None:
    driver = collecting("b").see(2)
    assert lead(driver) is Lead.OVER
    assert do.ReleaseRound("v1") in driver.orders


# Watching.


def test_round_is_closed_when_every_engine_has_reported() -> None:
    driver = watching("b", "c").transferred().resumed()
    driver.feed(failed("b"))
    assert driver.said(RoundComplete) == []
    driver.feed(complete("c"))
    (end,) = driver.said(RoundComplete)
    assert end.completed == ("a", "c")
    assert end.failed == {"b": "WorkerLost: died"}
    assert (end.engines, end.bytes, end.trace_id) == (3, 10, "f" * 32)
    assert do.ReleaseRound("v1") in driver.orders
    assert driver.machine.timers == frozenset()


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (ev.EngineGone("b"), "gone"),
        (ev.EngineSeen(state("b", target=2)), "went on to version 2"),
        (ev.EngineSeen(state("b", status="stopping")), "stopping"),
        (ev.EngineSeen(state("b", consumer="b-2")), "started again"),
    ],
)
def test_round_is_closed_with_the_reason_when_an_engine_leaves(
    event: ev.Event, reason: str
) -> None:
    driver = watching("b").transferred().resumed()
    driver.feed(event)
    (end,) = driver.said(RoundComplete)
    assert reason in end.failed["b"]


def test_engine_counts_as_done_when_presence_says_that_it_serves() -> None:
    driver = watching("b").transferred().resumed()
    driver.feed(ev.EngineSeen(state("b", version=1)))
    (end,) = driver.said(RoundComplete)
    assert end.completed == ("a", "b")


def test_engine_is_waited_for_when_it_comes_back_in_time() -> None:
    driver = watching("b", "c").transferred().resumed()
    driver.feed(ev.EngineGone("b"))
    driver.feed(ev.EngineSeen(state("b", target=1)))
    driver.feed(complete("c"))
    assert driver.said(RoundComplete) == []


def test_success_counts_when_it_follows_a_failure() -> None:
    driver = watching("b", "c").transferred().resumed()
    for event in (failed("b"), complete("b"), failed("b"), complete("c")):
        driver.feed(event)
    (end,) = driver.said(RoundComplete)
    assert end.failed == {}


def test_round_is_closed_when_its_budget_ends() -> None:
    driver = watching("b").transferred().resumed()
    driver.fire("round:v1")
    (end,) = driver.said(RoundComplete)
    assert "budget" in end.failed["b"]


def test_plan_is_said_again_but_not_too_often_when_someone_joins_late() -> None:
    driver = watching("b")
    driver.feed(ev.JoinSeen(join("c", 1)))
    assert len(driver.said(RoundPlan)) == 1
    driver.feed(ev.JoinSeen(join("c", 1)), after_s=0.2)
    driver.feed(ev.JoinSeen(join("b", 1)))
    plans = driver.said(RoundPlan)
    assert len(plans) == 2
    assert plans[0] == plans[1]


def test_round_is_left_to_the_other_when_another_leader_closes_it() -> None:
    driver = watching("b")
    end = RoundComplete(model="m", version=1, round="v1", epoch=11, leader="b")
    driver.feed(ev.RoundCompleteSeen(end))
    assert lead(driver) is Lead.OVER
    assert driver.said(RoundComplete) == []


def test_round_is_watched_on_when_a_leader_closes_it_that_does_not_know_the_plan() -> None:
    driver = watching("b")
    end = RoundComplete(model="m", version=1, round="v1", epoch=8, leader="b")
    driver.feed(ev.RoundCompleteSeen(end))
    assert lead(driver) is Lead.WATCHING


def test_round_is_led_to_its_end_when_a_newer_version_comes() -> None:
    driver = watching("b").transferred().resumed().see(2)
    assert lead(driver) is Lead.WATCHING
    driver.feed(complete("b"))
    assert len(driver.said(RoundComplete)) == 1


def test_rounds_are_released_when_the_service_stops() -> None:
    driver = watching("b").transferred().resumed()
    driver.feed(ev.Stop())
    assert do.ReleaseRound("v1") in driver.orders
    assert driver.machine.timers == frozenset()


def test_oldest_round_makes_room_when_too_many_are_known() -> None:
    driver = Driver().start()
    for version in range(MAX_ROUNDS + 3):
        driver.feed(ev.JoinSeen(join("b", version)))
    assert len(driver.machine.rounds.known) == MAX_ROUNDS
    assert "v2" not in driver.machine.rounds.known


def test_join_is_of_no_interest_when_its_version_is_served_already() -> None:
    driver = Driver().start(served=5)
    driver.feed(ev.JoinSeen(join("b", 5)))
    assert driver.machine.rounds.known == {}


# Committing together.


def test_commit_is_said_once_all_have_proof_when_all_shall_serve_together() -> None:
    driver = watching("b", "c", commit="together").transferred()
    driver.feed(proven("b"))
    assert driver.said(Commit) == []
    driver.feed(proven("c"))
    (commit,) = driver.said(Commit)
    assert commit.epoch == 9
    assert driver.count(do.Resume) == 1


@pytest.mark.parametrize(
    "event",
    [
        failed("c"),
        ev.EngineGone("c"),
        ev.PlanSeen(plan_of(1, {"c": "local"}, round="v1-c-x-1")),
    ],
    ids=["failed", "gone", "goes alone"],
)
def test_commit_does_not_wait_when_an_engine_has_left_the_round(event: ev.Event) -> None:
    driver = watching("b", "c", commit="together").transferred()
    driver.feed(proven("b"))
    driver.feed(event)
    assert len(driver.said(Commit)) == 1


def test_later_plan_is_committed_anew_when_an_earlier_one_was_committed() -> None:
    driver = watching("b", commit="together").transferred()
    driver.feed(proven("b"))
    plan = plan_of(1, {"a": "local", "b": "local"}, epoch=11, together=True)
    driver.planned(plan)
    driver.feed(ev.LeaseWon("v1", 12))
    assert [commit.epoch for commit in driver.said(Commit)] == [9, 11]


def test_commit_is_said_again_when_someone_has_not_heard_it() -> None:
    driver = watching("b", commit="together").transferred()
    driver.feed(proven("b"))
    driver.feed(proven("b"))
    assert len(driver.said(Commit)) == 2


# Groups.


def test_group_is_aborted_when_a_member_is_lost() -> None:
    driver = watching_group("b", "c", "d")
    driver.feed(ev.EngineGone("b"))
    (abort,) = driver.said(Abort)
    assert (abort.epoch, abort.lost) == (9, ("b",))
    assert "gone" in abort.reason
    assert lead(driver) is Lead.REGROUPING
    assert driver.member.phase.value == "transferring"


def test_rest_of_the_group_is_planned_anew_when_it_has_joined_again() -> None:
    driver = watching_group("b", "c", "d")
    driver.feed(failed("b"))
    driver.feed(ev.JoinSeen(join("c", 1, route="broadcast")))
    assert lead(driver) is Lead.REGROUPING
    for engine in ("c", "d"):
        driver.feed(ev.JoinSeen(join(engine, 1, route="broadcast", broken_epoch=9)))
    assert lead(driver) is Lead.REPLANNING
    assert driver.last(do.Campaign).round == "v1"
    driver.feed(ev.LeaseWon("v1", 9))
    assert lead(driver) is Lead.REPLANNING
    driver.feed(ev.LeaseWon("v1", 10))
    plan = driver.said(RoundPlan)[-1]
    assert (plan.epoch, [part.engine for part in plan.engines]) == (10, ["c", "d"])
    assert lead(driver) is Lead.WATCHING


def test_who_does_not_join_again_is_left_out_when_the_window_ends() -> None:
    driver = watching_group("b", "c", "d")
    driver.feed(failed("b"))
    driver.feed(ev.JoinSeen(join("c", 1, route="broadcast", broken_epoch=9)))
    driver.fire("window:v1")
    driver.feed(ev.LeaseWon("v1", 10))
    assert [part.engine for part in driver.said(RoundPlan)[-1].engines] == ["c"]


def test_group_is_aborted_when_a_member_says_that_it_broke() -> None:
    driver = watching_group("b", "c")
    driver.feed(ev.JoinSeen(join("c", 1, route="broadcast", broken_epoch=9)))
    (abort,) = driver.said(Abort)
    assert abort.lost == ()


def test_new_leader_regroups_when_the_old_one_died_with_its_group() -> None:
    plan = plan_of(1, {"a": "local", "b": "broadcast", "c": "broadcast"}, epoch=5)
    driver = Driver().start().joined(1).planned(plan)
    driver.feed(ev.JoinSeen(join("c", 1, route="broadcast", broken_epoch=5)))
    driver.feed(ev.LeaseWon("v1", 6))
    assert driver.said(Abort)[-1].epoch == 5
    assert driver.last(do.Campaign).round == "v1"


def test_nobody_is_planned_when_the_rest_has_finished_meanwhile() -> None:
    driver = watching_group("b", "c", "d")
    driver.feed(failed("b"))
    for engine in ("c", "d"):
        driver.feed(complete(engine))
    driver.feed(ev.LeaseWon("v1", 10))
    assert lead(driver) is Lead.WATCHING
    assert len(driver.said(RoundPlan)) == 1


def test_leader_steps_down_when_the_next_epoch_goes_to_another() -> None:
    driver = watching_group("b", "c")
    driver.feed(failed("b"))
    driver.feed(ev.JoinSeen(join("c", 1, route="broadcast", broken_epoch=9)))
    driver.feed(ev.LeaseHeld("v1", "c"))
    assert lead(driver) is Lead.CANDIDATE


def test_next_epoch_is_campaigned_for_again_when_no_answer_comes() -> None:
    driver = watching_group("b", "c")
    driver.feed(failed("b"))
    driver.feed(ev.JoinSeen(join("c", 1, route="broadcast", broken_epoch=9)))
    campaigns = driver.count(do.Campaign)
    driver.fire("campaign:v1")
    assert driver.count(do.Campaign) == campaigns + 1


@pytest.mark.parametrize("route", ["local", "p2p"])
def test_nothing_is_aborted_when_the_lost_engine_had_no_group(route: RouteName) -> None:
    driver = collecting("b", "c")
    driver.feed(ev.JoinSeen(join("b", 1, route=route)))
    driver.feed(ev.JoinSeen(join("c", 1, route=route)))
    driver.feed(ev.EngineGone("b"))
    assert driver.said(Abort) == []

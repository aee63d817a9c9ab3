"""What an engine does about its own version, phase by phase."""

from __future__ import annotations

import pytest

from tests.unit.consumers.machines import Driver, offer, plan_of, ready
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.errors import UnexpectedEvent
from weightbus.consumers.round.phases import Phase
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Abort, Commit, Join, Links, Proven, RoundComplete, RoundPlan


def commit(version: int, epoch: int = 1) -> ev.CommitSeen:
    return ev.CommitSeen(Commit(model="m", version=version, round=f"v{version}", epoch=epoch))


def abort(version: int, epoch: int = 1) -> ev.AbortSeen:
    return ev.AbortSeen(Abort(model="m", version=version, round=f"v{version}", epoch=epoch))


def end(version: int, epoch: int = 1) -> ev.RoundCompleteSeen:
    complete = RoundComplete(
        model="m", version=version, round=f"v{version}", epoch=epoch, leader="b"
    )
    return ev.RoundCompleteSeen(complete)


# Starting, resting.


def test_engine_is_told_to_prepare_when_a_first_version_is_seen() -> None:
    driver = Driver().start().see(1)
    prepare = driver.last(do.Prepare)
    assert prepare.ready.version == 1
    assert prepare.round == "v1"
    assert prepare.deadline_ns == driver.now_ns + 30 * 10**9
    assert driver.orders[-1] == do.SetState("updating", -1, 1)


def serving(version: int, created_ns: int) -> Driver:
    """Has brought a version to the engine itself."""
    driver = Driver().start().see(version, created_ns).prepared()
    driver.fire("negotiate")
    return driver.transferred().resumed()


def test_nothing_happens_when_the_served_version_is_heard_again() -> None:
    driver = serving(4, 100)
    assert driver.feed(ev.CheckpointSeen(ready(4, 100))) == ()
    assert driver.feed(ev.CheckpointSeen(ready(4, 101))) == ()


def test_nothing_happens_when_an_older_version_is_only_heard_of_late() -> None:
    driver = serving(4, 100)
    assert driver.feed(ev.CheckpointSeen(ready(3, 99))) == ()


def test_older_version_is_refused_once_when_it_is_published_after_the_served_one() -> None:
    driver = serving(5, 100).see(3, created_ns=101)
    (failed,) = driver.said(UpdateFailed)
    assert (failed.version, failed.round, failed.cause) == (3, "v3", "VersionNotNew")
    assert failed.reason == "version 3 is older than version 5, which is served"
    assert (failed.served_version, failed.quarantined, failed.trace_id) == (5, False, "f" * 32)
    assert driver.member.phase is Phase.IDLE
    assert driver.feed(ev.CheckpointSeen(ready(3, 101))) == ()
    driver.see(4, created_ns=102).see(3, created_ns=103)
    assert [failed.version for failed in driver.said(UpdateFailed)] == [3, 4, 3]


def test_older_version_is_refused_when_an_earlier_consumer_brought_the_served_one() -> None:
    driver = Driver().start(served=4).see(3)
    assert driver.said(UpdateFailed)[-1].cause == "VersionNotNew"
    assert driver.feed(ev.CheckpointSeen(ready(4))) == ()


def test_update_goes_on_when_an_older_version_is_refused() -> None:
    driver = serving(5, 100).see(6, created_ns=101).see(3, created_ns=102)
    assert driver.said(UpdateFailed)[-1].version == 3
    assert driver.member.target == 6
    assert driver.count(do.CancelPrepare) == 0


def test_engine_is_quarantined_when_its_last_consumer_left_it_touched() -> None:
    driver = Driver().start(served=4, touched=True)
    assert driver.member.phase is Phase.QUARANTINED
    assert driver.orders[-1] == do.SetState("quarantined", -1, -1)


def test_served_version_is_brought_back_when_the_engine_was_touched() -> None:
    driver = Driver().start(served=4, touched=True).see(4).prepared()
    assert driver.last(do.Transfer).late
    driver.transferred().resumed()
    assert driver.member.served == 4
    assert driver.orders[-1] == do.SetState("serving", 4, -1)


def test_served_version_is_brought_back_when_the_engine_lost_it() -> None:
    driver = Driver().start().joined(4).planned(plan_of(4, {"a": "local"})).transferred().resumed()
    driver.feed(ev.EngineLost("started anew"))
    assert driver.member.phase is Phase.PREPARING
    assert driver.orders[-1] == do.SetState("quarantined", -1, 4)


def test_engine_serves_on_when_it_was_wrongly_taken_for_lost() -> None:
    driver = Driver().start(served=4)
    driver.feed(ev.EngineLost("no answer"))
    assert driver.orders[-1] == do.SetState("quarantined", -1, -1)
    for version in (-1, 3, 5):
        assert driver.feed(ev.EngineServes(version)) == ()
    assert driver.feed(ev.EngineServes(4)) == (do.SetState("serving", 4, -1),)
    assert driver.member.phase is Phase.IDLE
    assert driver.feed(ev.EngineServes(4)) == ()


def doubtful(**config: object) -> Driver:
    """Engine `a` was told to serve version 1, and did not answer."""
    driver = Driver(**config).start(served=0).joined(1)
    driver.planned(plan_of(1, {"a": "local"})).transferred()
    token = driver.last(do.Resume).token
    driver.feed(ev.ResumeFailed(token, "EngineUnavailable", "silent", paused_s=10.0))
    return driver


def test_version_is_complete_when_the_resume_only_seemed_to_fail() -> None:
    driver = doubtful(backoff_s=10.0)
    assert driver.member.phase is Phase.QUARANTINED
    assert "retry" in driver.machine.timers
    assert not driver.said(UpdateComplete)
    driver.feed(ev.EngineServes(1), after_s=2.0)
    assert (driver.member.served, driver.member.phase) == (1, Phase.IDLE)
    assert "retry" not in driver.machine.timers
    (complete,) = driver.said(UpdateComplete)
    assert (complete.version, complete.round, complete.bytes) == (1, "v1", 7)
    assert complete.paused_s == pytest.approx(12.0)
    assert driver.feed(ev.EngineServes(1)) == ()


@pytest.mark.parametrize(("after_s", "paused_s"), [(-3600.0, 0.0), (100_000.0, 86_400.0)])
def test_pause_is_one_that_can_be_said_when_the_clock_was_set_since_the_resume_failed(
    after_s: float, paused_s: float
) -> None:
    driver = doubtful()
    driver.feed(ev.EngineServes(1), after_s=after_s)
    (complete,) = driver.said(UpdateComplete)
    assert complete.paused_s == paused_s
    assert complete.start_ns <= complete.end_ns


def test_version_is_complete_when_the_engine_is_found_while_it_is_tried_again() -> None:
    driver = doubtful()
    driver.fire("retry")
    assert driver.member.phase is Phase.PREPARING
    driver.feed(ev.EngineServes(1))
    assert [one.version for one in driver.said(UpdateComplete)] == [1]
    assert (driver.member.served, driver.member.phase) == (1, Phase.IDLE)


def test_newer_version_is_gone_for_when_the_engine_is_found_meanwhile() -> None:
    driver = doubtful().see(2)
    driver.feed(ev.EngineServes(1))
    assert [one.version for one in driver.said(UpdateComplete)] == [1]
    assert (driver.member.target, driver.member.phase) == (2, Phase.PREPARING)
    assert driver.orders[-1] == do.SetState("updating", 1, 2)


def test_version_is_complete_when_a_next_attempt_touched_nothing() -> None:
    for version in (1, 2):
        driver = doubtful()
        if version == 1:
            driver.fire("retry")
            driver.prepared("local")
        else:
            driver.joined(2).planned(plan_of(2, {"a": "local"}))
        driver.failed("SegmentUnavailable", touched=False)
        assert driver.member.phase is Phase.QUARANTINED, version
        driver.feed(ev.EngineServes(1))
        assert [one.version for one in driver.said(UpdateComplete)] == [1], version
        assert driver.member.served == 1, version


def test_only_the_second_attempt_is_complete_when_it_is_resumed_first() -> None:
    driver = doubtful()
    driver.fire("retry")
    driver.prepared("local").transferred().resumed()
    assert [one.version for one in driver.said(UpdateComplete)] == [1]
    driver.feed(ev.EngineLost("no answer"))
    driver.feed(ev.EngineServes(1))
    assert len(driver.said(UpdateComplete)) == 1


def test_engine_that_is_found_changes_nothing_when_a_version_is_moved() -> None:
    driver = Driver().start(served=4)
    driver.feed(ev.EngineLost("no answer"))
    driver.see(4).prepared()
    for step in (
        lambda: None,
        lambda: driver.transferred(),
        lambda: driver.feed(ev.Stop()),
        lambda: driver.resumed(),
    ):
        step()
        assert driver.feed(ev.EngineServes(4)) == ()
    assert driver.machine.stopped


# Preparing.


def test_join_is_said_when_a_first_attempt_is_prepared() -> None:
    driver = Driver().start(served=0).joined(1)
    (joined,) = driver.said(Join)
    assert (joined.round, joined.engine, joined.served_version) == ("v1", "a", 0)
    assert driver.last(do.Campaign).round == "v1"
    assert driver.machine.timers >= {"join", "negotiate", "campaign:v1"}


def test_engine_goes_alone_when_the_round_is_planned_already() -> None:
    driver = Driver().start().see(1).prepared(planned=plan_of(1, {"b": "local"}))
    transfer = driver.last(do.Transfer)
    assert transfer.late
    assert transfer.plan.round == "v1-a-a-1-1"
    assert driver.said(Join) == []
    assert driver.said(RoundPlan) == [transfer.plan]


def test_engine_joins_when_the_plan_was_made_for_an_earlier_publication() -> None:
    driver = Driver().start().see(1, created_ns=99).prepared(planned=plan_of(1, {"b": "local"}))
    assert driver.member.phase is Phase.JOINING


def test_engine_goes_alone_when_a_plan_was_heard_while_it_prepared() -> None:
    driver = Driver().start().see(1).planned(plan_of(1, {"a": "local", "b": "local"})).prepared()
    assert driver.last(do.Transfer).late


def test_newer_version_takes_over_when_it_comes_while_preparing() -> None:
    driver = Driver().start().see(1)
    token = driver.last(do.Prepare).token
    driver.see(2)
    assert do.CancelPrepare(token) in driver.orders
    assert do.ReleaseReader(1) in driver.orders
    assert driver.last(do.Prepare).ready.version == 2


def test_version_in_hand_is_finished_when_newer_ones_come_faster_than_it_can_be_prepared() -> None:
    driver = Driver().start()
    for version in range(1, 21):
        driver.see(version)
    prepares = [order for order in driver.orders if isinstance(order, do.Prepare)]
    assert [order.ready.version for order in prepares] == [1, 2, 3]
    driver.prepared().see(21).planned(plan_of(3, {"a": "local"})).transferred().resumed()
    assert driver.said(UpdateComplete)[-1].version == 3
    assert driver.last(do.Prepare).ready.version == 21
    driver.see(22).see(23).see(24)
    assert driver.last(do.Prepare).ready.version == 23


def test_version_in_hand_is_put_down_when_it_is_published_again_however_often() -> None:
    driver = Driver().start().see(1).see(2).see(3, created_ns=7).see(4)
    assert driver.member.target == 3
    driver.see(3, created_ns=8)
    assert driver.last(do.Prepare).ready.version == 4


def test_version_in_hand_is_put_down_when_it_is_retired_though_it_was_to_be_finished() -> None:
    driver = Driver().start().see(1).see(2).see(3).see(4)
    driver.feed(ev.CheckpointGone(3))
    assert driver.said(UpdateFailed)[-1].cause == "VersionRetired"
    assert driver.last(do.Prepare).ready.version == 4


def test_late_answer_is_ignored_when_its_prepare_was_cancelled() -> None:
    driver = Driver().start().see(1)
    token = driver.last(do.Prepare).token
    driver.see(2)
    assert driver.feed(ev.Prepared(token, ())) == ()
    assert driver.feed(ev.PrepareFailed(token, "X", "late")) == ()


def test_failure_is_reported_and_retried_alone_when_prepare_fails() -> None:
    driver = Driver().start(served=0).see(1)
    driver.feed(ev.PrepareFailed(driver.last(do.Prepare).token, "BusTimeout", "no answer"))
    (failed,) = driver.said(UpdateFailed)
    assert (failed.cause, failed.reason, failed.stage) == ("BusTimeout", "no answer", "negotiate")
    assert (failed.served_version, failed.quarantined) == (0, False)
    assert failed.trace_id == "f" * 32
    assert driver.count(do.CancelPrepare) == 0
    driver.fire("retry")
    driver.prepared()
    assert driver.last(do.Transfer).late


def test_version_is_not_tried_again_when_the_cause_is_permanent() -> None:
    driver = Driver().start().see(1)
    driver.feed(ev.PrepareFailed(driver.last(do.Prepare).token, "MessageInvalid", "no way"))
    assert driver.member.phase is Phase.IDLE
    assert driver.machine.timers == frozenset()


def test_failure_is_reported_when_the_version_in_hand_is_retired() -> None:
    driver = Driver().start().joined(1)
    driver.feed(ev.CheckpointGone(1, "overwritten"))
    (failed,) = driver.said(UpdateFailed)
    assert failed.cause == "VersionRetired"
    assert do.ReleaseReader(1) in driver.orders
    assert driver.machine.timers == frozenset()


def test_nothing_happens_when_another_producer_retires_a_version_of_the_same_number() -> None:
    driver = Driver().start().joined(1)
    assert driver.feed(ev.CheckpointGone(1, "overwritten", "another")) == ()
    driver.feed(ev.CheckpointGone(1, "overwritten", ready(1).producer))
    assert driver.said(UpdateFailed)[-1].cause == "VersionRetired"


def test_nothing_happens_when_another_version_is_retired() -> None:
    driver = Driver().start().see(0).joined(1)
    assert driver.feed(ev.CheckpointGone(0, "overwritten")) == ()


# Joining.


def test_join_is_said_again_with_growing_pauses_when_no_plan_comes() -> None:
    driver = Driver(repeat_s=0.1, repeat_max_s=0.3).start().joined(1)
    began_ns = driver.now_ns
    times_s = []
    for _ in range(4):
        driver.fire("join")
        times_s.append((driver.now_ns - began_ns) / 10**9)
    assert times_s == pytest.approx([0.1, 0.3, 0.6, 0.9])
    assert len(driver.said(Join)) == 5


def test_plan_is_run_when_it_names_the_engine() -> None:
    plan = plan_of(1, {"a": "local", "b": "local"})
    driver = Driver().start().joined(1).planned(plan)
    transfer = driver.last(do.Transfer)
    assert (transfer.plan, transfer.ready, transfer.late) == (plan, ready(1), False)
    assert transfer.deadline_ns == driver.now_ns + 120 * 10**9
    assert "join" not in driver.machine.timers


@pytest.mark.parametrize(
    "event",
    [ev.PlanSeen(plan_of(1, {"b": "local"})), end(1)],
    ids=["plan of others", "end of the round"],
)
def test_engine_goes_alone_when_the_round_goes_on_without_it(event: ev.Event) -> None:
    driver = Driver().start().joined(1)
    driver.feed(event)
    assert driver.last(do.Transfer).late


def test_engine_goes_alone_when_no_plan_comes_in_time() -> None:
    driver = Driver().start().joined(1)
    driver.fire("negotiate")
    assert driver.last(do.Transfer).late
    assert driver.machine.timers == frozenset()


def test_plan_is_ignored_when_it_is_of_another_publication() -> None:
    driver = Driver().start().see(1, created_ns=99).prepared()
    driver.planned(plan_of(1, {"a": "local"}))
    assert driver.member.phase is Phase.JOINING


def test_plan_of_a_group_is_not_run_when_it_was_aborted_before_it_came() -> None:
    driver = Driver().start().joined(1, "broadcast")
    driver.feed(abort(1, epoch=3))
    driver.planned(plan_of(1, {"a": "broadcast", "b": "broadcast"}, epoch=3))
    assert driver.count(do.Transfer) == 0
    driver.planned(plan_of(1, {"a": "broadcast", "c": "broadcast"}, epoch=4))
    assert driver.count(do.Transfer) == 1


def test_newer_version_takes_over_when_it_comes_while_joining() -> None:
    driver = Driver().start().joined(1).see(2)
    assert driver.last(do.Prepare).ready.version == 2
    assert driver.machine.timers == frozenset()
    assert driver.said(UpdateFailed) == []


def test_failure_names_the_planner_s_reason_when_no_way_is_left_alone() -> None:
    driver = Driver().start().joined(1, "broadcast")
    driver.fire("negotiate")
    (failed,) = driver.said(UpdateFailed)
    assert failed.cause == "PlanError"
    assert "broadcast needs two engines" in failed.reason


# Transferring.


def test_version_is_served_and_reported_when_the_transfer_is_proven() -> None:
    plan = plan_of(1, {"a": "local", "b": "local"})
    driver = Driver().start(served=0).joined(1).planned(plan)
    driver.now_ns += 10**9
    driver.transferred()
    assert driver.said(UpdateComplete) == []
    assert driver.last(do.Resume).version == 1
    driver.resumed()
    (done,) = driver.said(UpdateComplete)
    assert (done.version, done.round, done.bytes, done.paused_s) == (1, "v1", 7, 0.5)
    assert done.end_ns - done.start_ns == 10**9
    assert driver.orders[-2:] == [do.ReleaseReader(1), do.SetState("serving", 1, -1)]


def test_newer_version_waits_when_it_comes_during_a_transfer() -> None:
    driver = Driver().start().joined(1).planned(plan_of(1, {"a": "local"}))
    assert driver.feed(ev.CheckpointSeen(ready(2))) == ()
    driver.transferred().resumed()
    assert driver.last(do.Prepare).ready.version == 2


def test_engine_serves_on_when_the_transfer_fails_untouched() -> None:
    driver = Driver().start(served=0).joined(1).planned(plan_of(1, {"a": "local"}))
    driver.failed("SegmentUnavailable", touched=False)
    (failed,) = driver.said(UpdateFailed)
    assert (failed.cause, failed.stage, failed.quarantined) == (
        "SegmentUnavailable",
        "reload",
        False,
    )
    assert driver.orders[-1] == do.SetState("serving", 0, -1)


def test_engine_is_quarantined_when_the_transfer_fails_touched() -> None:
    driver = Driver().start(served=0).joined(1).planned(plan_of(1, {"a": "local"}))
    driver.failed("TornRead", touched=True)
    (failed,) = driver.said(UpdateFailed)
    assert (failed.quarantined, failed.served_version) == (True, -1)
    assert driver.orders[-1] == do.SetState("quarantined", -1, -1)
    driver.fire("retry")
    driver.prepared().failed("WorkerLost", touched=False)
    assert driver.member.touched


def test_previous_version_is_brought_back_when_the_newest_keeps_failing() -> None:
    driver = Driver(attempts_in_turn=2).start().joined(1).planned(plan_of(1, {"a": "local"}))
    driver.transferred().resumed().joined(2).planned(plan_of(2, {"a": "local"}))
    driver.failed("WorkerLost", touched=True)
    driver.fire("retry")
    driver.prepared().failed("WorkerLost", touched=True)
    assert driver.last(do.Prepare).ready.version == 1
    driver.prepared().transferred().resumed()
    assert (driver.member.served, driver.member.touched) == (1, False)


def test_version_is_given_up_when_it_fails_as_often_as_allowed() -> None:
    driver = Driver(max_attempts=2).start(served=0).joined(1).planned(plan_of(1, {"a": "local"}))
    driver.failed("WorkerLost", touched=False)
    driver.fire("retry")
    driver.prepared().failed("WorkerLost", touched=False)
    assert driver.member.phase is Phase.IDLE
    assert driver.machine.timers == frozenset({"campaign:v1"})


def test_own_round_is_closed_when_an_engine_alone_is_done() -> None:
    driver = Driver().start().see(1).prepared(planned=plan_of(1, {"b": "local"}))
    driver.transferred().resumed()
    (complete,) = driver.said(RoundComplete)
    assert (complete.completed, complete.failed, complete.bytes) == (("a",), {}, 7)


def test_own_round_is_closed_with_the_reason_when_an_engine_alone_fails() -> None:
    driver = Driver().start().see(1).prepared(planned=plan_of(1, {"b": "local"}))
    driver.failed("TornRead", touched=True)
    (complete,) = driver.said(RoundComplete)
    assert (complete.completed, complete.failed) == ((), {"a": "TornRead: the reason"})


@pytest.mark.parametrize(
    "answer",
    [
        ev.TransferDone(0, "verified", ("local",)),
        ev.TransferFailed(0, "X", "y", touched=False),
    ],
)
def test_answer_raises_when_it_is_not_the_one_that_is_owed(answer: ev.Event) -> None:
    driver = Driver().start().joined(1).planned(plan_of(1, {"a": "local"}))
    with pytest.raises(UnexpectedEvent, match="answer 0"):
        driver.feed(answer)


# Groups.


def in_group(**config: object) -> Driver:
    """Runs a plan in which it depends on `b`."""
    plan = plan_of(1, {"a": "broadcast", "b": "broadcast"}, epoch=3)
    return Driver(**config).start(served=0).joined(1, "broadcast", "p2p").planned(plan)


def test_join_tells_of_links_and_groups_until_a_group_breaks() -> None:
    driver = Driver(links=Links(p2p=7)).start(served=0).see(1)
    token = driver.last(do.Prepare).token
    answer = {"rendezvous": "tcp://h:1", "groups": ("g-2",)}
    driver.feed(ev.Prepared(token, (offer("broadcast", "p2p"),), **answer))  # type: ignore[arg-type]
    first = driver.said(Join)[-1]
    assert (first.links, first.rendezvous, first.groups) == (Links(p2p=7), "tcp://h:1", ("g-2",))
    driver.planned(plan_of(1, {"a": "broadcast", "b": "broadcast"}, epoch=3))
    driver.feed(abort(1, epoch=3))
    driver.failed("TransferCancelled", touched=True)
    again = driver.said(Join)[-1]
    assert (again.broken_epoch, again.rendezvous, again.groups) == (3, "tcp://h:1", ())


@pytest.mark.parametrize("route", ["local", "p2p"])
def test_abort_is_ignored_when_the_engine_depends_on_nobody(route: str) -> None:
    plan = plan_of(1, {"a": "p2p" if route == "p2p" else "local", "b": "broadcast"}, epoch=3)
    driver = Driver().start().joined(1).planned(plan)
    assert driver.feed(abort(1, epoch=3)) == ()


def test_transfer_is_cancelled_when_its_group_is_aborted() -> None:
    driver = in_group()
    token = driver.last(do.Transfer).token
    assert driver.feed(abort(1, epoch=3)) == (do.CancelTransfer(token),)
    driver.failed("TransferCancelled", touched=True)
    assert driver.member.phase is Phase.REPLANNING
    assert driver.said(Join)[-1].broken_epoch == 3
    assert driver.orders[-1] == do.SetState("quarantined", -1, 1)
    assert driver.said(UpdateFailed) == []


def test_engine_waits_for_the_next_plan_when_its_peer_is_lost() -> None:
    driver = in_group().failed("PeerLost", touched=False)
    assert driver.member.phase is Phase.REPLANNING
    driver.planned(plan_of(1, {"a": "broadcast", "c": "broadcast"}, epoch=4))
    assert driver.last(do.Transfer).plan.epoch == 4


def test_engine_runs_the_next_plan_when_it_came_before_the_cancel_was_done() -> None:
    driver = in_group()
    driver.feed(abort(1, epoch=3))
    driver.planned(plan_of(1, {"a": "p2p"}, epoch=4))
    driver.failed("TransferCancelled", touched=False)
    assert driver.last(do.Transfer).plan.epoch == 4


def test_transfer_is_cancelled_when_a_later_plan_needs_the_engine_in_a_group() -> None:
    driver = in_group()
    driver.planned(plan_of(1, {"a": "broadcast", "c": "broadcast"}, epoch=4))
    assert driver.member.phase is Phase.CANCELLING


def test_transfer_goes_on_when_a_later_plan_leaves_the_engine_out() -> None:
    driver = in_group()
    driver.planned(plan_of(1, {"b": "broadcast", "c": "broadcast"}, epoch=4))
    assert driver.member.phase is Phase.TRANSFERRING


def test_version_is_served_when_the_cancel_came_too_late() -> None:
    driver = in_group()
    driver.feed(abort(1, epoch=3))
    driver.transferred().resumed()
    assert driver.member.served == 1


@pytest.mark.parametrize(
    "event",
    [ev.PlanSeen(plan_of(1, {"b": "broadcast", "c": "broadcast"}, epoch=4)), end(1, epoch=4)],
    ids=["plan of others", "end of the round"],
)
def test_engine_of_a_broken_group_goes_alone_when_nobody_plans_for_it(event: ev.Event) -> None:
    driver = in_group().failed("PeerLost", touched=False)
    driver.planner = lambda request: plan_of(1, {"a": "p2p"}, round=request.round)
    driver.feed(event)
    assert driver.last(do.Transfer).late


def test_engine_of_a_broken_group_goes_alone_when_no_plan_comes_in_time() -> None:
    driver = in_group().failed("PeerLost", touched=False)
    driver.fire("replan")
    assert driver.said(UpdateFailed)[-1].cause == "PlanError"


def test_engine_goes_alone_when_groups_broke_as_often_as_allowed() -> None:
    driver = in_group(group_attempts=1)
    driver.failed("PeerLost", touched=False)
    assert driver.said(UpdateFailed)[-1].cause == "PlanError"


def test_newer_version_takes_over_when_it_comes_after_the_group_broke() -> None:
    driver = in_group().failed("PeerLost", touched=True).see(2)
    assert driver.last(do.Prepare).ready.version == 2
    assert driver.orders[-1] == do.SetState("quarantined", -1, 2)


def test_failure_is_reported_when_a_group_s_member_fails_by_itself() -> None:
    driver = in_group().failed("WorkerLost", touched=True)
    assert driver.said(UpdateFailed)[-1].cause == "WorkerLost"


# Committing together.


def proven() -> Driver:
    plan = plan_of(1, {"a": "local", "b": "local"}, epoch=3, together=True)
    return Driver(commit="together").start().joined(1).planned(plan).transferred()


def test_engine_waits_for_the_commit_when_all_shall_serve_together() -> None:
    driver = proven()
    assert driver.said(Proven)[-1].epoch == 3
    assert driver.count(do.Resume) == 0
    driver.fire("proven")
    assert len(driver.said(Proven)) == 2
    driver.feed(commit(1, epoch=2))
    assert driver.count(do.Resume) == 0
    driver.feed(commit(1, epoch=3))
    assert driver.count(do.Resume) == 1
    assert {"proven", "commit"}.isdisjoint(driver.machine.timers)


def test_engine_serves_by_itself_when_the_commit_does_not_come() -> None:
    driver = proven()
    driver.fire("commit")
    assert driver.count(do.Resume) == 1


def test_engine_serves_when_the_round_ends_without_a_commit() -> None:
    driver = proven()
    driver.feed(end(1, epoch=4))
    assert driver.count(do.Resume) == 1


def test_engine_serves_at_once_when_it_is_alone_in_a_plan_of_all_together() -> None:
    driver = Driver().start().joined(1).planned(plan_of(1, {"a": "local"}, together=True))
    driver.transferred()
    assert driver.count(do.Resume) == 1


def test_engine_waits_on_when_a_leader_ends_the_round_that_does_not_know_the_plan() -> None:
    driver = proven()
    driver.feed(end(1, epoch=2))
    assert driver.count(do.Resume) == 0


# Resuming.


def test_engine_is_quarantined_and_never_goes_back_when_the_resume_fails() -> None:
    driver = Driver().start().joined(1).planned(plan_of(1, {"a": "local"})).transferred().resumed()
    driver.joined(2).planned(plan_of(2, {"a": "local"})).transferred()
    driver.feed(ev.ResumeFailed(driver.last(do.Resume).token, "EngineUnavailable", "silent"))
    assert driver.said(UpdateFailed)[-1].stage == "commit"
    assert driver.member.touched
    assert driver.member.floor == 2
    driver.feed(ev.CheckpointGone(2))
    assert driver.member.phase is Phase.QUARANTINED
    assert "retry" not in driver.machine.timers


# Stopping.


def test_machine_stops_at_once_when_nothing_touches_the_engine() -> None:
    for driver in (Driver(), Driver().start(), Driver().start().see(1), Driver().start().joined(1)):
        driver.feed(ev.Stop())
        assert driver.machine.stopped
        assert driver.machine.timers == frozenset()
        assert driver.last(do.SetState).status == "stopping"


def test_transfer_is_cancelled_and_reported_when_the_service_stops() -> None:
    driver = Driver().start(served=0).joined(1).planned(plan_of(1, {"a": "local"}))
    driver.feed(ev.Stop())
    assert driver.count(do.CancelTransfer) == 1
    assert not driver.machine.stopped
    driver.failed("TransferCancelled", touched=True)
    assert driver.machine.stopped
    assert driver.said(UpdateFailed)[-1].quarantined


def test_proven_version_is_served_first_when_the_service_stops() -> None:
    driver = proven()
    driver.feed(ev.Stop())
    driver.resumed()
    assert driver.machine.stopped
    assert driver.said(UpdateComplete)[-1].version == 1


def test_everything_is_ignored_when_the_machine_has_stopped() -> None:
    driver = Driver().start()
    driver.feed(ev.Stop())
    assert driver.feed(ev.CheckpointSeen(ready(1))) == ()
    assert driver.feed(ev.Stop()) == ()

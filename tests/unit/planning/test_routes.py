"""Every engine that is planned gets one route, which all its ranks offered, and its lanes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.unit.planning.fleets import (
    GB,
    ROUTES,
    decide,
    join,
    large,
    many_joins,
    members_of,
    offer,
    planned,
    reason_of,
    remote,
    routes_of,
)
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.routes import PlanLimits, PlanSource
from weightbus.schemas import decode, encode
from weightbus.schemas.rounds import Join, Member, RoundPlan


@settings(max_examples=300, deadline=None)
@given(joins=many_joins(), late=st.booleans(), seed=st.integers(0, 2**32))
def test_plan_gives_each_engine_one_offered_route_when_joins_are_random(
    joins: list[Join], late: bool, seed: int
) -> None:
    decision = decide(*joins, late=late)
    shuffled = random.Random(seed).sample(joins, len(joins))
    assert decide(*shuffled, late=late) == decision, "the order of joins must not matter"
    by_id = {one.engine: one for one in joins}
    routes = routes_of(decision)
    assert set(routes) | set(decision.refused) == set(by_id)
    assert set(routes).isdisjoint(decision.refused)
    assert set(decision.costs) == set(routes)
    for engine, route in routes.items():
        offers = by_id[engine].ranks
        assert all(route in rank.routes for rank in offers)
        assert route == "local" or not all("local" in rank.routes for rank in offers)
        assert not (late and route == "broadcast")
    if decision.plan is not None:
        assert decode(encode(decision.plan), None, RoundPlan) == decision.plan
        for part in decision.plan.engines:
            assert [rank.rank for rank in part.ranks] == [
                rank.rank for rank in sorted(by_id[part.engine].ranks, key=lambda o: o.rank)
            ]


@settings(max_examples=300, deadline=None)
@given(joins=many_joins())
def test_lanes_name_one_rank_of_every_host_when_joins_are_random(joins: list[Join]) -> None:
    decision = decide(*joins)
    routes = routes_of(decision)
    hosts = {one.engine: one.host_id for one in joins}
    far = [one for one in joins if routes.get(one.engine) == "broadcast"]
    groups = decision.plan.groups if decision.plan else ()
    ranks: dict[str, set[Member]] = {}
    for one in far:
        members = {Member(one.engine, rank.rank) for rank in one.ranks}
        ranks[one.host_id] = ranks.get(one.host_id, set()) | members
    assert len(far) != 1
    assert len(groups) == max(map(len, ranks.values()), default=0)
    assert len({group.id for group in groups}) == len(groups)
    for group in groups:
        assert [hosts[member.engine] for member in group.members] == sorted(ranks)
        assert bool(group.rendezvous) == (len(ranks) > 1)
    for column, host in enumerate(sorted(ranks)):
        staged = [group.members[column] for group in groups]
        assert set(staged) == ranks[host]
        counts = [staged.count(member) for member in ranks[host]]
        assert max(counts) - min(counts) <= 1, "a host's ranks stage as many lanes each"


@settings(max_examples=100, deadline=None)
@given(joins=many_joins())
def test_engine_is_refused_only_when_no_route_or_no_memory_is_left(joins: list[Join]) -> None:
    refused = decide(*joins).refused
    by_id = {one.engine: one for one in joins}
    for engine, reason in refused.items():
        assert reason.startswith(f"engine {engine} is ")
        common = set(ROUTES).intersection(*(rank.routes for rank in by_id[engine].ranks))
        assert "local" not in common
        assert ("p2p" not in common) != ("short of memory" in reason)
    assert list(refused) == sorted(refused)


def test_engine_goes_local_when_it_offers_everything() -> None:
    both = [join(engine, offer(0, *ROUTES), host=engine) for engine in "ab"]
    assert routes_of(decide(*both)) == {"a": "local", "b": "local"}
    assert reason_of(decide(*both), "a").startswith("its host can read every segment: ")


def test_lanes_are_shared_out_when_hosts_have_unequal_ranks() -> None:
    decision = decide(remote("a", "h2", 2), remote("b", "h1", 3), remote("c", "h2"))
    assert members_of(decision) == [
        [("b", 0), ("a", 0)],
        [("b", 1), ("a", 1)],
        [("b", 2), ("c", 0)],
    ]
    assert {group.rendezvous for group in planned(decision).groups} == {"tcp://h1:1"}
    uneven = decide(remote("a", "h1", 4), remote("b", "h2", 3))
    assert [lane[1] for lane in members_of(uneven)] == [("b", 0), ("b", 1), ("b", 2), ("b", 0)]


def test_engines_of_unequal_cut_share_a_broadcast() -> None:
    two = [offer(rank, "broadcast", "p2p", needs="a", need_bytes=500) for rank in range(2)]
    four = [offer(rank, "broadcast", "p2p", needs="b", need_bytes=250) for rank in range(4)]
    decision = decide(join("a", *two, host="h1"), join("b", *four, host="h2"))
    assert routes_of(decision) == {"a": "broadcast", "b": "broadcast"}
    assert len(members_of(decision)) == 4


def test_engines_of_one_host_share_one_pull() -> None:
    decision = decide(remote("a", "h", rendezvous=""), remote("b", "h", rendezvous=""))
    assert members_of(decision) == [[("a", 0)], [("b", 0)]]
    assert reason_of(decision, "a").startswith("2 ranks of 1 host share it in 2 lanes: ")
    assert ", by p2p " in reason_of(decision, "a")


def test_engine_pulls_when_it_is_alone() -> None:
    decision = decide(remote("a", "h1"), join("b", offer(0, *ROUTES), host="h2"))
    assert routes_of(decision) == {"a": "p2p", "b": "local"}
    assert reason_of(decision, "a").startswith("no other engine could share a broadcast: ")
    assert planned(decision).groups == ()


def test_engine_pulls_when_it_cannot_stream_yet() -> None:
    unproven = join("c", offer(0, "p2p"), host="h3")
    decision = decide(remote("a", "h1"), remote("b", "h2"), unproven)
    assert routes_of(decision) == {"a": "broadcast", "b": "broadcast", "c": "p2p"}
    assert reason_of(decision, "c").startswith("it offers no broadcast: ")


def test_engine_pulls_when_only_some_of_its_ranks_go_nearer() -> None:
    mixed = join("a", offer(0, "local", "p2p"), offer(1, "broadcast", "p2p"))
    assert routes_of(decide(mixed)) == {"a": "p2p"}


def test_engine_pulls_when_no_group_can_meet_at_it() -> None:
    mute = remote("a", "h1", rendezvous="")
    decision = decide(mute, remote("b", "h2"), remote("c", "h3"))
    assert routes_of(decision) == {"a": "p2p", "b": "broadcast", "c": "broadcast"}
    assert reason_of(decision, "a").startswith("no group can meet at it: ")


def test_engine_pulls_when_it_is_late() -> None:
    decision = decide(remote("a", "h1"), remote("b", "h2"), late=True)
    assert routes_of(decision) == {"a": "p2p", "b": "p2p"}
    assert reason_of(decision, "a").startswith("it came late: no peer is disturbed: ")
    assert decide(join("a", offer(0, "broadcast")), late=True).refused == {
        "a": "engine a is offering broadcast on all its ranks: must offer local or p2p, "
        "since it came late: no peer is disturbed"
    }


def test_engine_is_refused_when_its_only_partner_is() -> None:
    decision = decide(
        join("a", offer(0, "broadcast"), offer(1)),
        join("b", offer(0, "broadcast")),
        join("c", offer(0, "p2p")),
    )
    assert routes_of(decision) == {"c": "p2p"}
    assert decision.refused == {
        "a": "engine a is offering nothing on all its ranks: must offer local or p2p",
        "b": "engine b is offering broadcast on all its ranks: must offer local or p2p, "
        "since no other engine could share a broadcast",
    }


def test_plan_is_none_when_every_engine_is_refused() -> None:
    decision = decide(join("a", offer(0)))
    assert decision.plan is None
    assert list(decision.refused) == ["a"]


def test_engine_is_refused_when_a_rank_joins_twice() -> None:
    decision = decide(join("a", offer(0, "local"), offer(0, "local")), join("b", offer(0, "local")))
    assert decision.refused == {"a": "join of engine a is [0, 0]: ranks must be unique"}


def test_latest_join_counts_when_an_engine_joins_again() -> None:
    first = join("a", offer(0, "p2p"), joined_ns=1)
    again = join("a", offer(0, "local"), joined_ns=2)
    assert routes_of(decide(first, again)) == routes_of(decide(again, first)) == {"a": "local"}


# Groups across plans.


def group_ids(*joins: Join, epoch: int = 3) -> list[str]:
    return [group.id for group in planned(decide(*joins, epoch=epoch)).groups]


def test_group_is_taken_again_when_all_members_are_ready_in_it() -> None:
    (first,) = group_ids(remote("a", "h1"), remote("b", "h2"), epoch=3)
    assert first.endswith("-3")
    ready = [remote(e, h, groups=(first,)) for e, h in (("a", "h1"), ("b", "h2"))]
    assert group_ids(*ready, epoch=9) == [first]
    later = first.replace("-3", "-5")
    both = [remote(e, h, groups=(first, later)) for e, h in (("a", "h1"), ("b", "h2"))]
    assert group_ids(*both, epoch=9) == [later]


@pytest.mark.parametrize(
    "second",
    [
        {"groups": ()},
        {"groups": ("{}0",)},
        {"broken_epoch": 8, "groups": ("{}",)},
        {"consumer": "other", "groups": ("{}",)},
    ],
)
def test_group_is_formed_anew_when_a_member_is_not_ready_in_it(second: dict[str, object]) -> None:
    (first,) = group_ids(remote("a", "h1"), remote("b", "h2"), epoch=3)
    if "groups" in second:
        names = tuple(name.format(first) for name in second["groups"])  # type: ignore[attr-defined]
        second = {**second, "groups": names}
    ready = [remote("a", "h1", groups=(first,)), remote("b", "h2", **second)]  # type: ignore[arg-type]
    assert group_ids(*ready, epoch=9)[0].endswith("-9")


def test_group_is_another_one_when_its_members_change() -> None:
    two = group_ids(remote("a", "h1"), remote("b", "h2"))
    three = group_ids(remote("a", "h1"), remote("b", "h2"), remote("c", "h3"))
    swapped = group_ids(remote("a", "h2"), remote("b", "h1"))
    assert len({two[0], three[0], swapped[0]}) == 3


def test_deadlines_grow_when_a_host_moves_many_bytes() -> None:
    limits = PlanLimits(slowest_bytes_per_s=1000)
    small = planned(decide(join("a", offer(0, "local")), limits=limits)).budgets
    assert (small.transfer_s, small.round_s) == (120.0, 180.0)
    ranks = [offer(rank, "local", need_bytes=200_000) for rank in range(2)]
    more = planned(decide(join("a", *ranks), limits=limits)).budgets
    assert (more.transfer_s, more.round_s) == (400.0, 440.0)
    pulled = planned(
        decide(remote("a", "h"), limits=limits, source=PlanSource(layout_bytes=600_000))
    )
    assert pulled.budgets.transfer_s == 600.0
    predicted = PlanLimits(predicted_times=4.0)
    slow = planned(decide(large("a", "h", network=GB), limits=predicted)).budgets
    assert slow.transfer_s == pytest.approx(100 * GB / (200 * 2**20))
    slower = planned(decide(large("a", "h", network=GB // 10), limits=predicted)).budgets
    assert slower.transfer_s > 4 * 100 * GB / (GB // 10)
    huge = offer(0, "local", need_bytes=2**49)
    assert planned(decide(join("a", huge), limits=limits)).budgets.round_s == 86_400.0


def test_plan_is_refused_when_nobody_joined() -> None:
    with pytest.raises(PlanError, match="at least one engine must join"):
        decide()


def test_plan_is_refused_when_a_join_is_of_another_version() -> None:
    other = structs.replace(join("b", offer(0, "local")), version=8)
    with pytest.raises(PlanError, match=r"join of engine b is .* must be of"):
        decide(join("a", offer(0, "local")), other)

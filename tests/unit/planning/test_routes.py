"""Every rank of every engine that is planned gets exactly one route that it offered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.routes import PlanLimits, RoundDecision, plan_round
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Join, RankOffer, RankRoute, RoundPlan

MIB = 2**20


def offer(
    rank: int, *routes: RouteName, needs: str = "a", need_bytes: int = 1000, free_bytes: int = 0
) -> RankOffer:
    return RankOffer(
        rank=rank,
        needs_digest=needs * 64,
        need_bytes=need_bytes,
        free_bytes=free_bytes,
        routes=routes,
    )


def join(engine: str, *ranks: RankOffer, host: str = "host", joined_ns: int = 0) -> Join:
    return Join(
        model="m",
        version=7,
        round="r",
        engine=engine,
        consumer="c",
        host_id=host,
        ranks=ranks,
        joined_ns=joined_ns,
    )


def decide(*joins: Join, late: bool = False, limits: PlanLimits | None = None) -> RoundDecision:
    return plan_round(
        joins,
        version=7,
        round_id="r",
        epoch=3,
        leader="lead",
        now_ns=11,
        late=late,
        limits=limits or PlanLimits(),
    )


def planned(decision: RoundDecision) -> RoundPlan:
    assert decision.plan is not None, decision.refused
    return decision.plan


def routes_of(decision: RoundDecision) -> dict[tuple[str, int], RankRoute]:
    if decision.plan is None:
        return {}
    return {(part.engine, rank.rank): rank for part in decision.plan.engines for rank in part.ranks}


def names_of(decision: RoundDecision) -> list[RouteName]:
    return [route.route for route in routes_of(decision).values()]


ROUTES: tuple[RouteName, ...] = ("local", "broadcast", "p2p")


@st.composite
def many_joins(draw: st.DrawFn) -> list[Join]:
    joins = []
    for number in range(draw(st.integers(1, 6))):
        ranks = [
            offer(
                rank,
                *draw(st.lists(st.sampled_from(ROUTES), unique=True)),
                needs=draw(st.sampled_from("ab")),
                free_bytes=draw(st.integers(0, 2**36)),
                need_bytes=draw(st.integers(0, 2**44)),
            )
            for rank in range(draw(st.integers(1, 4)))
        ]
        joins.append(join(f"e{number}", *ranks, host=draw(st.sampled_from(["h1", "h2", "h3"]))))
    return joins


@settings(max_examples=300, deadline=None)
@given(joins=many_joins(), late=st.booleans(), seed=st.integers(0, 2**32))
def test_plan_gives_each_rank_one_offered_route_when_joins_are_random(
    joins: list[Join], late: bool, seed: int
) -> None:
    decision = decide(*joins, late=late)
    shuffled = random.Random(seed).sample(joins, len(joins))
    assert decide(*shuffled, late=late) == decision, "the order of joins must not matter"
    routes = routes_of(decision)
    engines = {engine for engine, _ in routes}
    assert engines.isdisjoint(decision.refused)
    assert engines | set(decision.refused) == {one.engine for one in joins}
    offers = {(one.engine, rank.rank): rank for one in joins for rank in one.ranks}
    assert set(routes) == {key for key in offers if key[0] in engines}
    for key, route in routes.items():
        assert route.route in offers[key].routes
        assert route.route == "local" or "local" not in offers[key].routes
        assert (route.group is None) == (route.route != "broadcast")
        assert not (late and route.route == "broadcast")
    groups = decision.plan.groups if decision.plan else ()
    seen: set[tuple[str, int]] = set()
    for number, group in enumerate(groups):
        members = [(member.engine, member.rank) for member in group.members]
        assert len(members) == len(set(members)) >= 2
        assert seen.isdisjoint(members)
        seen.update(members)
        assert all(routes[member].group == number for member in members)
        assert len({(offers[m].rank, offers[m].needs_digest) for m in members}) == 1
    assert seen == {key for key, route in routes.items() if route.route == "broadcast"}


@settings(max_examples=100, deadline=None)
@given(joins=many_joins())
def test_engine_is_refused_only_when_some_rank_has_no_usable_route(joins: list[Join]) -> None:
    refused = decide(*joins).refused
    by_id = {one.engine: one for one in joins}
    for engine, reason in refused.items():
        assert f"of engine {engine} " in reason
        assert any(set(rank.routes) <= {"broadcast"} for rank in by_id[engine].ranks)
    assert list(refused) == sorted(refused)


def test_rank_goes_local_when_it_offers_everything() -> None:
    both = [join(engine, offer(0, "local", "broadcast", "p2p"), host=engine) for engine in "ab"]
    assert names_of(decide(*both)) == ["local", "local"]


def test_rth_ranks_form_one_group_when_replicas_are_on_two_hosts() -> None:
    replicas = [
        join(
            engine,
            offer(0, "broadcast", "p2p", needs="a"),
            offer(1, "broadcast", "p2p", needs="b"),
            host=host,
        )
        for engine, host in (("a", "h2"), ("b", "h1"), ("c", "h2"))
    ]
    plan = planned(decide(*replicas))
    members = [[(m.engine, m.rank) for m in group.members] for group in plan.groups]
    assert members == [[("b", 0), ("a", 0), ("c", 0)], [("b", 1), ("a", 1), ("c", 1)]]
    assert plan.engines[0].ranks[1].group == 1
    assert plan.engines[0].ranks[1].reason == "3 ranks on 2 hosts need the same bytes"


def test_ranks_broadcast_when_two_engines_on_one_host_share_needs() -> None:
    assert names_of(decide(join("a", offer(0, "broadcast")), join("b", offer(0, "broadcast")))) == [
        "broadcast",
        "broadcast",
    ]


def test_rank_pulls_when_nobody_shares_its_needs() -> None:
    decision = decide(
        join("a", offer(0, "broadcast", "p2p", needs="a")),
        join("b", offer(0, "broadcast", "p2p", needs="b")),
    )
    assert names_of(decision) == ["p2p", "p2p"]
    assert planned(decision).groups == ()


def test_rank_pulls_when_peers_go_local() -> None:
    decision = decide(
        join("a", offer(0, "local", "broadcast")), join("b", offer(0, "broadcast", "p2p"))
    )
    assert names_of(decision) == ["local", "p2p"]


def test_rank_pulls_when_it_is_late() -> None:
    replicas = [join(engine, offer(0, "broadcast", "p2p"), host=engine) for engine in "ab"]
    decision = decide(*replicas, late=True)
    assert names_of(decision) == ["p2p", "p2p"]
    assert decide(join("a", offer(0, "broadcast")), late=True).refused == {
        "a": "rank 0 of engine a is offering broadcast: must offer local or p2p"
    }


def test_engine_is_refused_when_its_only_partner_is() -> None:
    decision = decide(
        join("a", offer(0, "broadcast"), offer(1)),
        join("b", offer(0, "broadcast")),
        join("c", offer(0, "p2p")),
    )
    assert names_of(decision) == ["p2p"]
    assert decision.refused == {
        "a": "rank 1 of engine a is offering no route: no other rank needs the same bytes",
        "b": "rank 0 of engine b is offering broadcast: no other rank needs the same bytes",
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
    assert names_of(decide(first, again)) == names_of(decide(again, first)) == ["local"]


def test_bucket_shrinks_when_a_staging_rank_has_little_memory() -> None:
    limits = PlanLimits(bucket_bytes=256 * MIB, min_bucket_bytes=16 * MIB)
    small = offer(0, "p2p", free_bytes=400 * MIB)
    tiny = offer(1, "p2p", free_bytes=1 * MIB)
    roomy = offer(1, "local", free_bytes=1 * MIB)
    assert planned(decide(join("a", small), limits=limits)).bucket_bytes == 100 * MIB
    assert planned(decide(join("a", small, tiny), limits=limits)).bucket_bytes == 16 * MIB
    assert planned(decide(join("a", small, roomy), limits=limits)).bucket_bytes == 100 * MIB
    assert planned(decide(join("a", offer(0, "p2p")), limits=limits)).bucket_bytes == 256 * MIB


def test_deadlines_grow_when_a_host_moves_many_bytes() -> None:
    limits = PlanLimits(slowest_bytes_per_s=1000)
    small = planned(decide(join("a", offer(0, "local")), limits=limits)).budgets
    assert (small.transfer_s, small.round_s) == (120.0, 180.0)
    ranks = [offer(rank, "local", need_bytes=200_000) for rank in range(2)]
    large = planned(decide(join("a", *ranks), limits=limits)).budgets
    assert (large.transfer_s, large.round_s) == (400.0, 440.0)
    huge = offer(0, "local", need_bytes=2**49)
    assert planned(decide(join("a", huge), limits=limits)).budgets.round_s == 86_400.0


def test_plan_is_refused_when_nobody_joined() -> None:
    with pytest.raises(PlanError, match="at least one engine must join"):
        decide()


def test_plan_is_refused_when_a_join_is_of_another_version() -> None:
    other = structs.replace(join("b", offer(0, "local")), version=8)
    with pytest.raises(PlanError, match=r"join of engine b is .* must be of"):
        decide(join("a", offer(0, "local")), other)

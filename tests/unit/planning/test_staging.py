"""Slots fit into memory, and whoever has none is refused at once."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.fleets import (
    GB,
    decide,
    join,
    many_joins,
    offer,
    planned,
    reason_of,
    remote,
    roomy,
    routes_of,
)
from weightbus.consumers.planning.routes import PlanSource
from weightbus.consumers.planning.staging import (
    MIB,
    StagingLimits,
    fit_staging,
    full_staging,
    memory_of,
)
from weightbus.schemas.rounds import Join


@settings(max_examples=300, deadline=None)
@given(joins=many_joins())
def test_lanes_of_a_broadcast_fit_into_memory_when_joins_are_random(joins: list[Join]) -> None:
    decision = decide(*joins)
    if decision.plan is None:
        return
    plan, limits = decision.plan, StagingLimits()
    assert limits.min_bucket_bytes <= plan.bucket_bytes <= limits.bucket_bytes
    assert plan.bucket_bytes.bit_count() == 1
    assert 1 <= plan.slots <= 3
    by_id = {one.engine: one for one in joins}
    free = memory_of(joins)
    staged: dict[str, int] = {}
    for group in plan.groups:
        for member in group.members:
            staged[member.engine] = staged.get(member.engine, 0) + 1
    hosts: dict[str, int] = {}
    for engine, lanes in staged.items():
        taken = lanes * plan.slots * plan.bucket_bytes
        assert taken <= free.engines.get(engine, taken), engine
        host = by_id[engine].host_id
        hosts[host] = hosts.get(host, 0) + taken
    for host, taken in hosts.items():
        assert taken <= free.hosts.get(host, taken), host


LARGE = PlanSource(layout_bytes=100 * GB)


@pytest.mark.parametrize(
    ("free_mib", "bucket_mib", "slots"),
    [(0, 64, 3), (192, 64, 3), (191, 32, 3), (48, 16, 3), (47, 16, 2), (2, 1, 2), (1, 1, 1)],
)
def test_slots_shrink_when_an_engine_has_little_memory(
    free_mib: int, bucket_mib: int, slots: int
) -> None:
    plan = planned(decide(roomy("a", "h", free_mib), source=LARGE))
    assert (plan.bucket_bytes, plan.slots) == (bucket_mib * MIB, slots)


@given(room=st.integers(1, 2**30), full=st.integers(0, 10), slots=st.integers(1, 4))
def test_slots_fit_into_the_room_of_their_lane(room: int, full: int, slots: int) -> None:
    least = MIB
    most = full_staging(2**50, 1, StagingLimits(bucket_bytes=MIB << full, slots=slots))
    size = fit_staging(least + room, most, least)
    assert size.slots * size.bucket_bytes <= least + room
    assert least <= size.bucket_bytes <= most.bucket_bytes
    assert size.slots <= slots
    assert fit_staging(None, most, least) == most


@pytest.mark.parametrize(
    ("layout_bytes", "bucket_bytes"),
    [(0, MIB), (90 * 10**6, 4 * MIB), (2**30, 64 * MIB), (2**40, 64 * MIB)],
)
def test_slots_shrink_until_a_small_version_is_several_buckets(
    layout_bytes: int, bucket_bytes: int
) -> None:
    one = decide(remote("a", "h", 2), source=PlanSource(layout_bytes=layout_bytes))
    assert planned(one).bucket_bytes == bucket_bytes
    assert one.costs["a"].buckets >= 8 or not layout_bytes


def test_every_engine_keeps_to_its_own_memory_and_all_to_their_host_s() -> None:
    shared = planned(decide(roomy("a", "h", 384, 384), roomy("b", "h", 384, 384), source=LARGE))
    assert (shared.bucket_bytes, shared.slots) == (32 * MIB, 3)
    own = planned(decide(roomy("a", "h", 384, 384), source=LARGE))
    assert (own.bucket_bytes, own.slots) == (64 * MIB, 3)
    unequal = planned(decide(roomy("a", "h", 192), roomy("b", "h", 384), source=LARGE))
    assert (unequal.bucket_bytes, unequal.slots) == (64 * MIB, 3)
    near = join("b", offer(0, "local", free_bytes=1))
    assert planned(decide(roomy("a", "h", 0), near, source=LARGE)).bucket_bytes == 64 * MIB


def test_engine_that_pulls_with_little_memory_makes_nobody_else_s_slots_smaller() -> None:
    small = join("a", offer(0, "p2p", free_bytes=2 * MIB), host="h1")
    decision = decide(small, remote("b", "h2"), remote("c", "h3"), source=LARGE)
    plan = planned(decision)
    assert (plan.bucket_bytes, plan.slots) == (64 * MIB, 3)
    assert decision.costs["a"].buckets > 50 * decision.costs["b"].buckets


def test_engine_pulls_when_its_lanes_of_a_broadcast_need_more_than_it_has() -> None:
    decision = decide(roomy("a", "h1", 2), remote("b", "h2", 4), remote("c", "h3", 4))
    assert routes_of(decision) == {"a": "p2p", "b": "broadcast", "c": "broadcast"}
    assert reason_of(decision, "a").startswith(
        "too little memory for its host's lanes: staging may take 2097152 bytes for 4 lanes, "
        "which need 1048576 each: "
    )


def test_engine_is_refused_when_it_has_no_memory_for_one_slot() -> None:
    tight = join("a", offer(0, "broadcast", "p2p", free_bytes=MIB - 1), host="h1")
    decision = decide(tight, remote("b", "h2"))
    assert decision.refused == {
        "a": "engine a is short of memory for staging: staging may take 1048575 bytes for 1 lane, "
        "which need 1048576 each"
    }
    assert routes_of(decision) == {"b": "p2p"}


def test_last_engines_of_a_host_are_refused_when_its_memory_is_for_some() -> None:
    pulls = [join(e, offer(0, "p2p", free_bytes=2 * MIB), host="h") for e in "abcd"]
    decision = decide(*pulls)
    assert routes_of(decision) == {"a": "p2p", "b": "p2p"}
    assert list(decision.refused) == ["c", "d"]


def test_broadcast_is_taken_by_those_who_are_left_when_many_are_refused() -> None:
    fleet = [roomy(f"e{n:03}", f"h{n % 4}", 64) for n in range(400)]
    decision = decide(*fleet, source=LARGE)
    assert len(decision.refused) == 4 * (100 - 64)
    assert set(routes_of(decision).values()) == {"broadcast"}
    assert len(planned(decision).groups) == 64


@pytest.mark.parametrize("hosts", [1, 9, 2048])
def test_refusing_most_of_4096_ranks_takes_seconds(hosts: int) -> None:
    fleet = [roomy(f"e{n}", f"h{n % hosts}", 1) for n in range(4096)]
    start = time.perf_counter()
    decision = decide(*fleet, source=LARGE)
    assert time.perf_counter() - start < 10
    assert len(decision.refused) == 4096 - hosts

"""What a broadcast means for one host: lanes, owners, readers and names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec import structs

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.hosts import host_share, turn_of
from weightbus.schemas.rounds import EngineRoute, Group, Member, RankRoute, RoundPlan


def plan_of(*lanes: Sequence[tuple[str, int]]) -> RoundPlan:
    groups = tuple(
        Group(id=f"g{number}", members=tuple(Member(*member) for member in lane))
        for number, lane in enumerate(lanes)
    )
    return RoundPlan(
        model="m",
        version=1,
        round="v1",
        epoch=7,
        leader="a",
        engines=(EngineRoute(engine="a", ranks=(RankRoute(rank=0, route="broadcast"),)),),
        groups=groups,
        bucket_bytes=4096,
        slots=2,
    )


UNEVEN = plan_of(
    [("a", 0), ("c", 0), ("d", 0)], [("a", 1), ("c", 1), ("d", 0)], [("b", 0), ("c", 2), ("d", 0)]
)
"""Engines a (2 ranks) and b (1) on one host, c (3) and d (1) on others."""


def test_lanes_of_a_host_are_owned_by_those_who_stage_them_and_read_by_all() -> None:
    for engine, owned in (("a", [(0, 0), (1, 1)]), ("b", [(2, 0)])):
        share = host_share(UNEVEN, engine)
        assert share.place == 0
        assert [(lane.number, lane.rank) for lane in share.owned] == owned
        assert [lane.group.id for lane in share.owned] == [f"g{number}" for number, _ in owned]
        assert share.readers == (Member("a", 0), Member("a", 1), Member("b", 0))
        assert share.names == tuple(f"weightbus-stage.m.g{lane}.0.4096x2" for lane in range(3))


def test_rank_in_several_groups_owns_several_lanes_and_reads_as_one() -> None:
    share = host_share(UNEVEN, "d")
    assert (share.place, share.readers) == (2, (Member("d", 0),))
    assert [(lane.number, lane.rank) for lane in share.owned] == [(0, 0), (1, 0), (2, 0)]
    assert share.names[1] == "weightbus-stage.m.g1.2.4096x2"


def test_share_is_refused_when_no_group_names_the_engine() -> None:
    with pytest.raises(PlanError, match="must name our engine"):
        host_share(UNEVEN, "e")


def test_turn_differs_between_plans_and_is_never_zero() -> None:
    plans = [
        structs.replace(UNEVEN, epoch=epoch, created_ns=created_ns, round=name)
        for epoch in (0, 1, 2, 2**32, 2**32 + 1)
        for created_ns in (0, 1, 2**60)  # epochs begin again on a bus that lost its streams
        for name in ("v1", "v2")
    ]
    turns = [turn_of(plan) for plan in plans]
    assert len(set(turns)) == len(plans)
    assert all(0 < turn < 2**32 for turn in turns)
    assert turns == [turn_of(plan) for plan in plans]

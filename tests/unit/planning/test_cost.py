"""Predicted seconds follow from bytes and rates by the formulas of docs/cost-model.md."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from weightbus.consumers.planning.cost import (
    ASSUMED_LINKS,
    FORM_MEMBER_S,
    FORM_S,
    RouteCost,
    Site,
    Situation,
    assume,
    predict,
)
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Links

MB = 10**6
LINKS = Links(
    memory=100 * MB, disk=20 * MB, network=50 * MB, broadcast=10 * MB, p2p=5 * MB, cards=2
)
WORLD = Situation(
    layout_bytes=1000 * MB, source=LINKS, bucket_bytes=MB, slots=3, sources=1, ready=True
)


def site(engine: str, host: str, ranks: int = 2, **fields: object) -> Site:
    links = structs.replace(LINKS, **fields)
    return Site(engine=engine, host=host, ranks=ranks, need_bytes=1000 * MB, links=links)


def costs(
    *sites: Site, route: RouteName, world: Situation = WORLD, **routes: RouteName
) -> dict[str, RouteCost]:
    return predict(sites, {one.engine: routes.get(one.engine, route) for one in sites}, world)


def stages(cost: RouteCost) -> dict[str, object]:
    return {stage.name: (pytest.approx(stage.seconds), stage.limit) for stage in cost.stages}


def test_local_takes_what_memory_needs_for_all_ranks_of_the_host() -> None:
    alone = costs(site("a", "h"), route="local")["a"]
    assert (alone.seconds, alone.lane_bytes, alone.card_bytes) == (10.0, 0, 0)
    assert costs(site("a", "h"), site("b", "h"), route="local")["a"].seconds == 20.0


def test_local_reads_files_at_the_rate_of_the_disk() -> None:
    world = structs.replace(WORLD, files=True)
    cost = costs(site("a", "h"), route="local", world=world)["a"]
    assert stages(cost) == {"fetch": (50.0, "its disk"), "reload": (10.0, "its host's memory")}
    assert cost.buckets == 500
    assert cost.seconds == pytest.approx(50.0 + 10.0 / 500)


def test_pulling_is_limited_by_the_transfer_engine_when_the_network_is_fast() -> None:
    cost = costs(site("a", "h"), route="p2p")["a"]
    assert stages(cost)["fetch"] == (100.0, "the transfer engine")
    assert (cost.card_bytes, cost.lane_bytes) == (500 * MB, 500 * MB)


def test_pulling_is_limited_by_the_host_when_its_engines_share_its_cards() -> None:
    source = structs.replace(LINKS, network=10**12)
    world = structs.replace(WORLD, source=source)
    fleet = [site(f"e{n}", "h", ranks=16) for n in range(3)]
    assert stages(costs(*fleet, route="p2p", world=world)["e0"])["fetch"] == (
        30.0,
        "its host's network",
    )


@pytest.mark.parametrize(("sources", "seconds"), [(1, 80.0), (4, 20.0)])
def test_pulling_is_limited_by_the_source_when_many_share_it(sources: int, seconds: float) -> None:
    world = structs.replace(WORLD, sources=sources)
    fleet = [site(f"e{n}", f"h{n}", ranks=64) for n in range(8)]
    fetch = stages(costs(*fleet, route="p2p", world=world)["e0"])["fetch"]
    assert fetch == (seconds, "the source's network")


def test_broadcast_fetches_once_and_is_paced_by_its_slowest_member() -> None:
    fleet = [site("a", "h1"), site("b", "h2", ranks=4), site("c", "h3", broadcast=5 * MB)]
    cost = costs(*fleet, route="broadcast")
    assert cost["a"] == cost["b"] == cost["c"]
    assert stages(cost["a"]) == {
        "fetch": (1000 / (4 * 2 * 5), "the transfer engine"),
        "broadcast": (1000 / (4 * 5), "the process groups"),
        "reload": (10.0, "its host's memory"),
    }
    assert cost["a"].lane_bytes == 250 * MB
    assert [stage.bytes for stage in cost["a"].stages] == [333_333_333, 666_666_667, 1000 * MB]


def test_broadcast_takes_a_hop_for_each_doubling_when_it_goes_from_member_to_member() -> None:
    fleet = [structs.replace(site(f"e{n}", f"h{n}"), tree=True) for n in range(5)]
    broadcast = stages(costs(*fleet, route="broadcast")["e0"])["broadcast"]
    assert broadcast == (3 * 1000 / (2 * 10), "the process groups")


def test_broadcast_pays_for_groups_that_have_not_met() -> None:
    fleet = [site(f"e{n}", f"h{n}") for n in range(3)]
    ready = costs(*fleet, route="broadcast")["e0"]
    world = structs.replace(WORLD, ready=False)
    formed = costs(*fleet, route="broadcast", world=world)["e0"]
    assert formed.form_s == pytest.approx(FORM_S + 2 * FORM_MEMBER_S)
    assert formed.seconds == pytest.approx(ready.seconds + formed.form_s)
    assert ready.form_s == 0.0


def test_engines_of_one_host_share_one_pull_and_nothing_is_broadcast() -> None:
    fleet = [site("a", "h"), site("b", "h")]
    world = structs.replace(WORLD, ready=False)
    together = costs(*fleet, route="broadcast", world=world)["a"]
    assert [stage.name for stage in together.stages] == ["fetch", "reload"]
    assert stages(together)["fetch"] == (1000 / (4 * 5), "the transfer engine")
    assert together.seconds < costs(*fleet, route="p2p")["a"].seconds


def test_pulls_and_broadcast_share_the_source() -> None:
    source = structs.replace(LINKS, network=1 * MB)
    world = structs.replace(WORLD, source=source)
    fleet = [site("a", "h1"), site("b", "h2"), site("c", "h3")]
    mixed = costs(*fleet, route="broadcast", c="p2p", world=world)
    assert stages(mixed["a"])["fetch"] == (1000.0, "the source's network")
    assert stages(mixed["c"])["fetch"] == (1000.0, "the source's network")


def test_stages_add_up_when_there_is_one_slot() -> None:
    world = structs.replace(WORLD, slots=1)
    cost = costs(site("a", "h"), route="p2p", world=world)["a"]
    assert cost.seconds == pytest.approx(100.0 + 10.0)


def test_engine_over_several_hosts_costs_what_its_slowest_part_does() -> None:
    parts = [site("a", "h1"), site("a", "h2", p2p=MB)]
    assert costs(*parts, route="p2p")["a"].seconds > 500.0


def test_rates_that_were_not_measured_are_assumed() -> None:
    assert assume(Links()) == ASSUMED_LINKS
    assert assume(Links(p2p=3, cards=4)) == structs.replace(ASSUMED_LINKS, p2p=3, cards=4)
    assert min(structs.asdict(ASSUMED_LINKS).values()) > 0


@given(
    hosts=st.integers(1, 9),
    ranks=st.integers(1, 9),
    size=st.integers(0, 2**50),
    slots=st.integers(1, 3),
    route=st.sampled_from(["local", "p2p", "broadcast"]),
)
def test_total_lies_between_the_slowest_stage_and_the_sum_of_all(
    hosts: int, ranks: int, size: int, slots: int, route: RouteName
) -> None:
    world = structs.replace(WORLD, layout_bytes=size, slots=slots, ready=False, files=True)
    fleet = [site(f"e{n}", f"h{n}", ranks=ranks) for n in range(hosts)]
    for cost in costs(*fleet, route=route, world=world).values():
        total = sum(stage.seconds for stage in cost.stages)
        assert cost.slowest.seconds <= cost.seconds * (1 + 1e-9)
        assert cost.seconds <= total * (1 + 1e-9)

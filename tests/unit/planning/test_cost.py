"""Predicted seconds follow from bytes and rates by the formulas of docs/cost-model.md."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from weightbus.consumers.planning.cost import (
    ASSUMED_LINKS,
    BUCKET_S,
    DEVICE_BUCKET_S,
    GATHER_SHARE,
    GROUP_MEMBER_S,
    GROUP_S,
    RouteCost,
    Site,
    Situation,
    assume,
    predict,
)
from weightbus.consumers.planning.cuts import count_buckets
from weightbus.consumers.planning.source import SourceMemory
from weightbus.consumers.planning.staging import StagingSize
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Links

MB = 10**6
GB = 10**9
LINKS = Links(
    memory=100 * MB,
    disk=20 * MB,
    network=50 * MB,
    broadcast=10 * MB,
    p2p=5 * MB,
    device=40 * MB,
    peer=200 * MB,
    cards=2,
)
FAST = Links(network=10**12, p2p=10**12)
WORLD = Situation(layout_bytes=1000 * MB, source=FAST, sources=1, ready=True)
STAGING = StagingSize(bucket_bytes=MB, slots=3)


def site(engine: str, host: str, ranks: int = 2, **fields: object) -> Site:
    slots = fields.pop("slots", 3)
    assert isinstance(slots, int)
    return Site(
        engine=engine,
        host=host,
        ranks=ranks,
        need_bytes=1000 * MB,
        links=structs.replace(LINKS, **fields),
        staging=structs.replace(STAGING, slots=slots),
    )


def costs(
    *sites: Site, route: RouteName, world: Situation = WORLD, **routes: RouteName
) -> dict[str, RouteCost]:
    return predict(sites, {one.engine: routes.get(one.engine, route) for one in sites}, world)


def stages(cost: RouteCost) -> dict[str, object]:
    """Seconds of every stage without what every bucket takes besides, and its limit."""
    besides = {"fetch": cost.buckets * BUCKET_S, "broadcast": cost.buckets * BUCKET_S}
    return {
        stage.name: (pytest.approx(stage.seconds - besides.get(stage.name, 0.0)), stage.limit)
        for stage in cost.stages
    }


def buckets(lanes: int) -> int:
    return count_buckets(WORLD.layout_bytes, STAGING.bucket_bytes, lanes)


def test_local_takes_what_memory_needs_for_all_ranks_of_the_host() -> None:
    alone = costs(site("a", "h"), route="local")["a"]
    assert (alone.seconds, alone.lane_bytes, alone.card_bytes) == (10.0, 0, 0)
    assert costs(site("a", "h"), site("b", "h"), route="local")["a"].seconds == 20.0


def test_local_reads_files_at_the_rate_of_the_disk_that_its_host_shares() -> None:
    world = structs.replace(WORLD, files=True)
    cost = costs(site("a", "h"), route="local", world=world)["a"]
    assert stages(cost) == {
        "fetch": (50.0, "its host's disk"),
        "reload": (10.0, "its host's memory"),
    }
    assert cost.buckets == buckets(2) > 500
    fetch_s = 50.0 + buckets(2) * BUCKET_S
    assert cost.seconds == pytest.approx(fetch_s + 10.0 / cost.buckets)
    two = costs(site("a", "h"), site("b", "h"), site("c", "h2"), route="local", world=world)
    assert stages(two["b"])["fetch"] == (100.0, "its host's disk")
    assert stages(two["c"])["fetch"] == (50.0, "its host's disk")


@pytest.mark.parametrize("ranks", [1, 2, 16])
def test_pulling_is_limited_by_the_one_transfer_engine_of_a_consumer(ranks: int) -> None:
    cost = costs(site("a", "h", ranks), route="p2p")["a"]
    assert stages(cost)["fetch"] == (200.0, "its transfer engine")
    assert cost.limit == "its transfer engine in fetch"
    assert (cost.card_bytes, cost.lane_bytes) == (500 * MB, -(-1000 * MB // ranks))


def test_pulling_is_limited_by_the_host_when_its_engines_share_its_cards() -> None:
    fleet = [site(f"e{n}", "h", p2p=50 * MB) for n in range(3)]
    assert stages(costs(*fleet, route="p2p")["e0"])["fetch"] == (30.0, "its host's network")


@pytest.mark.parametrize(("sources", "seconds"), [(1, 80.0), (4, 20.0)])
def test_pulling_is_limited_by_the_source_when_many_share_it(sources: int, seconds: float) -> None:
    source = structs.replace(LINKS, p2p=10**12)
    world = structs.replace(WORLD, source=source, sources=sources)
    fleet = [site(f"e{n}", f"h{n}", p2p=GB, network=GB) for n in range(8)]
    fetch = stages(costs(*fleet, route="p2p", world=world)["e0"])["fetch"]
    assert fetch == (seconds, "the source's network")
    served = structs.replace(world, source=structs.replace(source, p2p=50 * MB))
    fetch = stages(costs(*fleet, route="p2p", world=served)["e0"])["fetch"]
    assert fetch == (2 * seconds, "the source's transfer engine")


def test_broadcast_fetches_once_and_is_paced_by_its_slowest_member() -> None:
    fleet = [site("a", "h1"), site("b", "h2", ranks=4), site("c", "h3", 4, broadcast=4 * MB)]
    cost = costs(*fleet, route="broadcast")
    assert stages(cost["a"]) == {
        "fetch": (2 / 4 * 1000 / 5, "a transfer engine"),  # two of a bucket's four parts at once
        "broadcast": (1000 / 4 / 4, "the process groups"),
        "reload": (10.0, "its host's memory"),
    }
    assert cost["a"].seconds == cost["b"].seconds == cost["c"].seconds
    assert [stage.bytes for stage in cost["a"].stages] == [333_333_333, 666_666_667, 1000 * MB]
    held_s = 100.0 + 62.5 + 10.0 + 2 * buckets(4) * BUCKET_S
    among_s = max(1000 / 5 / 3, held_s / 3, 62.5 + buckets(4) * BUCKET_S)
    assert cost["a"].pace_s == pytest.approx(among_s)
    assert cost["a"].seconds == pytest.approx(among_s + (held_s - among_s) / buckets(4))


def test_rank_that_stages_more_lanes_than_others_takes_as_much_longer() -> None:
    cost = costs(site("a", "h1", ranks=3), site("b", "h2", ranks=8), route="broadcast")
    assert cost["a"].lane_bytes == 375 * MB  # three of eight lanes
    assert cost["b"].lane_bytes == 125 * MB
    assert stages(cost["a"])["broadcast"] == (3 / 8 * 1000 / 10, "the process groups")
    one = costs(site("a", "h1", ranks=1), site("b", "h2", ranks=8), route="broadcast")
    assert stages(one["b"])["broadcast"] == (1000 / 10, "the process groups")


@pytest.mark.parametrize(
    ("rate", "seconds", "limit"),
    [
        (10 * MB, 3 * 1000 / (2 * 10), "the process groups"),
        (GB, 3 * 1000 / 100, "a host's network"),
    ],
)
def test_broadcast_takes_a_hop_for_each_doubling_when_it_goes_from_member_to_member(
    rate: int, seconds: float, limit: str
) -> None:
    fleet = [structs.replace(site(f"e{n}", f"h{n}", broadcast=rate), tree=True) for n in range(5)]
    assert stages(costs(*fleet, route="broadcast")["e0"])["broadcast"] == (seconds, limit)


def test_broadcast_pays_for_groups_that_have_not_met() -> None:
    fleet = [site(f"e{n}", f"h{n}") for n in range(3)]
    ready = costs(*fleet, route="broadcast")["e0"]
    world = structs.replace(WORLD, ready=False)
    formed = costs(*fleet, route="broadcast", world=world)["e0"]
    assert formed.form_s == pytest.approx(GROUP_S + 2 * GROUP_MEMBER_S)
    assert formed.seconds == pytest.approx(ready.seconds + formed.form_s)
    assert ready.form_s == 0.0


def test_engines_of_one_host_share_one_pull_and_nothing_is_broadcast() -> None:
    fleet = [site("a", "h"), site("b", "h")]
    world = structs.replace(WORLD, ready=False)
    together = costs(*fleet, route="broadcast", world=world)["a"]
    assert [stage.name for stage in together.stages] == ["fetch", "reload"]
    assert stages(together)["fetch"] == (2 / 4 * 1000 / 5, "a transfer engine")
    assert together.seconds < costs(*fleet, route="p2p")["a"].seconds


def test_pulls_and_broadcast_share_the_source() -> None:
    world = structs.replace(WORLD, source=structs.replace(FAST, network=2 * MB))
    fleet = [site("a", "h1"), site("b", "h2"), site("c", "h3")]
    mixed = costs(*fleet, route="broadcast", c="p2p", world=world)
    assert stages(mixed["a"])["fetch"] == (1000.0, "the source's network")
    assert stages(mixed["c"])["fetch"] == (1000.0, "the source's network")


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_slots_set_the_pace_when_each_is_held_from_fetch_to_reload(slots: int) -> None:
    fleet = [site(f"e{n}", f"h{n}", slots=slots, broadcast=5 * MB) for n in range(9)]
    cost = costs(*fleet, route="broadcast")["e0"]
    held_s = 100.0 + 100.0 + 10.0 + 2 * cost.buckets * BUCKET_S
    slowest_s = 100.0 + cost.buckets * BUCKET_S  # the broadcast; nine hosts fetch side by side
    pace_s = max(slowest_s, held_s / slots)
    assert cost.pace_s == pytest.approx(pace_s)
    assert cost.seconds == pytest.approx(pace_s + (held_s - pace_s) / cost.buckets)
    assert (cost.limit.startswith(f"{slots} slot")) == (slots < 3)


def test_stages_add_up_when_there_is_one_slot() -> None:
    cost = costs(site("a", "h", slots=1), route="p2p")["a"]
    assert cost.seconds == pytest.approx(200.0 + 10.0 + cost.buckets * BUCKET_S)


def gpus(engine: str, host: str, ranks: int = 2, *, near: bool = False, **fields: object) -> Site:
    """On GPUs: its busiest rank needs a little more than its share."""
    one = site(engine, host, ranks, **fields)
    return structs.replace(one, gpus=True, near=near, rank_bytes=one.need_bytes // ranks + MB)


DEVICE = structs.replace(WORLD, device=True, memory="host")


@pytest.mark.parametrize(
    ("memory", "seconds", "limit"),
    [
        ("host", 501 / (40 * GATHER_SHARE), "a GPU's link to its host"),
        ("other", 501 / (40 * GATHER_SHARE), "a GPU's link to its host"),
        ("gpus", 501 / 200, "what a GPU reads of its peers"),
    ],
)
def test_local_on_gpus_takes_what_the_link_of_the_busiest_rank_does(
    memory: SourceMemory, seconds: float, limit: str
) -> None:
    world = structs.replace(WORLD, memory=memory)
    fleet = [gpus("a", "h"), gpus("b", "h"), site("c", "h")]
    found = costs(*fleet, route="local", world=world)
    assert stages(found["a"]) == {"reload": (seconds, limit)}
    assert found["a"].stages[0].bytes == 3000 * MB
    assert found["c"].seconds == 10.0, "no GPU takes of what CPUs copy"


def test_pulling_on_gpus_reloads_by_their_links() -> None:
    reload = stages(costs(gpus("a", "h"), route="p2p")["a"])["reload"]
    assert reload == (501 / (40 * GATHER_SHARE), "a GPU's link to its host")


def test_lanes_on_gpus_of_one_host_take_each_byte_once_and_no_network() -> None:
    fleet = [gpus("a", "h", near=True), gpus("b", "h", ranks=1, near=True)]
    cost = costs(*fleet, route="broadcast", world=DEVICE)["a"]
    fetch_s = 1000 / (3 * 40) + buckets(3) * DEVICE_BUCKET_S
    assert {stage.name: stage.seconds for stage in cost.stages} == {
        "fetch": pytest.approx(fetch_s),
        "reload": pytest.approx(1001 / 200),
    }
    assert cost.limit == "a GPU's link to its host in fetch"
    assert cost.seconds == pytest.approx(fetch_s + 1001 / 200 / buckets(3))
    assert (cost.card_bytes, cost.lane_bytes) == (0, math.ceil(1000 * MB / 3))
    far = structs.replace(WORLD, memory="host", source=structs.replace(FAST, network=MB))
    beside = (*fleet, site("c", "h", network=GB))
    pulled = costs(*beside, route="broadcast", c="p2p", world=structs.replace(far, device=True))
    assert stages(pulled["c"])["fetch"] == (1000.0, "the source's network"), "once"


def test_lanes_on_gpus_of_several_hosts_are_fetched_by_whoever_can() -> None:
    fleet = [gpus("a", "h1", near=True), gpus("b", "h2", p2p=10 * MB)]
    source = structs.replace(LINKS, p2p=10**12, network=MB)
    cost = costs(
        *fleet, route="broadcast", world=structs.replace(DEVICE, source=source, ready=True)
    )["a"]
    assert stages(cost) == {
        "fetch": (1000 / 2 / 2, "the source's network"),  # half of it, by two cards
        "broadcast": (1000 / 2 / 10, "the process groups"),
        "reload": (501 / 200, "what a GPU reads of its peers"),
    }
    quick = costs(*fleet, route="broadcast", world=DEVICE)["b"]
    assert stages(quick)["fetch"] == (1000 / 2 / 10, "a transfer engine")
    near = [gpus("a", "h1", near=True), gpus("b", "h2", near=True)]
    assert stages(costs(*near, route="broadcast", world=DEVICE)["b"])["fetch"] == (
        1000 / 2 / 40,
        "a GPU's link to its host",
    )


def test_lanes_of_gpus_in_memory_of_hosts_go_from_member_to_member() -> None:
    fleet = [gpus(f"e{n}", f"h{n}", near=True) for n in range(5)]
    there = stages(costs(*fleet, route="broadcast", world=DEVICE)["e0"])
    here = stages(
        costs(*fleet, route="broadcast", world=structs.replace(DEVICE, device=False))["e0"]
    )
    assert there["broadcast"] == (1000 / 2 / 10, "the process groups")
    assert here["broadcast"] == (3 * 1000 / 2 / 10, "the process groups")
    assert here["reload"] == (501 / (40 * GATHER_SHARE), "a GPU's link to its host")


def test_engine_over_several_hosts_costs_what_its_slowest_part_does() -> None:
    parts = [site("a", "h1"), site("a", "h2", p2p=MB)]
    assert costs(*parts, route="p2p")["a"].seconds > 1000.0


def test_rates_that_were_not_measured_are_assumed() -> None:
    assert assume(Links()) == ASSUMED_LINKS
    assert assume(Links(p2p=3, cards=4)) == structs.replace(ASSUMED_LINKS, p2p=3, cards=4)
    assert min(structs.asdict(ASSUMED_LINKS).values()) > 0


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    size=st.integers(0, 2**50),
    slots=st.integers(1, 4),
    route=st.sampled_from(["local", "p2p", "broadcast"]),
    tree=st.booleans(),
    device=st.booleans(),
)
def test_total_lies_between_the_pace_and_the_sum_of_all_stages(
    ranks: list[int], size: int, slots: int, route: RouteName, tree: bool, device: bool
) -> None:
    world = structs.replace(
        WORLD, layout_bytes=size, ready=False, files=True, source=LINKS, device=device
    )
    make = gpus if device else site
    fleet = [
        structs.replace(make(f"e{n}", f"h{n // 2}", count, slots=slots), tree=tree)
        for n, count in enumerate(ranks)
    ]
    for cost in costs(*fleet, route=route, world=world).values():
        held_s = sum(stage.seconds for stage in cost.stages if stage.name != "form")
        assert held_s / slots <= cost.pace_s * (1 + 1e-9) or route == "local"
        assert cost.pace_s + cost.form_s <= cost.seconds * (1 + 1e-9)
        assert cost.seconds <= (held_s + cost.form_s) * (1 + 1e-9)
        for stage in cost.stages:
            if stage.name in ("broadcast", "reload"):
                assert stage.seconds <= cost.pace_s * (1 + 1e-9)
        assert math.isfinite(cost.seconds)

"""Who shares a broadcast and who does not: by what is predicted, and by what is impossible."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.unit.planning.fleets import (
    GB,
    decide,
    join,
    large,
    offer,
    planned,
    reason_of,
    remote,
    roomy,
    routes_of,
)
from weightbus.consumers.planning.routes import PlanLimits, PlanSource
from weightbus.consumers.planning.staging import (
    MIB,
)
from weightbus.schemas.rounds import Join, Links
from weightbus.schemas.shared_memory import MAX_READERS


def test_broadcast_is_taken_when_many_would_share_the_source() -> None:
    fleet = [large(f"e{n}", f"h{n}", network=10 * GB, broadcast=5 * GB) for n in range(4)]
    decision = decide(*fleet)
    assert set(routes_of(decision).values()) == {"broadcast"}
    assert decision.costs["e0"].seconds < decision.others["e0"].seconds
    assert decision.others["e0"].route == "p2p"


def test_pulling_is_taken_when_broadcasts_are_slow() -> None:
    fleet = [large(f"e{n}", f"h{n}", network=10 * GB, broadcast=GB // 10) for n in range(2)]
    decision = decide(*fleet)
    assert set(routes_of(decision).values()) == {"p2p"}
    assert decision.others["e0"].route == "broadcast"
    assert reason_of(decision, "e0").startswith("faster than a broadcast of all: ")


def test_engine_that_can_only_broadcast_slows_down_no_more_than_one_other() -> None:
    only = offer(0, "broadcast", need_bytes=100 * GB)
    slow = join("z", only, host="hz", links=Links(network=GB // 10, broadcast=GB // 10))
    fleet = [large(f"e{n}", f"h{n}", network=10 * GB, broadcast=10 * GB) for n in range(3)]
    decision = decide(slow, *fleet)
    assert routes_of(decision) == {"e0": "broadcast", "e1": "p2p", "e2": "p2p", "z": "broadcast"}
    assert decision.costs["e1"].seconds < decision.costs["z"].seconds / 5
    assert reason_of(decision, "e1").startswith("faster than a broadcast of all: ")


def test_slow_host_pulls_when_it_would_hold_up_a_broadcast_of_many() -> None:
    fast = [
        large(f"e{n}", f"h{n}", memory=99 * GB, network=50 * GB, broadcast=40 * GB, p2p=40 * GB)
        for n in range(31)
    ]
    slow = large("slow", "hs", network=GB, broadcast=GB, p2p=GB)
    source = PlanSource(links=Links(network=50 * GB, p2p=40 * GB), hosts=8)
    decision = decide(*fast, slow, source=source)
    routes = routes_of(decision)
    assert routes.pop("slow") == "p2p"
    assert set(routes.values()) == {"broadcast"}
    assert decision.costs["e0"].seconds < decision.costs["slow"].seconds / 5
    assert reason_of(decision, "slow").startswith("faster than a broadcast of all: ")


def test_host_of_little_memory_pulls_when_it_would_hold_up_a_broadcast() -> None:
    links = Links(memory=50 * GB, network=50 * GB, broadcast=40 * GB, p2p=40 * GB)
    fleet = [structs.replace(remote(f"e{n}", f"h{n}"), links=links) for n in range(8)]
    tight = structs.replace(roomy("tight", "ht", 1), links=links)
    source = PlanSource(links=links, layout_bytes=100 * GB)
    decision = decide(*fleet, tight, source=source)
    routes = routes_of(decision)
    assert routes.pop("tight") == "p2p"
    assert set(routes.values()) == {"broadcast"}
    assert planned(decision).bucket_bytes == 64 * MIB


@st.composite
def unequal_fleets(draw: st.DrawFn) -> list[Join]:
    """Engines that could all share a broadcast or pull, on hosts that differ in everything."""
    some = st.sampled_from([10**8, 10**9, 10**10])
    fleet = []
    for number in range(draw(st.integers(2, 8))):
        host = f"h{draw(st.integers(0, 5))}"
        links = draw(
            st.builds(Links, memory=some, network=some, broadcast=some, p2p=some, cards=st.just(1))
        )
        free = draw(st.sampled_from([0, 16 * MIB, 64 * MIB, 2**30]))
        ranks = [
            offer(rank, "broadcast", "p2p", need_bytes=10 * GB, free_bytes=free)
            for rank in range(draw(st.integers(1, 4)))
        ]
        fleet.append(join(f"e{number}", *ranks, host=host, links=links))
    return fleet


@settings(max_examples=300, deadline=None)
@given(fleet=unequal_fleets(), sources=st.sampled_from([1, 8]))
def test_nobody_takes_much_longer_than_alone_unless_all_are_done_sooner(
    fleet: list[Join], sources: int
) -> None:
    source = PlanSource(hosts=sources, layout_bytes=20 * GB)
    decision = decide(*fleet, source=source)
    pulling = [
        structs.replace(
            one, ranks=tuple(structs.replace(rank, routes=("p2p",)) for rank in one.ranks)
        )
        for one in fleet
    ]
    alone = decide(*pulling, source=source).costs
    assert set(alone) == set(decision.costs)
    costs = {engine: cost.seconds - cost.form_s for engine, cost in decision.costs.items()}
    limits = PlanLimits()
    if max(costs.values()) < max(cost.seconds for cost in alone.values()):
        return
    for engine, seconds in costs.items():
        assert seconds <= limits.about(alone[engine].seconds), (engine, costs, alone)


def test_broadcast_is_taken_by_the_kind_of_device_that_most_have() -> None:
    cuda = [
        join(e, offer(0, "broadcast", "p2p", device=f"cuda:{n}"), host=f"h{e}")
        for n, e in enumerate("abc")
    ]
    decision = decide(*cuda, remote("x", "hx"), remote("y", "hy"))
    assert routes_of(decision) == dict.fromkeys("abc", "broadcast") | dict.fromkeys("xy", "p2p")
    assert reason_of(decision, "x").startswith(
        "its device is cpu, and that of those who share a broadcast cuda: "
    )


def test_engines_pull_when_their_host_has_more_ranks_than_a_lane_has_readers() -> None:
    crowd = [remote(f"e{n}", "crowd", 240) for n in range(3)]
    decision = decide(*crowd, remote("x", "hx"), remote("y", "hy"))
    routes = routes_of(decision)
    assert routes == {e: "broadcast" if e in "xy" else "p2p" for e in routes}
    limit = f"its host has 720 ranks, and a lane {MAX_READERS} readers"
    assert reason_of(decision, "e0").startswith(f"{limit}: ")
    assert decision.apart["e0"] == limit


def test_engine_at_a_loopback_address_pulls_when_others_are_of_other_machines() -> None:
    near = [remote(e, f"h{e}", rendezvous="tcp://127.0.0.1:9") for e in "ab"]
    assert set(routes_of(decide(*near)).values()) == {"broadcast"}
    far = [remote(e, f"h{e}", rendezvous=f"tcp://10.0.0.{n}:9") for n, e in enumerate("xy")]
    decision = decide(*near, *far)
    assert routes_of(decision) == {"a": "p2p", "b": "p2p", "x": "broadcast", "y": "broadcast"}
    assert "its address is loopback" in reason_of(decision, "a")


def test_source_that_is_not_known_is_like_one_host_and_not_the_best_of_several() -> None:
    wide = large("a", "h1", network=GB, p2p=GB // 10)
    quick = large("b", "h2", network=GB // 10, p2p=10 * GB)
    pulled = {one.engine: one for one in (wide, quick)}
    pulls = [
        structs.replace(one, ranks=(offer(0, "p2p", need_bytes=100 * GB),))
        for one in pulled.values()
    ]
    decision = decide(*pulls)
    assert decision.costs["b"].limit == "the source's transfer engine in fetch"
    assert decision.costs["b"].seconds == pytest.approx(2 * 100 * GB / (GB // 10), rel=0.01)


def test_version_is_there_sooner_when_more_hosts_offer_it() -> None:
    fleet = [large(f"e{n}", f"h{n}", network=10 * GB, p2p=10 * GB) for n in range(4)]
    seconds = [
        max(cost.seconds for cost in decide(*fleet, source=source).costs.values())
        for source in (PlanSource(hosts=1, links=Links(network=GB, p2p=GB)), PlanSource(hosts=10))
    ]
    assert seconds[1] < seconds[0] / 2


def test_engine_pulls_when_it_was_given_another_layout_than_most() -> None:
    fleet = [
        structs.replace(large(f"e{n}", f"h{n}", network=10 * GB, broadcast=5 * GB), layout_digest=d)
        for n, d in enumerate(("a" * 64, "b" * 64, "a" * 64, "a" * 64))
    ]
    decision = decide(*fleet)
    routes = routes_of(decision)
    assert routes == {"e0": "broadcast", "e1": "p2p", "e2": "broadcast", "e3": "broadcast"}
    assert "another layout" in reason_of(decision, "e1")

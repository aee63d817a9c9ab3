"""Engines on GPUs of one host share what they could read in place, where that is much faster."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.unit.planning.fleets import (
    GB,
    ROUTES,
    decide,
    join,
    many_joins,
    members_of,
    offer,
    planned,
    reason_of,
    routes_of,
)
from weightbus.consumers.planning.cost import ASSUMED_LINKS, GATHER_SHARE
from weightbus.consumers.planning.limits import PlanLimits
from weightbus.consumers.planning.routes import RoundDecision
from weightbus.consumers.planning.source import PlanSource, SourceMemory
from weightbus.consumers.planning.staging import DEVICE_BYTES, DEVICE_PART, DEVICE_SLOTS, MIB
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Join, Links, Member, RankOffer

SIZE = 61 * GB
HOST_MEMORY = PlanSource(layout_bytes=SIZE, memory="host")


def replica(
    engine: str,
    tp: int = 2,
    *routes: RouteName,
    size: int = SIZE,
    device_bytes: int = 0,
    free_bytes: int = 0,
    device: str = "cuda",
    **fields: object,
) -> Join:
    """An engine on GPUs that holds `size` bytes, on `host` unless it is told otherwise."""
    ranks = [
        offer(
            rank,
            *(routes or ROUTES),
            need_bytes=size // tp,
            device_bytes=device_bytes,
            free_bytes=free_bytes,
            device=device if device == "cpu" else f"{device}:{rank}",
        )
        for rank in range(tp)
    ]
    return join(engine, *ranks, **fields)  # type: ignore[arg-type]


def shared(*joins: Join, source: PlanSource = HOST_MEMORY) -> RoundDecision:
    return decide(*joins, source=source)


@pytest.mark.parametrize(
    ("replicas", "tp", "apart_s", "together_s"),
    [(2, 2, 0.617, 0.28), (2, 1, 1.23, 0.56), (4, 1, 1.23, 0.28), (2, 4, 0.31, 0.14)],
)
def test_replicas_share_a_broadcast_when_each_link_then_brings_a_part(
    replicas: int, tp: int, apart_s: float, together_s: float
) -> None:
    decision = shared(*(replica(f"e{n}", tp) for n in range(replicas)))
    assert set(routes_of(decision).values()) == {"broadcast"}
    plan = planned(decision)
    assert plan.device
    assert (plan.bucket_bytes, plan.slots) == (64 * MIB, 3)
    assert members_of(decision) == [[(f"e{n // tp}", n % tp)] for n in range(replicas * tp)]
    for engine in routes_of(decision):
        cost, other = decision.costs[engine], decision.others[engine]
        assert (cost.card_bytes, other.route) == (0, "local")
        assert cost.seconds == pytest.approx(together_s, rel=0.1)
        assert other.seconds == pytest.approx(apart_s, rel=0.01)
    assert ", by local " in reason_of(decision, "e0")


def test_engine_reads_in_place_when_it_has_no_replica() -> None:
    decision = shared(replica("a", 4))
    assert routes_of(decision) == {"a": "local"}
    assert not planned(decision).device
    apart = shared(replica("a", host="h1"), replica("b", host="h2"))
    assert routes_of(apart) == {"a": "local", "b": "local"}


@pytest.mark.parametrize(
    ("memory", "files", "rate"),
    [
        ("gpus", False, ASSUMED_LINKS.peer),
        ("other", False, ASSUMED_LINKS.device * GATHER_SHARE),
        ("other", True, None),
    ],
)
def test_replicas_read_in_place_what_does_not_lie_in_memory_of_their_host(
    memory: SourceMemory, files: bool, rate: float | None
) -> None:
    source = structs.replace(HOST_MEMORY, memory=memory, files=files)
    decision = shared(replica("a"), replica("b"), source=source)
    assert routes_of(decision) == {"a": "local", "b": "local"}
    if rate is not None:
        assert decision.costs["a"].seconds == pytest.approx(SIZE / 2 / rate)


@pytest.mark.parametrize(
    "other",
    [
        replica("b", broken_epoch=8),
        replica("b", 2, "local", "p2p"),
        replica("b", device="cpu"),
        replica("b", host="elsewhere"),
        structs.replace(replica("b"), layout_digest="b" * 64),
    ],
)
def test_engine_reads_in_place_when_its_neighbour_can_share_nothing(other: Join) -> None:
    decision = shared(replica("a"), other)
    assert routes_of(decision) == {"a": "local", "b": "local"}


def test_replicas_read_in_place_when_their_group_broke() -> None:
    """The round is not put at risk twice by what nobody needs."""
    broken = [replica(engine, broken_epoch=3) for engine in "abc"]
    assert set(routes_of(shared(*broken)).values()) == {"local"}
    decision = shared(broken[0], replica("b"), replica("c"))
    assert routes_of(decision) == {"a": "local", "b": "broadcast", "c": "broadcast"}


def test_replicas_read_in_place_when_they_come_late() -> None:
    decision = decide(replica("a"), replica("b"), source=HOST_MEMORY, late=True)
    assert routes_of(decision) == {"a": "local", "b": "local"}


@pytest.mark.parametrize(
    ("size", "links"),
    [
        (1 * GB, Links()),  # 10 ms in place
        (SIZE, Links(peer=30 * GB)),  # no NVLink
    ],
)
def test_replicas_read_in_place_when_sharing_gains_them_little(size: int, links: Links) -> None:
    source = PlanSource(layout_bytes=size, memory="host")
    decision = shared(*(replica(e, size=size, links=links) for e in "ab"), source=source)
    assert routes_of(decision) == {"a": "local", "b": "local"}
    assert decision.others["a"].route == "broadcast"
    assert ", by broadcast " in reason_of(decision, "a")


@pytest.mark.parametrize(
    ("free_mib", "bucket_mib", "slots"),
    [(0, 64, 3), (10**6, 64, 3), (768, 64, 3), (767, 32, 3), (192, 16, 3), (191, 16, 2), (7, 0, 0)],
)
def test_slots_take_a_quarter_of_what_is_free_on_a_gpu(
    free_mib: int, bucket_mib: int, slots: int
) -> None:
    decision = shared(*(replica(e, 1, device_bytes=free_mib * MIB) for e in "ab"))
    plan = planned(decision)
    assert plan.device == bool(slots)
    if slots:
        assert set(routes_of(decision).values()) == {"broadcast"}
        assert (plan.bucket_bytes, plan.slots) == (bucket_mib * MIB, slots)
    else:
        assert set(routes_of(decision).values()) == {"local"}


def test_replica_without_room_on_its_gpu_leaves_all_of_its_host_in_place() -> None:
    decision = shared(replica("a", device_bytes=6 * MIB), replica("b"), replica("c"))
    assert set(routes_of(decision).values()) == {"local"}


def test_replicas_need_no_room_for_staging_in_memory_of_their_host() -> None:
    fleet = [replica(e) for e in "ab"]
    tight = [
        structs.replace(
            one, ranks=tuple(structs.replace(rank, free_bytes=MIB) for rank in one.ranks)
        )
        for one in fleet
    ]
    assert planned(shared(*tight)) == planned(shared(*fleet))


def far(engine: str, host: str, **fields: object) -> Join:
    return replica(engine, 2, "broadcast", "p2p", host=host, **fields)  # type: ignore[arg-type]


def test_engines_of_other_hosts_go_their_way_beside_replicas() -> None:
    decision = shared(replica("a"), replica("b"), far("x", "h1"), replica("z", host="h2"))
    assert routes_of(decision) == {
        "a": "broadcast",
        "b": "broadcast",
        "x": "p2p",
        "z": "local",
    }
    assert {engine for lane in members_of(decision) for engine, _ in lane} == {"a", "b"}
    assert decision.costs["x"].seconds == shared(far("x", "h1")).costs["x"].seconds


def test_replicas_leave_the_broadcast_to_others_who_need_it() -> None:
    others = [far(f"x{n}", f"h{n}") for n in range(8)]
    decision = shared(replica("a"), replica("b"), *others)
    routes = routes_of(decision)
    assert (routes.pop("a"), routes.pop("b")) == ("local", "local")
    assert set(routes.values()) == {"broadcast"}
    alone = shared(*others)
    assert decision.costs["x0"].seconds == pytest.approx(alone.costs["x0"].seconds)


QUICK = Links(network=400 * GB, broadcast=400 * GB, p2p=400 * GB)
LARGE = PlanSource(layout_bytes=4 * SIZE, memory="host", links=QUICK)
"""Over such a network, and of so much, hosts could share a broadcast, too."""


def near_and_quick() -> list[Join]:
    return [replica(engine, links=QUICK, size=4 * SIZE) for engine in "ab"]


def test_replicas_and_others_share_one_broadcast_when_the_network_is_as_fast() -> None:
    others = [far(f"x{n}", f"h{n}", links=QUICK) for n in range(2)]
    decision = shared(*near_and_quick(), *others, source=LARGE)
    assert set(routes_of(decision).values()) == {"broadcast"}
    assert planned(decision).device
    one = shared(*near_and_quick(), others[0], source=LARGE)
    assert set(routes_of(one).values()) == {"broadcast"}


def test_engine_of_another_host_pulls_when_it_has_no_memory_for_lanes_of_replicas() -> None:
    small = replica(
        "x", 1, "broadcast", "p2p", size=4 * SIZE, host="h1", links=QUICK, free_bytes=2 * MIB
    )
    assert routes_of(shared(*near_and_quick(), small, source=LARGE))["x"] == "p2p"


def test_replicas_of_another_layout_are_in_no_broadcast_that_others_need() -> None:
    others = [
        replica("x", 2, "broadcast", size=4 * SIZE, host="h1", links=QUICK),
        replica("y", 2, "broadcast", size=4 * SIZE, host="h2", links=QUICK),
    ]
    near = [structs.replace(one, layout_digest="b" * 64) for one in near_and_quick()]
    decision = shared(*near, *others, source=LARGE)
    assert routes_of(decision) == {"a": "local", "b": "local", "x": "broadcast", "y": "broadcast"}


def test_replicas_read_in_place_when_many_others_would_lose_a_little_each() -> None:
    links = Links(network=400 * GB, broadcast=17 * GB, p2p=30 * GB, device=500 * GB)
    others = [far(f"x{n}", f"h{n}", links=links, groups=()) for n in range(12)]
    source = PlanSource(layout_bytes=SIZE, memory="host", links=QUICK, hosts=8)
    together = shared(*others, source=source)
    assert set(routes_of(together).values()) == {"broadcast"}
    lost_s = together.others["x0"].seconds - together.costs["x0"].seconds
    assert 0.06 < lost_s < PlanLimits().tie_s
    decision = shared(replica("a"), replica("b"), *others, source=source)
    assert routes_of(decision) == routes_of(together) | {"a": "local", "b": "local"}


def test_replicas_of_several_hosts_share_that_which_saves_most() -> None:
    """A plan has one broadcast."""
    small = [replica(f"s{n}", 4, host="h1") for n in range(2)]
    large = [replica(f"t{n}", 1, host="h2") for n in range(2)]
    routes = routes_of(shared(*small, *large))
    assert routes == {"s0": "local", "s1": "local", "t0": "broadcast", "t1": "broadcast"}


def test_lanes_lie_in_memory_of_hosts_when_not_all_members_have_gpus_or_room_there() -> None:
    assert planned(shared(far("a", "h1"), far("b", "h2"))).device
    tight = shared(far("a", "h1", device_bytes=7 * MIB), far("b", "h2"))
    assert set(routes_of(tight).values()) == {"broadcast"}
    assert not planned(tight).device
    cpus = shared(far("a", "h1", device="cpu"), far("b", "h2", device="cpu"))
    assert set(routes_of(cpus).values()) == {"broadcast"}
    assert not planned(cpus).device


def test_engines_on_cpus_are_planned_as_if_nothing_lay_in_memory_of_their_host() -> None:
    fleet = [replica("a", device="cpu"), replica("b", device="cpu"), far("c", "h1", device="cpu")]
    for size in (0, 3 * SIZE):
        unknown = PlanSource(layout_bytes=size)
        known = structs.replace(unknown, memory="host")
        assert decide(*fleet, source=known) == decide(*fleet, source=unknown)


@st.composite
def near_fleets(draw: st.DrawFn) -> list[Join]:
    """Of few hosts, engines that mostly could read their host's memory."""
    rates = st.sampled_from([0, 10**9, 10**12])
    links = st.builds(Links, network=rates, broadcast=rates, p2p=rates, device=rates, peer=rates)
    fleet = []
    for number in range(draw(st.integers(1, 6))):
        tp = draw(st.integers(1, 4))
        fleet.append(
            replica(
                f"e{number}",
                tp,
                *draw(st.sampled_from([ROUTES, ROUTES, ("broadcast", "p2p"), ("broadcast",)])),
                size=draw(st.sampled_from([SIZE, SIZE // 2])),
                device_bytes=draw(st.just(0) | st.integers(1, 2**30)),
                device=draw(st.sampled_from(["cuda", "cuda", "cuda", "cpu"])),
                host=draw(st.sampled_from(["h1", "h2"])),
                links=draw(links),
                broken_epoch=draw(st.sampled_from([0, 0, 0, 2])),
            )
        )
    return fleet


@settings(max_examples=200, deadline=None)
@given(fleet=near_fleets() | many_joins(), late=st.booleans(), seed=st.integers(0, 2**32))
def test_nobody_loses_by_replicas_that_share_when_fleets_are_random(
    fleet: list[Join], late: bool, seed: int
) -> None:
    decision = decide(*fleet, source=HOST_MEMORY, late=late)
    shuffled = random.Random(seed).sample(fleet, len(fleet))
    assert decide(*shuffled, source=HOST_MEMORY, late=late) == decision
    kept = [
        structs.replace(one, ranks=tuple(_in_place(rank) for rank in one.ranks)) for one in fleet
    ]
    before = decide(*kept, source=HOST_MEMORY, late=late)
    assert set(decision.refused) == set(before.refused)
    limits, by_id = PlanLimits(), {one.engine: one for one in fleet}
    for engine, route in routes_of(decision).items():
        one, cost = by_id[engine], decision.costs[engine]
        assert all(route in rank.routes for rank in one.ranks)
        near = all("local" in rank.routes for rank in one.ranks)
        lasting = cost.seconds - cost.form_s * (1 - 1 / limits.form_versions)
        was = before.costs[engine]
        if near and route != "local":
            assert route == "broadcast"
            assert not late
            assert one.broken_epoch == 0
            assert lasting <= limits.worth(was.seconds)
        else:
            least = was.seconds - was.form_s * (1 - 1 / limits.form_versions)
            assert lasting <= limits.about(least)


def _in_place(rank: RankOffer) -> RankOffer:
    """An offer of who shares nothing that it can read in place."""
    left = tuple(route for route in rank.routes if route != "broadcast")
    return structs.replace(rank, routes=left) if "local" in rank.routes else rank


@settings(max_examples=200, deadline=None)
@given(fleet=near_fleets())
def test_lanes_on_gpus_fit_into_what_is_free_there_when_fleets_are_random(
    fleet: list[Join],
) -> None:
    decision = decide(*fleet, source=HOST_MEMORY)
    plan = decision.plan
    if plan is None or not plan.device:
        return
    by_id = {one.engine: one for one in fleet}
    assert plan.slots >= DEVICE_SLOTS
    taken: dict[Member, int] = {}
    for group in plan.groups:
        for member in group.members:
            taken[member] = taken.get(member, 0) + plan.slots * plan.bucket_bytes
    for member, size in taken.items():
        ranks = by_id[member.engine].ranks
        assert all(rank.device.startswith("cuda") for rank in ranks)
        assert size <= DEVICE_BYTES
        assert all(size <= rank.device_bytes // DEVICE_PART for rank in ranks if rank.device_bytes)


def test_many_hosts_of_replicas_are_planned_in_time() -> None:
    fleet = [replica(f"e{n:03}", 1, host=f"h{n // 2:03}") for n in range(200)]
    start = time.perf_counter()
    decision = shared(*fleet)
    assert time.perf_counter() - start < 5
    assert list(routes_of(decision).values()).count("broadcast") == 2

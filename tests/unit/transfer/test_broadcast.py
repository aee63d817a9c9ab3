"""A group that does not form costs its time once, not with every version."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import structs

from tests.unit.consumers.machines import plan_of
from weightbus.consumers.errors import ApplyFailed, PeerLost
from weightbus.consumers.planning.hosts import host_share
from weightbus.consumers.transfer.broadcast import BroadcastRoute
from weightbus.consumers.transfer.filling import Filling
from weightbus.consumers.transfer.groups import Groups, Meeting
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.staged import Clock
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    Placement,
    Segment,
    SharedMemorySegment,
)
from weightbus.schemas.rounds import Group, Member, RoundPlan

pytestmark = pytest.mark.anyio


async def meet(route: BroadcastRoute, version: int, rendezvous: str, *engines: str) -> None:
    members = tuple(Member(engine, 0) for engine in engines)
    group = Group(id="g", members=members, rendezvous=rendezvous)
    plan: RoundPlan = structs.replace(plan_of(version, {"a": "broadcast"}), groups=(group,))
    await route._meet(host_share(plan, "a"), plan, Clock("broadcast", 5.0))


async def test_next_versions_come_without_a_group_when_its_members_do_not_meet(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nothing: Any = None
    groups = Groups("127.0.0.9", form_s=0.2)
    route = BroadcastRoute("a", nothing, nothing, groups, Meeting(None, "tcp://127.0.0.9:1"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with caplog.at_level(logging.WARNING), pytest.raises(PeerLost):
            await meet(route, 1, rendezvous, "a", "b")
    (warning,) = caplog.messages
    for part in ("the next 2 versions", "--address 127.0.0.9", rendezvous):
        assert part in warning
    assert [route.is_favoured(version) for version in (1, 2, 3, 4)] == [False, False, False, True]


async def test_group_of_one_says_nothing_about_the_others() -> None:
    nothing: Any = None
    groups = Groups("127.0.0.1", form_s=0.2)
    route = BroadcastRoute("a", nothing, nothing, groups, Meeting(None, "tcp://127.0.0.1:1"))
    await meet(route, 1, "", "a")
    assert route.is_favoured(2)


@pytest.mark.parametrize(
    ("cause", "members", "favoured"),
    [
        ("SegmentUnavailable", ["a"], False),
        ("CudaFailed", ["a"], False),
        ("PeerLost", ["a"], True),
        ("TornRead", ["a"], True),
        ("CudaFailed", ["a", "b"], True),
    ],
)
async def test_next_versions_are_not_shared_when_what_replicas_share_fails_here(
    cause: str, members: list[str], favoured: bool
) -> None:
    nothing: Any = None
    route = BroadcastRoute("a", nothing, nothing, nothing, Meeting(None, ""))
    groups = tuple(
        Group(id=f"g{lane}", members=tuple(Member(engine, lane) for engine in members))
        for lane in range(2)
    )
    plan = structs.replace(plan_of(1, {"a": "broadcast"}), groups=groups, device=True)
    device = Filling(slots=2, sources=(), fills={})
    route._learn(plan, device, ApplyFailed(0, cause, "it failed", touched=True), begun=True)
    assert [route.is_favoured(version) for version in (1, 2, 3, 4)] == [
        favoured,
        favoured,
        favoured,
        True,
    ]


def route_of(devices: Sequence[str] = ("cuda:0",)) -> BroadcastRoute:
    """Of engine `a` on host `h`."""
    nothing: Any = None
    sources = Sources(nothing, "h")
    route = BroadcastRoute("a", sources, nothing, Groups("127.0.0.1"), Meeting(None, "tcp://h:1"))
    route.know_devices(devices)
    return route


def filling_of(
    route: BroadcastRoute,
    *groups: Group,
    version: int = 1,
    placement: Placement = (),
    ways: Sequence[Segment] = (),
) -> Filling:
    plan = structs.replace(plan_of(version, {"a": "broadcast"}), groups=groups, device=True)
    nothing: Any = None
    transfer = Transfer(
        engine=nothing,
        ranks=(0, 1),
        version=version,
        layout=nothing,
        layout_digest="d" * 64,
        placement=placement,
        plan=plan,
        begin_write=nothing,
        deadline_s=1.0,
    )
    return route._filling(transfer, ways, host_share(plan, "a"))


def test_every_rank_fills_the_lanes_that_it_is_the_member_of() -> None:
    groups = [
        Group(
            id=f"g{lane}",
            members=(Member("b", lane), Member("a", lane % 2)),
            rendezvous="tcp://b:1",
        )
        for lane in range(3)
    ]
    filling = filling_of(route_of(), *groups)
    assert {rank: [fill.lane for fill in fills] for rank, fills in filling.fills.items()} == {
        0: [0, 2],
        1: [1],
    }
    fill = filling.fills[1][0]
    assert (fill.number, fill.place, fill.size, fill.group) == (1, 1, 2, "g1")
    assert fill.rendezvous == "tcp://b:1"


async def test_workers_meet_where_their_group_has_met_when_it_is_ready() -> None:
    """Their consumers are told only once; they meet before every plan."""
    route, group = route_of(), Group(id="g", members=(Member("a", 0),), rendezvous="tcp://a:1")
    await meet(route, 1, "", "a")
    assert route.groups == ("g",)
    keys = set()
    for version, rendezvous in ((1, "tcp://a:1"), (2, ""), (3, "")):
        known = structs.replace(group, rendezvous=rendezvous)
        (fill,) = filling_of(route, known, version=version).fills[0]
        assert fill.rendezvous == "tcp://a:1"
        keys.add(fill.key)
    assert len(keys) == 3, "every plan has a key of its own"
    other = Group(id="other", members=(Member("a", 0),))
    assert filling_of(route, other).fills[0][0].rendezvous == ""


def test_workers_read_memory_of_their_host_and_nothing_else() -> None:
    here = SharedMemorySegment(name="weightbus-x", host_id="h", generation=2)
    on_gpu = CudaSegment(handle=bytes(64), host_id="h", device_uuid="MIG-1", generation=2)
    file = FileSegment(path="/x")
    elsewhere = structs.replace(on_gpu, host_id="other")
    placement = ((on_gpu, here), (on_gpu, file), (file,), (elsewhere, file))
    group = Group(id="g", members=(Member("a", 0),))
    filling = filling_of(route_of(), group, placement=placement, ways=(here, file, file, file))
    assert filling.sources == (here, on_gpu, None, None)
    assert filling.brought == {2, 3}


@pytest.mark.parametrize("cause", ["SegmentUnavailable", "CudaFailed", "PeerLost"])
def test_memory_of_gpus_is_not_read_again_when_a_worker_could_not_open_it(cause: str) -> None:
    on_gpu = CudaSegment(handle=bytes(64), host_id="h", device_uuid="MIG-1", generation=2)
    route, group = route_of(), Group(id="g", members=(Member("a", 0),))
    ways: Any = {
        "placement": ((on_gpu, FileSegment(path="/x")),),
        "ways": (FileSegment(path="/x"),),
    }
    filling = filling_of(route, group, **ways)
    plan = structs.replace(plan_of(1, {"a": "broadcast"}), groups=(group,), device=True)
    route._learn(plan, filling, ApplyFailed(0, cause, "it failed", touched=False), begun=False)
    read = cause != "SegmentUnavailable"
    assert filling_of(route, group, **ways).sources == (on_gpu if read else None,)
    route.know_devices(["cuda:1"])
    assert filling_of(route, group, **ways).sources == (on_gpu,), "other GPUs may reach it"


def test_memory_of_gpus_is_read_again_when_a_worker_missed_the_lane_of_a_neighbour() -> None:
    on_gpu = CudaSegment(handle=bytes(64), host_id="h", device_uuid="MIG-1", generation=2)
    route, group = route_of(), Group(id="g", members=(Member("a", 0),))
    ways: Any = {
        "placement": ((on_gpu, FileSegment(path="/x")),),
        "ways": (FileSegment(path="/x"),),
    }
    plan = structs.replace(plan_of(1, {"a": "broadcast"}), groups=(group,), device=True)
    lost = PeerLost("of this host's lanes", ["lane of b"], "given up by its owner")
    lost.__cause__ = ApplyFailed(0, "SegmentUnavailable", "given up by its owner", touched=True)
    route._learn(plan, filling_of(route, group, **ways), lost, begun=True)
    assert filling_of(route, group, **ways).sources == (on_gpu,)


@pytest.mark.parametrize(
    ("cause", "rendezvous", "begun", "favoured"),
    [
        ("PeerLost", "tcp://b:1", False, False),
        ("PeerLost", "tcp://b:1", True, True),
        ("PeerLost", "", False, True),
        ("RouteUnavailable", "", False, False),
        ("NcclFailed", "", False, False),
        ("CudaFailed", "", False, False),
        ("CudaFailed", "", True, True),
        ("ProofNeeded", "", False, True),
    ],
)
def test_next_versions_come_without_a_broadcast_when_workers_cannot_begin_one(
    cause: str, rendezvous: str, begun: bool, favoured: bool
) -> None:
    route = route_of()
    group = Group(id="g", members=(Member("a", 0), Member("b", 0)), rendezvous=rendezvous)
    plan = structs.replace(plan_of(1, {"a": "broadcast"}), groups=(group,), device=True)
    failed = ApplyFailed(0, cause, "it failed", touched=False)
    lost = PeerLost("g", ["b/0"], "it failed")
    lost.__cause__ = failed
    error = lost if cause == "PeerLost" else failed
    route._learn(plan, Filling(slots=2, sources=(), fills={}), error, begun=begun)
    assert route.is_favoured(2) == favoured

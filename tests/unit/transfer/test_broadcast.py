"""A group that does not form costs its time once, not with every version."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest
from msgspec import structs

from tests.unit.consumers.machines import plan_of
from weightbus.consumers.errors import ApplyFailed, PeerLost
from weightbus.consumers.planning.hosts import host_share
from weightbus.consumers.transfer.broadcast import BroadcastRoute
from weightbus.consumers.transfer.filling import Filling
from weightbus.consumers.transfer.groups import Groups, Meeting
from weightbus.consumers.transfer.staged import Clock
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

"""Broadcast between virtual hosts, each consumer in a process of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.broadcast.fleet import Host, open_fleet
from tests.integration.broadcast.member import PATIENT_S, Command

pytestmark = [pytest.mark.anyio, pytest.mark.faults, pytest.mark.timeout(300)]

STALL_S = 6.0
"""Of a plan in which a member stands still. Of one that is gone the others know by themselves."""

FLEETS: Sequence[Sequence[Host]] = (
    ([("a", 1)], [("b", 1)]),
    ([("a", 2)], [("b", 3)], [("c", 1)]),
    ([("a", 1), ("b", 2)], [("c", 2)]),
    ([("a", 1)], [("b", 2)], [("c", 1)], [("d", 1)]),
    ([("a", 1), ("b", 1)],),
)
THREE: Sequence[Host] = ([("a", 1)], [("b", 2)], [("c", 1)])


def named(fleet: Sequence[Host]) -> str:
    return "+".join("".join(f"{name}{ranks}" for name, ranks in host) for host in fleet)


@pytest.mark.parametrize("hosts", FLEETS, ids=named)
async def test_version_reaches_every_rank_and_groups_are_kept(
    hosts: Sequence[Host], tmp_path: Path
) -> None:
    async with open_fleet(hosts, tmp_path) as fleet:
        await fleet.prove()
        for version in (2, 3, 4):
            fleet.publish(version)
            plan = fleet.plan(version, version, groups_of=2)
            results = await fleet.run(plan)
            for name, result in results.items():
                assert result.cause == "", f"{name}: {result.reason}"
                owned = {
                    group.id
                    for group in plan.groups
                    if name in {member.engine for member in group.members}
                }
                assert set(result.groups) == owned
                stages = {stage for rank in result.stages for stage in rank}
                wanted = {"fetch", "broadcast", "reload"} if len(hosts) > 1 else {"fetch", "reload"}
                assert stages == wanted, (name, result.stages)


@pytest.mark.parametrize(
    ("struck", "stall_s"),
    [(signal.SIGKILL, PATIENT_S), (signal.SIGSTOP, STALL_S)],
    ids=["killed", "stopped"],
)
async def test_survivors_know_soon_and_go_on_when_a_member_is_lost_in_a_bucket(
    struck: signal.Signals, stall_s: float, tmp_path: Path
) -> None:
    async with open_fleet(THREE, tmp_path) as fleet:
        await fleet.prove()
        fleet.publish(2)
        plan = fleet.plan(2, 2)
        heard = Command(plan=plan, stall_s=stall_s)
        struck_one = Command(plan=plan, stall_s=stall_s, signal=struck)
        results = await fleet.run(plan, expect=["a", "b"], a=heard, b=heard, c=struck_one)
        for name, result in results.items():
            assert (result.cause, result.groups) == ("PeerLost", ()), (name, result)
            assert "c/0" in result.reason
            assert result.seconds < PATIENT_S, result
        again = await fleet.run(fleet.plan(2, 3, without="c"))
        assert {name: result.cause for name, result in again.items()} == {"a": "", "b": ""}, again
        slowest_s = max(result.seconds for result in again.values())
        assert slowest_s < PATIENT_S, "nobody waits for the burial of the group that broke"
        if struck == signal.SIGSTOP:
            os.kill(fleet.members["c"].process.pid, signal.SIGCONT)
            late = await fleet.members["c"].result()
            assert late.cause == "PeerLost", late
            fleet.publish(3)
            whole = await fleet.run(fleet.plan(3, 4))
            assert {result.cause for result in whole.values()} == {""}, whole


async def test_others_go_on_when_one_engine_finds_that_it_cannot_stream(tmp_path: Path) -> None:
    """It takes the version by relay, while the others of its host read what its lanes bring."""
    async with open_fleet(([("a", 1), ("b", 2)], [("c", 2)]), tmp_path) as fleet:
        await fleet.prove(skip=["b"])
        fleet.publish(2)
        plan = fleet.plan(2, 2)
        results = await fleet.run(plan, b=Command(plan=plan, proven=True))
        assert {result.cause for result in results.values()} == {""}, results
        assert {stage for rank in results["a"].stages for stage in rank} >= {"broadcast"}
        assert {stage for rank in results["b"].stages for stage in rank} == {"fetch", "reload"}
        for name in ("a", "b", "c"):
            assert results[name].seconds < PATIENT_S, "nobody was waited for in vain"
            assert results[name].groups, "a group that kept step is kept"
        fleet.publish(3)
        results = await fleet.run(fleet.plan(3, 3, groups_of=2))
        assert {stage for rank in results["b"].stages for stage in rank} >= {"broadcast"}

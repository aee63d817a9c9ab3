"""Each process of a fleet that stands still in turn, in the middle of a broadcast.

Nothing waits for it without a deadline: no engine serves a mix, the others finish this version in
time, and what stood still is brought to it once it goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from tests.integration.faults.staged import (
    assert_in_time,
    broadcast_begins,
    client_of,
    comes_to,
    following,
    held_member,
    is_named,
)
from tests.integration.faults.test_p2p_sources import publish_by
from tests.integration.fleet.engines import Engines
from tests.integration.fleet.fleet import Fleet, open_fleet
from tests.integration.fleet.processes import Child, trainer_process
from tests.integration.fleet.signals import stopped
from tests.integration.fleet.staging import turns_of, until_filled
from tests.nats_server import NatsServer
from weightbus.consumers.engines.torch.client import TorchEngineClient

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

STATE_S = 60.0

Who = Literal["trainer", "consumer", "front", "rank", "nats-server"]
NEEDED_BY_ALL = ("trainer", "nats-server")


@pytest.fixture
async def own_fleet(
    nats_server: NatsServer, engines: Engines, tmp_path: Path
) -> AsyncIterator[Fleet]:
    """A fleet whose bus may stand still."""
    async with open_fleet(nats_server, engines, tmp_path) as fleet:
        yield fleet


async def pid_of(
    who: Who, fleet: Fleet, trainer: Child, b: Child, client: TorchEngineClient
) -> int:
    state = await client.state(STATE_S)
    return {
        "trainer": trainer.pid,
        "consumer": b.pid,
        "front": state.front_pid,
        "rank": state.pids[0],
        "nats-server": fleet.server.pid,
    }[who]


@pytest.mark.parametrize("who", ["trainer", "consumer", "front", "rank", "nats-server"])
async def test_others_finish_and_the_lost_one_catches_up_when_a_process_stands_still(
    own_fleet: Fleet, who: Who
) -> None:
    fleet = own_fleet
    async with (
        trainer_process(fleet, filled=True, p2p=fleet.p2p, linger_s=0.0) as trainer,
        client_of(fleet, "b") as client,
        following(fleet, "c") as (c,),
    ):
        async with following(fleet, "b") as (b,):
            first = await publish_by(trainer, fleet)
            for follower in (b, c):
                await follower.completes(first)
        async with held_member(fleet, "b") as member:
            before = turns_of(fleet.model)
            second = await publish_by(trainer, fleet)
            await broadcast_begins(fleet, second, "b", "c")
            await member.hears("before_apply")
            await until_filled(fleet.model, 1, after=before)
            with stopped(await pid_of(who, fleet, trainer, member, client)):
                member.go_on()
                if who not in NEEDED_BY_ALL:
                    assert_in_time(fleet, await c.completes(second))
                    await is_named(fleet, second, "b")
            await c.completes(second)
            await comes_to(fleet, client, second)
            third = await publish_by(trainer, fleet)
            await c.completes(third)
            await fleet.completes("b", client, third)

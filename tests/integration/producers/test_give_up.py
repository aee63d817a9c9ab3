"""A trainer that cannot come to publish a version says so, and which of its ranks say nothing."""

from __future__ import annotations

import anyio
import pytest
import torch

from tests.integration.producers.reader import next_message
from tests.integration.producers.test_ranks import open_ranks
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.producers.errors import SealFailed, VersionNotNew
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.producers.shards import Shard
from weightbus.schemas.checkpoint import CheckpointPart, CheckpointSkipped

pytestmark = pytest.mark.anyio

LONGEST_S = 10.0


async def give_up(*ranks: Publisher, version: int = 1) -> None:
    """All at once."""
    with anyio.fail_after(LONGEST_S):
        async with anyio.create_task_group() as tasks:
            for rank in ranks:
                tasks.start_soon(rank.give_up, version, "the loss is NaN")


async def skipped(bus: Bus, model: str) -> list[CheckpointSkipped]:
    return [said.message async for said in bus.replay(CheckpointSkipped, model=model)]


@pytest.mark.parametrize("silent", [0, 1, 2])
async def test_silent_rank_is_named_once_when_the_others_give_a_version_up(
    nats_server: NatsServer, bus: Bus, model: str, silent: int
) -> None:
    async with open_ranks(nats_server, model, 3) as ranks:
        await give_up(*(publisher for rank, publisher in enumerate(ranks) if rank != silent))
        (said,) = await skipped(bus, model)
    assert (said.version, said.cause, said.ranks) == (1, "ranks", (silent,))
    assert said.reason == "GivenUp: version 1 is given up: the loss is NaN"


async def test_no_rank_is_blamed_when_all_give_a_version_up(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    async with open_ranks(nats_server, model, 3) as ranks:
        await give_up(*ranks)
        (said,) = await skipped(bus, model)
    assert (said.version, said.cause, said.ranks) == (1, "failed", ())


async def test_version_is_used_up_when_a_rank_has_given_it_up(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    rows = torch.arange(4.0).reshape(2, 2)
    async with open_ranks(nats_server, model, 2) as ranks:
        await give_up(ranks[1])
        with anyio.fail_after(LONGEST_S), pytest.raises(SealFailed, match="rank 1 gave up"):
            await ranks[0].publish([Shard("w", rows[:1], (2, 2), (0, 0))], 1)
        with pytest.raises(VersionNotNew):
            await ranks[1].publish([Shard("w", rows[1:], (2, 2), (1, 0))], 1)


async def test_version_is_given_up_to_the_end_when_the_caller_is_cancelled(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    async with open_ranks(nats_server, model, 2) as ranks:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ranks[0].give_up, 1, "SystemExit: 143")
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        (said,) = await skipped(bus, model)
    assert (said.cause, said.ranks) == ("ranks", (1,))


async def test_trainer_of_one_rank_says_why_when_it_gives_a_version_up(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        await give_up(publisher, version=7)
        (said,) = await skipped(bus, model)
    assert (said.version, said.cause, said.ranks) == (7, "failed", ())


async def test_version_is_given_up_soon_when_one_before_is_waited_for(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    rows = torch.arange(4.0).reshape(2, 2)
    options = PublisherOptions(seal_timeout_s=600, linger_s=0)

    async def publish() -> None:
        await ranks[0].publish([Shard("w", rows[:1], (2, 2), (0, 0))], 1)

    async with open_ranks(nats_server, model, 2, options) as ranks:
        async with (
            bus.subscribe(CheckpointPart, model=model) as messages,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(publish)
            await next_message(messages)
            await give_up(ranks[0], version=2)
            tasks.cancel_scope.cancel()
        said = await skipped(bus, model)
    assert (said[0].version, said[0].ranks) == (2, (1,))

"""A version that does not come although ranks tried: said once on the bus, with who is at fault."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import anyio
import pytest
from nats.aio.msg import Msg

from tests.integration.bus.raw import raw_client
from tests.integration.producers.reader import next_message
from tests.integration.producers.test_ranks import held_by, open_ranks, publish_all
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.producers.errors import SealFailed, SlotBusy, VersionSkipped
from weightbus.producers.publisher import Publisher, PublisherOptions
from weightbus.producers.slots import WhenBusy
from weightbus.schemas.checkpoint import (
    CheckpointPart,
    CheckpointReady,
    CheckpointRetired,
    CheckpointSkipped,
)
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.leases import ReaderLease

pytestmark = pytest.mark.anyio

COUNT = 3


def options_of(when_busy: WhenBusy) -> PublisherOptions:
    return PublisherOptions(
        when_busy=when_busy, slot_wait_s=600, seal_timeout_s=600, close_wait_s=0
    )


async def publish_both(ranks: Sequence[Publisher]) -> None:
    """Versions 1 and 2, so that both slots are full."""
    for version in (1, 2):
        parts = [held_by(rank, len(ranks), version) for rank in range(len(ranks))]
        outcomes = await publish_all(ranks, parts, version)
        assert all(isinstance(outcome, CheckpointReady) for outcome in outcomes), outcomes


@asynccontextmanager
async def reading(bus: Bus, model: str, version: int = 1) -> AsyncIterator[None]:
    lease = ReaderLease(model=model, version=version, engine="slow", consumer="c")
    await bus.reader_leases.take(lease, 60)
    try:
        yield
    finally:
        await bus.reader_leases.release(lease)


@asynccontextmanager
async def every_word(server: NatsServer, model: str) -> AsyncIterator[list[str]]:
    """Subjects of all that is said of skipped versions, repeats that the bus drops, too."""
    heard = list[str]()

    async def take(message: Msg) -> None:
        heard.append(message.subject)

    async with raw_client(server.url) as client:
        await client.subscribe(f"*.{model}.checkpoint.skipped.>", cb=take)
        await client.flush()
        yield heard
        await client.flush()


async def said_of(bus: Bus, model: str) -> list[CheckpointSkipped]:
    """What the bus keeps."""
    return [heard.message async for heard in bus.replay(CheckpointSkipped, model=model)]


@asynccontextmanager
async def publishing(
    ranks: Sequence[Publisher], numbers: Sequence[int], version: int, bus: Bus, model: str
) -> AsyncIterator[list[anyio.CancelScope]]:
    """Some ranks publish, and have said their parts; each may be cancelled."""
    scopes = [anyio.CancelScope() for _ in numbers]

    async def publish(rank: int, scope: anyio.CancelScope) -> None:
        with scope, suppress(WeightBusError):
            await ranks[rank].publish(held_by(rank, COUNT, version), version)

    async with anyio.create_task_group() as tasks:
        async with bus.subscribe(CheckpointPart, model=model) as messages:
            for number, scope in zip(numbers, scopes, strict=True):
                tasks.start_soon(publish, number, scope)
            waited_for = set(numbers)
            while waited_for:
                waited_for.discard((await next_message(messages)).message.rank)
        yield scopes


async def test_version_is_skipped_on_every_rank_and_said_once_when_engines_are_busy(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    async with open_ranks(nats_server, model, COUNT, options_of("skip")) as ranks:
        await publish_both(ranks)
        parts = [held_by(rank, COUNT, 3) for rank in range(COUNT)]
        async with (
            every_word(nats_server, model) as words,
            bus.subscribe(CheckpointSkipped, CheckpointReady, model=model) as messages,
        ):
            async with reading(bus, model, 2):
                with anyio.fail_after(30):
                    outcomes = await publish_all(ranks, parts, 3)
            assert all(isinstance(outcome, VersionSkipped) for outcome in outcomes), outcomes
            assert await bus.last(CheckpointRetired, model=model) is None
            parts = [held_by(rank, COUNT, 4) for rank in range(COUNT)]
            outcomes = await publish_all(ranks, parts, 4)
            assert all(isinstance(outcome, CheckpointReady) for outcome in outcomes), outcomes
            heard = (await next_message(messages)).message
            following = (await next_message(messages)).message
    assert isinstance(heard, CheckpointSkipped)
    assert isinstance(following, CheckpointReady)
    assert len(words) == 1, "rank 0 alone says it"
    assert (heard.version, heard.cause, heard.ranks) == (3, "busy", ())
    assert "slow (version 2)" in heard.reason


@pytest.mark.parametrize("first", [0, 1, 2])
async def test_version_is_skipped_on_every_rank_when_one_has_skipped_it(
    nats_server: NatsServer, bus: Bus, model: str, first: int
) -> None:
    others = [rank for rank in range(COUNT) if rank != first]
    async with open_ranks(nats_server, model, COUNT, options_of("skip")) as ranks:
        await publish_both(ranks)
        async with reading(bus, model):
            with pytest.raises(VersionSkipped, match=r"version 3 is skipped: still read by slow"):
                await ranks[first].publish(held_by(first, COUNT, 3), 3)
        with anyio.fail_after(30):
            outcomes = await publish_all(
                [ranks[rank] for rank in others], [held_by(rank, COUNT, 3) for rank in others], 3
            )
        for outcome in outcomes:
            assert isinstance(outcome, VersionSkipped), outcome
            assert "slow (version 1)" in outcome.reason
            assert outcome.rank == first or f"rank {first}, " in str(outcome)
    (said,) = await said_of(bus, model)
    assert (said.version, said.cause) == (3, "busy")


async def test_version_that_one_rank_fails_is_said_once_with_its_reason(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    async with (
        every_word(nats_server, model) as words,
        open_ranks(nats_server, model, COUNT, options_of("fail")) as ranks,
    ):
        await publish_both(ranks)
        async with reading(bus, model):
            with pytest.raises(SlotBusy):
                await ranks[1].publish(held_by(1, COUNT, 3), 3)
        outcomes = await publish_all(
            [ranks[0], ranks[2]], [held_by(0, COUNT, 3), held_by(2, COUNT, 3)], 3
        )
        assert all(isinstance(outcome, SealFailed) for outcome in outcomes), outcomes
    (said,) = await said_of(bus, model)
    assert (said.version, said.cause, said.ranks) == (3, "busy", ())
    assert len(words) == 1, "rank 1 has said it, and rank 0 finds that"


async def test_version_is_said_to_have_failed_when_parts_make_no_checkpoint(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    async with open_ranks(nats_server, model, COUNT) as ranks:
        parts = [held_by(rank, COUNT, 1) for rank in range(COUNT)]
        parts[1] = parts[1][1:]
        outcomes = await publish_all(ranks, parts, 1)
        assert all(isinstance(outcome, WeightBusError) for outcome in outcomes), outcomes
    (said,) = await said_of(bus, model)
    assert (said.version, said.cause, said.ranks) == (1, "failed", ())
    assert "every element" in said.reason


@pytest.mark.parametrize("missing", [0, 1])
async def test_missing_rank_is_named_on_the_bus_when_it_does_not_publish(
    nats_server: NatsServer, bus: Bus, model: str, missing: int
) -> None:
    others = [rank for rank in range(COUNT) if rank != missing]
    async with open_ranks(nats_server, model, COUNT, PublisherOptions(seal_timeout_s=0.5)) as ranks:
        outcomes = await publish_all(
            [ranks[rank] for rank in others], [held_by(rank, COUNT, 1) for rank in others], 1
        )
        assert all(isinstance(outcome, SealFailed) for outcome in outcomes), outcomes
    (said,) = await said_of(bus, model)
    assert (said.version, said.cause, said.ranks) == (1, "ranks", (missing,))


@pytest.mark.parametrize("ends_first", [0, 1])
async def test_dead_rank_is_named_when_all_others_are_ended_because_of_it(
    nats_server: NatsServer, bus: Bus, model: str, ends_first: int
) -> None:
    """A launcher ends what is left of a trainer, in any order; rank 2 has died unheard."""
    async with open_ranks(nats_server, model, COUNT, options_of("wait")) as ranks:
        with anyio.fail_after(30):
            async with publishing(ranks, (0, 1), 1, bus, model) as scopes:
                scopes[ends_first].cancel()
                await anyio.sleep(0.05)
                scopes[1 - ends_first].cancel()
    (said,) = await said_of(bus, model)
    assert (said.version, said.cause, said.ranks) == (1, "ranks", (2,))
    assert said.reason


@pytest.mark.parametrize("called", [False, True])
async def test_rank_0_is_named_when_it_is_dead_and_the_others_are_ended(
    nats_server: NatsServer, bus: Bus, model: str, called: bool
) -> None:
    async with open_ranks(nats_server, model, COUNT, options_of("wait")) as ranks:
        with anyio.fail_after(30):
            async with publishing(ranks, (1, 2), 1, bus, model) as scopes:
                if called:
                    part = await bus.last(CheckpointPart, model=model, producer="trainer", rank=1)
                    assert part is not None
                    await bus.publish(_as_rank_0(part.message))
                for scope in scopes:
                    scope.cancel()
    (said,) = await said_of(bus, model)
    assert (said.version, said.cause, said.ranks) == (1, "ranks", (0,))


def _as_rank_0(part: CheckpointPart) -> CheckpointPart:
    return CheckpointPart(
        model=part.model,
        version=part.version,
        producer=part.producer,
        rank=0,
        world_size=part.world_size,
        layout_digest=part.layout_digest,
        placement=part.placement,
    )


async def test_nobody_is_named_when_all_ranks_are_ended(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    """All have given up in time, so that none is missing."""
    async with open_ranks(nats_server, model, COUNT, options_of("wait")) as ranks:
        with anyio.fail_after(30):
            async with publishing(ranks, (0, 1), 1, bus, model) as scopes:
                for scope in scopes:
                    scope.cancel()
                with pytest.raises(WeightBusError):
                    await ranks[2].publish(held_by(2, COUNT, 1), 1)
    (said,) = await said_of(bus, model)
    assert said.ranks == ()

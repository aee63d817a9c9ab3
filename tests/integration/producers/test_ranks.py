"""Several ranks make one checkpoint: sealed whole, or refused with the rank that is at fault."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import anyio
import anyio.to_thread
import pytest
import torch
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.integration.producers.reader import digest_of_model, next_message, read_checkpoint
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import ObjectMissing
from weightbus.producers.errors import SealFailed, SlotBusy, TensorInvalid, VersionNotNew
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.producers.shards import Delta, Part, Shard, Tensors, plan_part
from weightbus.schemas.checkpoint import CheckpointPart, CheckpointReady, CheckpointSkipped
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.leases import ReaderLease
from weightbus.tracing.context import SpanRef
from weightbus.tracing.telemetry import Telemetry, open_telemetry

pytestmark = pytest.mark.anyio

Outcome = CheckpointReady | WeightBusError


@asynccontextmanager
async def open_ranks(
    server: NatsServer,
    model: str,
    count: int,
    options: PublisherOptions | None = None,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[list[Publisher]]:
    """Every rank with a connection of its own, as in processes of their own."""
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(open_bus(server.settings)) for _ in range(count)]
        yield [
            await stack.enter_async_context(
                open_publisher(
                    bus,
                    model,
                    rank=rank,
                    world_size=count,
                    options=options,
                    telemetry=telemetry,
                )
            )
            for rank, bus in enumerate(buses)
        ]


async def publish_all(
    ranks: Sequence[Publisher], held: Sequence[Tensors], version: int
) -> list[Outcome]:
    """What `publish` returned or raised on every rank, all at once."""
    outcomes: dict[int, Outcome] = {}

    async def publish(rank: int) -> None:
        try:
            outcomes[rank] = await ranks[rank].publish(held[rank], version)
        except WeightBusError as error:
            outcomes[rank] = error

    async with anyio.create_task_group() as tasks:
        for rank in range(len(ranks)):
            tasks.start_soon(publish, rank)
    return [outcomes[rank] for rank in range(len(ranks))]


def rows_of(whole: torch.Tensor, rank: int, count: int) -> Shard:
    begin, end = rank * len(whole) // count, (rank + 1) * len(whole) // count
    return Shard("w", whole[begin:end], tuple(whole.shape), (begin, 0))


def held_by(rank: int, count: int, seed: int) -> list[Shard]:
    """A tensor cut in rows, a replica on every rank, and a tensor of the last rank's alone."""
    generator = torch.Generator().manual_seed(seed)
    whole, norm = torch.randn(11, 5, generator=generator), torch.randn(5, generator=generator)
    last = [Shard("head", norm * 2)] if rank == count - 1 else []
    return [rows_of(whole, rank, count), Shard("norm", norm), *last]


def whole_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    whole, norm = torch.randn(11, 5, generator=generator), torch.randn(5, generator=generator)
    return {"w": whole, "norm": norm, "head": norm * 2}


@pytest.mark.parametrize("count", [2, 3, 4])
async def test_ranks_make_one_checkpoint_when_all_publish(
    nats_server: NatsServer, bus: Bus, model: str, count: int
) -> None:
    async with open_ranks(nats_server, model, count) as ranks:
        for version in range(1, 5):
            held = [held_by(rank, count, version) for rank in range(count)]
            outcomes = await publish_all(ranks, held, version)
            ready = outcomes[0]
            assert isinstance(ready, CheckpointReady), ready
            assert outcomes == [ready] * count
            found = await read_checkpoint(bus, ready)
            expected = whole_of(version)
            assert list(found) == list(expected)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), name
            assert ready.weights_digest == digest_of_model(expected.values())
        part = await bus.last(CheckpointPart, model=model, producer="trainer", rank=1)
        assert part is not None
        assert part.message.shard_digests is not None
        with pytest.raises(ObjectMissing):
            await bus.objects.get(part.message.shard_digests)


async def test_span_of_rank_0_is_linked_to_those_of_the_others(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    exporter = InMemorySpanExporter()
    with open_telemetry("trainer", exporter=exporter, shutdown_s=30) as telemetry:
        async with open_ranks(nats_server, model, 3, telemetry=telemetry) as ranks:
            for version in (1, 2):
                await publish_all(ranks, [held_by(rank, 3, version) for rank in range(3)], version)
        last = await bus.last(CheckpointReady, model=model)
    assert last is not None
    spans = {
        (said["weightbus.version"], said["weightbus.rank"]): span
        for span in exporter.get_finished_spans()
        if (said := dict(span.attributes or {}))
    }
    for version in (1, 2):
        root, *others = [spans[version, rank].context for rank in range(3)]
        linked = {link.context.span_id for link in spans[version, 0].links}
        assert linked == {other.span_id for other in others if other is not None}
        assert spans[version, 1].links == ()
    said_in = SpanRef.from_headers(last.headers)
    assert root is not None
    assert said_in is not None
    assert said_in == SpanRef.of(root), "its event names the span of rank 0"


@pytest.mark.parametrize("late", [0, 1, 2])
async def test_ranks_come_together_when_one_is_late(
    nats_server: NatsServer, bus: Bus, model: str, late: int
) -> None:
    outcomes: list[CheckpointReady] = []

    async with open_ranks(nats_server, model, 3) as ranks, anyio.create_task_group() as tasks:

        async def publish(rank: int) -> None:
            outcomes.append(await ranks[rank].publish(held_by(rank, 3, 1), 1))

        async with bus.subscribe(CheckpointPart, model=model) as messages:
            others = {0, 1, 2} - {late}
            for rank in others:
                tasks.start_soon(publish, rank)
            while others:
                others.discard((await next_message(messages)).message.rank)
        await publish(late)
    assert outcomes == outcomes[:1] * 3


@pytest.mark.parametrize("late", [0, 1])
async def test_ranks_come_together_when_the_bus_is_restarted_while_one_waits(
    nats_server: NatsServer, bus: Bus, model: str, late: int
) -> None:
    outcomes: list[CheckpointReady] = []
    early = 1 - late

    async with open_ranks(nats_server, model, 2) as ranks:

        async def publish(rank: int) -> None:
            outcomes.append(await ranks[rank].publish(held_by(rank, 2, 1), 1))

        async with anyio.create_task_group() as tasks:
            async with bus.subscribe(CheckpointPart, model=model) as messages:
                tasks.start_soon(publish, early)
                assert (await next_message(messages)).message.rank == early
            await anyio.to_thread.run_sync(nats_server.restart)
            await publish(late)
        assert outcomes == outcomes[:1] * 2
        assert torch.equal((await read_checkpoint(bus, outcomes[0]))["w"], whole_of(1)["w"])


async def test_missing_rank_is_named_on_every_rank_when_it_does_not_publish(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    options = PublisherOptions(seal_timeout_s=1.5)
    async with open_ranks(nats_server, model, 3, options) as ranks:
        held = [held_by(rank, 3, 1) for rank in range(3)]
        outcomes = await publish_all([ranks[0], ranks[2]], [held[0], held[2]], 1)
        for outcome in outcomes:
            assert isinstance(outcome, SealFailed), outcome
            assert outcome.reason.endswith("there is no part of ranks 1"), outcome
            assert "rank 0 gave up" in outcome.reason or outcome.missing == (1,)
        assert await bus.last(CheckpointReady, model=model) is None
        with pytest.raises(VersionNotNew):
            await ranks[0].publish(held[0], 1)
        again = await publish_all(ranks, held, 2)
        assert isinstance(again[0], CheckpointReady), again


async def test_rank_names_rank_0_when_that_does_not_publish(
    nats_server: NatsServer, model: str
) -> None:
    options = PublisherOptions(seal_timeout_s=0.1)
    async with open_ranks(nats_server, model, 3, options) as ranks:
        held = [held_by(rank, 3, 1) for rank in range(3)]
        for outcome in await publish_all(ranks[1:], held[1:], 1):
            assert isinstance(outcome, SealFailed), outcome
            assert outcome.missing == (0,), "each heard nothing of the other"


Break = Callable[[list[list[Shard]]], None]


def _overlap(held: list[list[Shard]]) -> None:
    held[1][0] = Shard("w", torch.zeros(6, 5), (11, 5), (4, 0))


def _gap(held: list[list[Shard]]) -> None:
    held[1][0] = Shard("w", torch.zeros(2, 5), (11, 5), (9, 0))


def _replica(held: list[list[Shard]]) -> None:
    held[1][1] = Shard("norm", torch.zeros(5))


def _dtype(held: list[list[Shard]]) -> None:
    held[1][1] = Shard("norm", torch.zeros(5, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("break_it", "cause"),
    [
        (_overlap, "overlaps"),
        (_gap, "every element"),
        (_replica, "tensor norm is held by several ranks"),
        (_dtype, "tensor norm is BF16"),
    ],
)
async def test_cause_is_told_to_every_rank_when_parts_make_no_checkpoint(
    nats_server: NatsServer, bus: Bus, model: str, break_it: Break, cause: str
) -> None:
    async with open_ranks(nats_server, model, 2) as ranks:
        held = [held_by(rank, 2, 1) for rank in range(2)]
        await publish_all(ranks, held, 1)
        broken = [held_by(rank, 2, 2) for rank in range(2)]
        break_it(broken)
        with anyio.fail_after(30):
            outcomes = await publish_all(ranks, broken, 2)
        assert all(cause in str(outcome) for outcome in outcomes), outcomes
        last = await bus.last(CheckpointReady, model=model)
        assert last is not None
        assert last.message.version == 1
        assert torch.equal((await read_checkpoint(bus, last.message))["w"], whole_of(1)["w"])
        again = await publish_all(ranks, [held_by(rank, 2, 3) for rank in range(2)], 3)
        assert isinstance(again[1], CheckpointReady), again
        assert torch.equal((await read_checkpoint(bus, again[1]))["w"], whole_of(3)["w"])


async def test_other_ranks_end_at_once_when_one_gives_up(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    options = PublisherOptions(slot_wait_s=0.2, close_wait_s=0.1)
    async with open_ranks(nats_server, model, 2, options) as ranks:
        for version in (1, 2):
            await publish_all(ranks, [held_by(rank, 2, version) for rank in range(2)], version)
        reader = ReaderLease(model=model, version=1, engine="slow", consumer="c")
        await bus.reader_leases.take(reader, 60)
        with anyio.fail_after(30):
            outcomes = await publish_all(ranks, [held_by(rank, 2, 3) for rank in range(2)], 3)
        assert all("slow (version 1)" in str(outcome) for outcome in outcomes), outcomes


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("how", ["tensor", "prepare", "metadata", "newest"])
async def test_other_ranks_end_at_once_when_one_has_nothing_to_publish(
    nats_server: NatsServer, bus: Bus, model: str, bad: int, how: str
) -> None:
    outcomes: list[WeightBusError] = []

    async def publish(rank: int) -> None:
        held: Tensors | Part = held_by(rank, 2, 1)
        metadata = {}
        if rank == bad and how == "tensor":
            held = {"w": torch.zeros(1, device="meta")}
        if rank == bad and how == "prepare":
            held = replace(plan_part(held_by(rank, 2, 1)), prepared=(Refusing(),))
        if rank == bad and how == "metadata":
            metadata = {"loss": "x" * 5000}
        with pytest.raises(WeightBusError) as raised:
            await ranks[rank].publish(held, 1, metadata)
        outcomes.append(raised.value)

    async with open_ranks(nats_server, model, 2, PublisherOptions(seal_timeout_s=600)) as ranks:
        if how == "newest":
            ready = CheckpointReady(model=model, version=1, producer="other", files=("/w",))
            ranks[bad]._announcer.remember(ready)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for rank in range(2):
                    tasks.start_soon(publish, rank)
        assert any(f"rank {bad} gave up" in str(outcome) for outcome in outcomes), outcomes
        again = await publish_all(ranks, [held_by(rank, 2, 2) for rank in range(2)], 2)
    assert isinstance(again[1], CheckpointReady), again


class Refusing(Delta):
    def prepare(self) -> None:
        raise TensorInvalid("w", "an adapter", "is of no known kind")

    def add_to(self, source: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        raise AssertionError


async def test_parts_of_different_steps_are_not_sealed(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    outcomes: dict[int, str] = {}

    async def publish(rank: int, step: str, version: int) -> None:
        try:
            await ranks[rank].publish(held_by(rank, 2, 1), version, {"step": step} if step else {})
            outcomes[rank] = "sealed"
        except SealFailed as error:
            outcomes[rank] = error.reason

    async with open_ranks(nats_server, model, 2) as ranks:
        for version, steps in enumerate([("53", "52"), ("53", ""), ("9" * 200, "9" * 200)]):
            async with anyio.create_task_group() as tasks:
                for rank, step in enumerate(steps):
                    tasks.start_soon(publish, rank, step, version)
            if version == 0:
                assert any(
                    reason
                    in ("rank 1 is at step 52, rank 0 at 53", "rank 0 is at step 53, rank 1 at 52")
                    for reason in outcomes.values()
                ), outcomes
                assert "sealed" not in outcomes.values()
            else:
                assert outcomes == {0: "sealed", 1: "sealed"}


@pytest.mark.parametrize("late", [0, 1])
async def test_rank_at_another_version_is_named_with_it(
    nats_server: NatsServer, bus: Bus, model: str, late: int
) -> None:
    outcomes: dict[int, str] = {}

    async def publish(rank: int, version: int) -> None:
        with pytest.raises(SealFailed) as raised:
            await ranks[rank].publish(held_by(rank, 2, 1), version)
        outcomes[rank] = raised.value.reason

    options = PublisherOptions(seal_timeout_s=3)
    async with (
        open_ranks(nats_server, model, 2, options) as ranks,
        bus.subscribe(CheckpointPart, model=model) as messages,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(publish, 1 - late, 5 - (1 - late))
        await next_message(messages)
        tasks.start_soon(publish, late, 5 - late)
    assert "rank 1 is at version 4" in outcomes[0], outcomes
    assert "rank 0 is at version 5" in outcomes[1], outcomes


async def test_ranks_are_told_before_the_bus_is(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    async with open_ranks(nats_server, model, 2) as ranks:
        with pytest.raises(WeightBusError):
            await ranks[1].publish(held_by(1, 2, 1), 2, {"loss": "x" * 5000})
        (part,) = [each async for each in bus.replay(CheckpointPart, model=model)]
        (skipped,) = [each async for each in bus.replay(CheckpointSkipped, model=model)]
    assert part.message.error
    assert part.received_ns <= skipped.received_ns


async def test_ranks_refuse_each_other_when_they_disagree_on_their_number(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    options = PublisherOptions(seal_timeout_s=10)
    async with (
        open_publisher(bus, model, rank=0, world_size=2, options=options) as first,
        open_publisher(bus, model, rank=1, world_size=3, options=options) as second,
    ):
        held = [held_by(rank, 2, 1) for rank in range(2)]
        outcomes = await publish_all([first, second], held, 1)
    assert any("is one of" in str(outcome) for outcome in outcomes), outcomes
    assert all(isinstance(outcome, SealFailed) for outcome in outcomes), outcomes


async def give_up_alone(ranks: Sequence[Publisher], rank: int, bus: Bus, model: str) -> None:
    """Rank `rank` fails before any other rank begins: a reader keeps its slot."""
    for version in (1, 2):
        held = [held_by(number, len(ranks), version) for number in range(len(ranks))]
        await publish_all(ranks, held, version)
    reader = ReaderLease(model=model, version=1, engine="slow", consumer="c")
    await bus.reader_leases.take(reader, 60)
    with pytest.raises(SlotBusy):
        await ranks[rank].publish(held_by(rank, len(ranks), 3), 3)
    await bus.reader_leases.release(reader)


@pytest.mark.parametrize(("first", "then"), [(1, 0), (0, 1)])
async def test_rank_ends_at_once_when_another_gave_up_before_it_began(
    nats_server: NatsServer, bus: Bus, model: str, first: int, then: int
) -> None:
    options = PublisherOptions(slot_wait_s=0.2, close_wait_s=0.1, seal_timeout_s=600)
    async with open_ranks(nats_server, model, 2, options) as ranks:
        await give_up_alone(ranks, first, bus, model)
        with anyio.fail_after(30), pytest.raises(SealFailed, match=f"rank {first} gave up: SlotB"):
            await ranks[then].publish(held_by(then, 2, 3), 3)


async def test_ranks_come_together_when_a_rank_of_an_earlier_run_gave_the_version_up(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    options = PublisherOptions(slot_wait_s=0.2, close_wait_s=0.1)
    async with open_ranks(nats_server, model, 2, options) as ranks:
        await give_up_alone(ranks, 1, bus, model)
    async with open_ranks(nats_server, model, 2, options) as ranks:
        outcomes = await publish_all(ranks, [held_by(rank, 2, 3) for rank in range(2)], 3)
    assert all(isinstance(outcome, CheckpointReady) for outcome in outcomes), outcomes


async def test_other_ranks_are_told_when_the_layout_of_a_part_is_not_one(
    nats_server: NatsServer, model: str
) -> None:
    options = PublisherOptions(seal_timeout_s=600)
    async with open_ranks(nats_server, model, 2, options) as ranks:
        held = [held_by(rank, 2, 1) for rank in range(2)]
        held[1].append(held[1][1])
        with anyio.fail_after(30):
            outcomes = await publish_all(ranks, held, 1)
    assert isinstance(outcomes[1], WeightBusError)
    assert "rank 1 gave up" in str(outcomes[0]), outcomes

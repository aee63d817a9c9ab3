"""One trainer rank, a process of its own, with its part of the tensors on its GPU.

    python -m benchmarks.h200.trainer ARGUMENTS

Answers each line of JSON on stdin (`Command`) with one on stdout (`Published` or `Released`). Every
version has other bytes, made where the tensors lie; they are published as any trainer would publish
them.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import torch
from msgspec import Struct

from benchmarks.h200.processes import answer_commands
from benchmarks.h200.setup import Setup, Source, sources_of
from benchmarks.h200.slots import SlotKind, publisher_options
from benchmarks.h200.weights import fill
from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.shards import Shard, plan_part
from weightbus.schemas.checkpoint import CheckpointReady

__all__ = ("Arguments", "Publish", "Published", "Release", "Released", "model_of", "owned_by")

PUBLISH_S = 180.0
DIGEST_SHARE = 0.8
"""Of the processors, shared among the ranks, for what digests on the CPU."""


class Arguments(Struct, frozen=True, kw_only=True):
    url: str
    setup: Setup
    rank: int


class Publish(Struct, frozen=True, kw_only=True, tag=True):
    """Make this version, and publish it."""

    version: int
    slots: SlotKind


class Release(Struct, frozen=True, kw_only=True, tag=True):
    """Let go of the slots of this kind: what follows needs their memory."""

    slots: SlotKind


Command = Publish | Release


class Released(Struct, frozen=True):
    """It is done."""


class Published(Struct, frozen=True, kw_only=True):
    """What one rank did."""

    start_ns: int
    """When it was told to publish."""
    free_ns: int
    """When the trainer's next work could begin: it may touch its tensors, and what was queued on
    its stream before is done."""
    end_ns: int
    """When the version was announced."""
    ready: CheckpointReady


def model_of(setup: Setup, slots: SlotKind) -> str:
    """The model that engines follow to be brought versions from slots of a kind."""
    return f"{setup.model}-{slots}"


def owned_by(sources: list[Source], rank: int, ranks: int) -> list[Source]:
    """A rank's share of whole tensors, in order and by bytes: as even as they can be cut."""
    total, begin, mine = sum(source.size_bytes for source in sources), 0, []
    for source in sources:
        if min(ranks - 1, begin * ranks // total) == rank:
            mine.append(source)
        begin += source.size_bytes
    return mine


def slice_of(source: Source, rank: int, ranks: int) -> range:
    """The rows that FSDP2 gives a rank: `torch.chunk` of dimension 0."""
    step = -(-source.shape[0] // ranks)
    return range(min(rank * step, source.shape[0]), min((rank + 1) * step, source.shape[0]))


class Trainer:
    """The tensors of one rank, and its publishers: one for each kind of slots."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments, setup = arguments, arguments.setup
        self._stacks: dict[SlotKind, ExitStack] = {}
        self._publishers: dict[SlotKind, BlockingPublisher] = {}
        self._device = setup.device(arguments.rank)
        self._shards = list(self._boxes())
        self._part = plan_part(self._shards)

    def _boxes(self) -> Iterator[Shard]:
        setup, rank = self._arguments.setup, self._arguments.rank
        sources = sources_of(setup.config)
        for source in sources if setup.fsdp else owned_by(sources, rank, setup.devices):
            rows = range(source.shape[0])
            if setup.fsdp:
                rows = slice_of(source, rank, setup.devices)
            shape = (len(rows), *source.shape[1:])
            yield Shard(
                name=source.name,
                tensor=torch.empty(shape, dtype=source.dtype, device=self._device),
                global_shape=source.shape,
                starts=(rows.start, *(0 for _ in source.shape[1:])),
            )

    def carry_out(self, command: Command) -> Published | Released:
        if isinstance(command, Release):
            self._release(command.slots)
            return Released()
        for shard in self._shards:
            assert shard.starts is not None
            if shard.tensor.numel():
                fill(shard.tensor, shard.name, command.version, shard.starts[0])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        publisher = self._publisher(command.slots)
        start_ns = time.time_ns()
        publication = publisher.start(self._part, command.version)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        free_ns = time.time_ns()
        ready = publication.result(PUBLISH_S)
        return Published(start_ns=start_ns, free_ns=free_ns, end_ns=time.time_ns(), ready=ready)

    def _publisher(self, slots: SlotKind) -> BlockingPublisher:
        """Opened with its first version, by all ranks at once."""
        if slots not in self._publishers:
            arguments = self._arguments
            ranks = arguments.setup.devices
            threads = max(1, int(DIGEST_SHARE * len(os.sched_getaffinity(0)) / ranks))
            self._stacks[slots] = ExitStack()
            self._publishers[slots] = self._stacks[slots].enter_context(
                BlockingPublisher(
                    BusSettings(url=arguments.url, name=f"trainer-{arguments.rank}"),
                    model_of(arguments.setup, slots),
                    rank=arguments.rank,
                    world_size=ranks,
                    options=publisher_options(slots, arguments.setup, threads),
                )
            )
        return self._publishers[slots]

    def _release(self, slots: SlotKind) -> None:
        if self._publishers.pop(slots, None) is not None:
            self._stacks.pop(slots).close()

    def close(self) -> None:
        for slots in list(self._publishers):
            self._release(slots)


def main(arguments: Arguments) -> None:
    commands = answer_commands(Command)
    device = arguments.setup.device(arguments.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainer = Trainer(arguments)
    gc.freeze()  # tens of thousands of tensors that stay
    try:
        for command, answer in commands:
            answer(trainer.carry_out(command))
    finally:
        trainer.close()


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Arguments))

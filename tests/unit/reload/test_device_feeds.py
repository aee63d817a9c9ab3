"""Workers of two engines on one host fill and read device lanes, and hold what the loader makes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
import torch

from tests.unit.reload.models import ModuleHost, same_bits
from tests.unit.reload.test_feeds import Wide, load_wide, wide_tensors
from tests.unit.reload.test_worker import DEADLINE_S, Client
from tests.unit.transfer.device_fleet import clean
from tests.unit.transfer.publishing import cut_layout, open_trainer
from tests.unit.transfer.staging import Owner, open_staging
from tests.unit.transfer.streaming_cuda import StreamingCuda
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.consumers.transfer.device_lanes import DeviceStaging
from weightbus.schemas.placement import Segment
from weightbus.schemas.shared_memory import (
    SHM_ADMITTED_OFFSET,
    SHM_FILLED_OFFSET,
    SHM_STAGED_OFFSET,
    TURN_BITS,
)
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Failed,
    LaneFill,
    Prepare,
    Prepared,
    Stream,
    WorkerReply,
)

ENGINES: Final = 2
LANES: Final = 3
BUCKET_BYTES: Final = 5000
SLOTS: Final = 2


class Engine:
    """One engine of one rank, on a GPU of its own."""

    def __init__(self, number: int, client: Client, host: ModuleHost, cuda: StreamingCuda) -> None:
        self.number, self.client, self.host, self.cuda = number, client, host, cuda
        self.reply: WorkerReply | None = None

    def feed(self, owner: Owner, sources: Sequence[Segment], turn: int) -> Stream:
        return Stream(
            lanes=owner.names,
            bucket_bytes=BUCKET_BYTES,
            slots=SLOTS,
            turn=turn,
            reader=self.number,
            device=True,
            fills=tuple(LaneFill(n, n) for n in range(LANES) if n % ENGINES == self.number),
            sources=tuple(sources),
            readers=ENGINES,
        )

    def apply(self, feed: Stream, version: int) -> None:
        self.reply = self.client.worker.handle(
            Apply(
                request=9,
                version=version,
                layout_digest=self.client.trainer.layout_digest,
                feed=feed,
                deadline_s=DEADLINE_S,
            )
        )

    def prepare(self, feed: Stream) -> Prepared:
        while True:
            reply = self.client.worker.handle(
                Prepare(
                    request=8,
                    layout_digest=self.client.trainer.layout_digest,
                    feed=feed,
                    deadline_s=DEADLINE_S,
                )
            )
            assert isinstance(reply, Prepared), reply
            if reply.ready:
                return reply

    def check(self, tensors: dict[str, torch.Tensor], version: int) -> Applied:
        assert self.reply is not None
        applied = self.client.verified(self.reply, tensors, version)
        fresh = Wide()
        load_wide(fresh, iter(tensors.items()))
        for name, want in fresh.named_parameters():
            assert same_bits(self.host.live.get_parameter(name), want), name
        return applied


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[Engine]]:
    """Their parameters are in main memory, and so is that of their GPUs."""
    with open_trainer(cut_layout(wide_tensors(0), 3), "memory", tmp_path) as trainer:
        made: list[Engine] = []
        for number in range(ENGINES):
            host = ModuleHost(Wide, load_wide)
            cuda = StreamingCuda(slowly_s=1e-3, other=made[0].cuda if made else None)
            lanes = DeviceStaging("cuda:0", lambda cuda=cuda: cuda)  # type: ignore[misc]
            client = Client(ReloadWorker(host, 0, 1, lanes=lanes), trainer)
            client.attach()
            made.append(Engine(number, client, host, cuda))
        yield made
        for engine in made:
            engine.client.worker.close()
        clean(made[0].cuda)


def begin(owner: Owner, turn: int) -> None:
    """As the owners of lanes do before a version."""
    for block in owner.blocks:
        for word in (SHM_FILLED_OFFSET, SHM_STAGED_OFFSET, SHM_ADMITTED_OFFSET):
            block.set_word(word, turn << TURN_BITS)


def stream(
    engines: Sequence[Engine], owner: Owner, sources: Sequence[Segment], version: int
) -> None:
    """All engines take a version at once, in the turn of its number."""
    with ExitStack() as stack:
        for engine in engines:
            feed = engine.feed(owner, sources, version)
            thread = threading.Thread(target=engine.apply, args=(feed, version))
            thread.start()
            stack.callback(thread.join, DEADLINE_S)


def test_engines_hold_what_the_loader_makes_and_every_byte_is_copied_once(
    engines: list[Engine],
) -> None:
    trainer = engines[0].client.trainer
    for engine in engines:
        engine.client.apply(wide_tensors(0), 1)
    with open_staging(LANES, 0) as owner:
        for version in (2, 3):
            begin(owner, version)
            tensors = wide_tensors(10 * version)
            sources = trainer.publish(tensors, version)
            for engine in engines:
                engine.cuda.copied.clear()
                assert engine.prepare(engine.feed(owner, sources, version)).reason == ""
                assert not engine.cuda.copied
            stream(engines, owner, sources, version)
            copied = 0
            for engine in engines:
                applied = engine.check(tensors, version)
                assert (applied.direct_parameters, applied.processed_parameters) == (6, 0)
                assert [timing.stage for timing in applied.stages] == ["fetch", "reload"]
                copied += sum(size_bytes for _, _, size_bytes in engine.cuda.copied)
            used = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            assert used <= copied <= used + 4096 * LANES, "with the bytes between tensors"
    assert [len(engine.host.reloads) for engine in engines] == [1, 1]


def test_engine_gets_all_its_bytes_when_the_other_one_needs_a_proof(engines: list[Engine]) -> None:
    trainer, first = engines[0].client.trainer, engines[0]
    first.client.apply(wide_tensors(0), 1)
    tensors = wide_tensors(20)
    with open_staging(LANES, 0) as owner:
        begin(owner, 2)
        stream(engines, owner, trainer.publish(tensors, 2), 2)
    first.check(tensors, 2)
    second = engines[1].reply
    assert isinstance(second, Failed)
    assert (second.error, second.touched) == ("ProofNeeded", False)


def test_update_fails_on_both_when_a_segment_was_written_meanwhile(engines: list[Engine]) -> None:
    trainer = engines[0].client.trainer
    for engine in engines:
        engine.client.apply(wide_tensors(0), 1)
    sources = trainer.publish(wide_tensors(20), 2)
    with open_staging(LANES, 0) as owner:
        begin(owner, 2)

        def overwrite(number: int) -> None:
            if number == 3:
                trainer.publish(wide_tensors(30), 3)

        engines[0].cuda.before_copy = overwrite
        watch = threading.Thread(target=give_up_when_told, args=(engines, owner))
        watch.start()
        stream(engines, owner, sources, 2)
        watch.join()
    errors = {engine.reply.error for engine in engines if isinstance(engine.reply, Failed)}
    assert "TornRead" in errors
    assert errors <= {"TornRead", "SegmentUnavailable"}
    assert not any(isinstance(engine.reply, Applied) for engine in engines)


def give_up_when_told(engines: Sequence[Engine], owner: Owner) -> None:
    """As a consumer whose worker has failed."""
    waiting = threading.Event()
    while not any(isinstance(engine.reply, Failed) for engine in engines):
        waiting.wait(1e-3)
    owner.give_up(2)

"""The worker prepares a feed beside the serving, and applies it, or another one, afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from tests.fake_cuda import FakeCuda
from tests.unit.reload.models import ModuleHost
from tests.unit.reload.test_worker import (
    DEADLINE_S,
    Client,
    Fused,
    load_fused,
    make_tensors,
)
from tests.unit.transfer.publishing import Trainer, cut_layout, open_trainer
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.consumers.transfer.device_lanes import DeviceStaging
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.worker import (
    Detach,
    Detached,
    Failed,
    Feed,
    InPlace,
    Prepare,
    Prepared,
    Stream,
)

NEVER_FILLED = Stream(
    lanes=("weightbus-test-no-such-lane",), bucket_bytes=4096, slots=1, turn=1, reader=0
)


class OnGpu(ModuleHost):
    """Its parameters are said to lie on a GPU; nothing is ever written to them."""

    @property
    def device(self) -> str:
        return "cuda:0"


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    with open_trainer(cut_layout(make_tensors(0), 3), "memory", tmp_path) as trainer:
        yield trainer


@pytest.fixture
def client(trainer: Trainer) -> Iterator[Client]:
    client = Client(ReloadWorker(ModuleHost(Fused, load_fused), 0, 1), trainer)
    client.attach()
    yield client
    client.worker.close()


def ask(client: Client, feed: Feed, deadline_s: float = DEADLINE_S) -> Prepared:
    reply = client.worker.handle(
        Prepare(
            request=9,
            layout_digest=client.trainer.layout_digest,
            feed=feed,
            deadline_s=deadline_s,
        )
    )
    assert isinstance(reply, Prepared), reply
    assert (reply.request, reply.rank) == (9, 0)
    return reply


def prepare(client: Client, feed: Feed) -> Prepared:
    """Ask until it is ready."""
    budget = Deadline("prepare", DEADLINE_S)
    while not (reply := ask(client, feed)).ready:
        budget.check()
    return reply


def mapped(feed: InPlace) -> int:
    """How many blocks of a feed are mapped to be read."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    readable = [line for line in maps if line.split()[1] == "r--s"]
    names = [one.name for one in feed.sources if isinstance(one, SharedMemorySegment)]
    return sum(any(name in line for line in readable) for name in names)


def test_memory_is_mapped_and_nothing_touched_when_it_is_prepared(
    client: Client, trainer: Trainer
) -> None:
    tensors = make_tensors(10)
    feed = InPlace(sources=trainer.publish(tensors, 1))
    assert mapped(feed) == 0
    assert prepare(client, feed).reason == ""
    assert mapped(feed) == len(feed.sources)
    assert (client.worker.version, client.worker.touched, client.worker.updates) == (-1, False, 0)
    client.verified(client.worker.handle(client.request(feed.sources, 1)), tensors, 1)


def test_memory_is_registered_once_and_before_apply_when_the_worker_is_on_a_gpu(
    trainer: Trainer,
) -> None:
    cuda = FakeCuda()
    worker = ReloadWorker(OnGpu(Fused, load_fused), 0, 1, lambda: cuda)
    client = Client(worker, trainer)
    client.attach()
    for version in (1, 2):
        feed = InPlace(sources=trainer.publish(make_tensors(version), version))
        assert prepare(client, feed).reason == ""
        assert len(cuda.registered) == len(feed.sources)
    assert cuda.calls["register"] == len(feed.sources)
    worker.close()
    cuda.assert_clean()


def test_lanes_rest_when_a_feed_without_them_is_taken(trainer: Trainer) -> None:
    """Whether it was prepared or not: what is open need not be."""

    class Lanes(DeviceStaging):
        rests = 0

        def rest(self) -> None:
            self.rests += 1

    lanes = Lanes("cpu")
    client = Client(ReloadWorker(ModuleHost(Fused, load_fused), 0, 1, lanes=lanes), trainer)
    client.attach()
    for version in (1, 2):
        tensors = make_tensors(version)
        sources = trainer.publish(tensors, version)
        if version == 1:
            prepare(client, InPlace(sources=sources))
        client.verified(client.worker.handle(client.request(sources, version)), tensors, version)
    ask(client, structs.replace(NEVER_FILLED, device=True, readers=1))
    client.worker.close()
    assert lanes.rests == 2


def test_failure_is_told_and_apply_fails_with_it_when_it_lasts(
    client: Client, trainer: Trainer
) -> None:
    sources = trainer.publish(make_tensors(1), 1)
    assert isinstance(sources[0], SharedMemorySegment)
    torn = structs.replace(sources[0], generation=sources[0].generation + 2)
    reply = prepare(client, InPlace(sources=(torn, *sources[1:])))
    assert reply.reason.startswith("TornRead: ")
    failed = client.fail(client.request((torn, *sources[1:]), 1))
    assert (failed.error, failed.touched) == ("TornRead", False)
    client.apply(make_tensors(2), 2)


def test_no_more_is_mapped_once_the_time_to_prepare_is_up(client: Client, trainer: Trainer) -> None:
    feed = InPlace(sources=trainer.publish(make_tensors(1), 1))
    budget = Deadline("prepare", DEADLINE_S)
    while not (reply := ask(client, feed, deadline_s=1e-9)).ready:
        budget.check()
    assert reply.reason.startswith("DeadlineExceeded: ")
    assert mapped(feed) == 0


def test_apply_of_another_feed_does_not_wait_for_what_never_comes(client: Client) -> None:
    assert not ask(client, NEVER_FILLED).ready
    assert not ask(client, NEVER_FILLED).ready
    client.apply(make_tensors(3), 1)


def test_another_feed_is_prepared_when_the_first_is_not_wanted_any_more(
    client: Client, trainer: Trainer
) -> None:
    assert not ask(client, NEVER_FILLED).ready
    feed = InPlace(sources=trainer.publish(make_tensors(1), 1))
    assert prepare(client, feed) == Prepared(request=9, rank=0, ready=True)
    assert mapped(feed) == len(feed.sources)


def test_worker_detaches_while_it_prepares(client: Client) -> None:
    assert not ask(client, NEVER_FILLED).ready
    assert isinstance(client.worker.handle(Detach(request=1, deadline_s=1.0)), Detached)
    reply = client.worker.handle(
        Prepare(
            request=2,
            layout_digest=client.trainer.layout_digest,
            feed=NEVER_FILLED,
            deadline_s=1.0,
        )
    )
    assert isinstance(reply, Failed)
    assert reply.error == "NotAttached"


def test_inspect_is_answered_while_something_is_prepared(client: Client) -> None:
    assert not ask(client, NEVER_FILLED).ready
    assert client.inspect().version == -1
    assert not ask(client, NEVER_FILLED).ready

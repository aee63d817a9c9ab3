"""Which request a worker carries out in its turn, and which it does not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from weightbus.consumers.engines.channel import WorkerEndpoint
from weightbus.consumers.engines.directory import EngineDirectory, own_socket
from weightbus.consumers.engines.errors import EngineAsleep
from weightbus.consumers.engines.taking import TurnTaker
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.turns import NO_REQUEST, Turn
from weightbus.consumers.errors import EngineUnavailable, PlanError
from weightbus.consumers.reload.host import ModelHost
from weightbus.schemas.worker import Apply, Failed, InPlace, Inspect, Inspected, WorkerRequest


class Endpoint:
    """What would have arrived, batch by batch: the next comes once it is waited for."""

    def __init__(self, path: Path, *_: object) -> None:
        self.path = path
        self.batches: deque[list[WorkerRequest]] = deque([[]])
        self.replies: list[Any] = []
        self.waited_ms: list[int] = []
        self.closed = False
        self.socket = self

    def receive_nowait(self) -> WorkerRequest | None:
        return self.batches[0].pop(0) if self.batches[0] else None

    def poll(self, timeout_ms: int) -> None:
        self.waited_ms.append(timeout_ms)
        if len(self.batches) > 1:
            self.batches.popleft()

    def reply(self, reply: object) -> None:
        self.replies.append(reply)

    def close(self) -> None:
        self.closed = True


class Places:
    """A taker of rank 1 of 2, and every endpoint that it made."""

    def __init__(self, make_host: Callable[[], ModelHost], **given: Any) -> None:
        self.endpoints: list[Endpoint] = []
        self.taker = TurnTaker(make_host, 1, 2, connect=self._connect, **given)

    def _connect(self, *arguments: Any) -> WorkerEndpoint[WorkerRequest]:
        self.endpoints.append(Endpoint(*arguments))
        return cast(WorkerEndpoint[WorkerRequest], self.endpoints[-1])

    def take(self, number: int, arrived: Sequence[WorkerRequest] = ()) -> list[Any]:
        """What is replied in the turn for this number."""
        endpoint = self.endpoints[-1]
        endpoint.batches[0].extend(arrived)
        endpoint.replies.clear()
        self.taker.take(turn_for(number))
        return list(endpoint.replies)


def turn_for(number: int, wait_s: float = 0.0) -> Turn:
    return Turn(numbers=(NO_REQUEST, number), wait_s=wait_s)


def inspect(number: int) -> Inspect:
    return Inspect(request=number, deadline_s=60.0)


def make_host() -> ModelHost:
    build = partial(build_model, "decoder", {"vocab_size": 16, "num_hidden_layers": 1})
    return TorchModelHost("decoder", build, build(), torch.device("cpu"))


@pytest.fixture
def directory(short_path: Path) -> Path:
    place = EngineDirectory(short_path / "engine")
    place.prepare()
    return place.path


@pytest.fixture
def places(directory: Path) -> Places:
    places = Places(make_host)
    places.taker.open(directory)
    return places


def numbers(replies: Sequence[Any]) -> list[tuple[type, int]]:
    return [(type(reply), reply.request) for reply in replies]


def test_request_is_carried_out_when_its_turn_comes(places: Places) -> None:
    assert numbers(places.take(7, [inspect(7)])) == [(Inspected, 7)]
    (reply,) = places.take(9, [inspect(8), inspect(9)])
    assert (reply.request, reply.rank, reply.version) == (9, 1, -1)


def test_request_is_waited_for_no_longer_than_the_turn_says(places: Places) -> None:
    endpoint = places.endpoints[-1]
    endpoint.batches.extend([[], [inspect(7)]])
    places.taker.take(turn_for(7, wait_s=30.0))
    assert numbers(endpoint.replies) == [(Inspected, 7)]
    assert all(0 < waited <= 30_001 for waited in endpoint.waited_ms)
    (missed,) = places.take(8)
    assert (missed.error, missed.request) == ("TurnMissed", 8)
    assert "did not come within 0 s" in missed.reason


def test_request_is_dropped_when_it_comes_after_its_turn(places: Places) -> None:
    places.take(7)
    assert numbers(places.take(8, [inspect(7), inspect(8)])) == [(Inspected, 8)]


def test_nothing_is_done_when_the_turn_is_for_others(places: Places) -> None:
    assert places.take(NO_REQUEST, [inspect(7)]) == []
    assert numbers(places.take(7)) == [(Inspected, 7)]


def test_request_is_not_carried_out_when_another_came_after_it(places: Places) -> None:
    (reply,) = places.take(7, [inspect(7), inspect(8)])
    assert (reply.error, reply.request) == ("TurnMissed", 7)
    assert "another request came after it" in reply.reason
    assert numbers(places.take(8)) == [(Inspected, 8)], "which has its own turn still"


def test_late_turn_does_not_wait_when_its_request_was_dropped(places: Places) -> None:
    assert numbers(places.take(8, [inspect(7), inspect(8)])) == [(Inspected, 8)]
    waited = len(places.endpoints[-1].waited_ms)
    places.taker.take(turn_for(7, wait_s=60.0))
    reply = places.endpoints[-1].replies[-1]
    assert (reply.error, reply.request) == ("TurnMissed", 7)
    assert len(places.endpoints[-1].waited_ms) == waited


def test_turn_is_refused_when_it_cannot_be_taken(directory: Path) -> None:
    places = Places(make_host)
    with pytest.raises(EngineUnavailable, match="no consumer has opened it"):
        places.taker.take(turn_for(7))
    places.taker.open(directory)
    with pytest.raises(PlanError, match="ranks of a turn is 3: there are 2"):
        places.taker.take(Turn(numbers=(1, 2, 3), wait_s=0.0))


def test_connection_is_kept_when_the_same_consumer_opens_again(
    places: Places, directory: Path, short_path: Path
) -> None:
    places.taker.open(directory)
    assert len(places.endpoints) == 1
    other = EngineDirectory(short_path / "other")
    other.prepare()
    places.taker.open(other.path)
    assert [endpoint.closed for endpoint in places.endpoints] == [True, False]
    assert places.endpoints[-1].path == other.control
    places.taker.close()
    assert places.endpoints[-1].closed
    with pytest.raises(EngineUnavailable):
        places.taker.take(turn_for(7))
    places.taker.open(directory)
    assert numbers(places.take(7, [inspect(7)])) == [(Inspected, 7)]


def test_directory_is_refused_when_it_is_not_for_this_user_alone(short_path: Path) -> None:
    places = Places(make_host)
    open_to_all = short_path / "open"
    open_to_all.mkdir(mode=0o755)
    for path in (short_path / "absent", open_to_all):
        with pytest.raises(EngineUnavailable):
            places.taker.open(path)
    assert not places.endpoints


def test_failure_is_told_in_the_reply_when_the_host_cannot_be_made(directory: Path) -> None:
    hosts = iter([None, make_host()])

    def make() -> ModelHost:
        host = next(hosts)
        if host is None:
            raise ImportError("vllm is too old")
        return host

    places = Places(make)
    places.taker.open(directory)
    (failed,) = places.take(7, [inspect(7)])
    assert failed == Failed(request=7, rank=1, error="ImportError", reason="vllm is too old")
    assert numbers(places.take(8, [inspect(8)])) == [(Inspected, 8)]


def test_request_is_refused_in_the_reply_when_the_engine_cannot_have_it(directory: Path) -> None:
    def refusal(request: WorkerRequest) -> EngineAsleep | None:
        return EngineAsleep("Apply") if isinstance(request, Apply) else None

    places = Places(make_host, refusal=refusal)
    places.taker.open(directory)
    apply = Apply(
        request=7,
        version=1,
        layout_digest="0" * 64,
        feed=InPlace(sources=()),
        deadline_s=60.0,
    )
    (failed,) = places.take(7, [apply])
    assert (failed.error, failed.touched) == ("EngineAsleep", False)
    assert numbers(places.take(8, [inspect(8)])) == [(Inspected, 8)]


def test_instance_is_the_same_when_the_worker_is_opened_again(
    places: Places, directory: Path
) -> None:
    (before,) = places.take(7, [inspect(7)])
    places.taker.close()
    places.taker.open(directory)
    (after,) = places.take(8, [inspect(8)])
    assert after.instance == before.instance != ""


def test_worker_stays_with_its_consumer_when_another_comes_while_it_lives(
    places: Places, directory: Path, short_path: Path
) -> None:
    other = EngineDirectory(short_path / "other")
    other.prepare()
    with own_socket(EngineDirectory(directory).control):
        with pytest.raises(EngineUnavailable, match=f"another consumer, in {directory}"):
            places.taker.open(other.path)
        assert numbers(places.take(1, [inspect(1)])) == [(Inspected, 1)]
    places.taker.open(other.path)
    assert [endpoint.closed for endpoint in places.endpoints] == [True, False]

"""The channel between a consumer and its workers, over real sockets in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import zmq

from weightbus.bus.background import open_background
from weightbus.consumers.engines.channel import WorkerChannel, WorkerEndpoint, open_channel
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable, WorkerLost
from weightbus.schemas.codec import encode
from weightbus.schemas.errors import MessageInvalid, WeightBusError
from weightbus.schemas.worker import (
    Detach,
    Detached,
    Failed,
    Inspect,
    Inspected,
    WorkerMessage,
)

pytestmark = pytest.mark.anyio

LONG_S = 30.0
SHORT_S = 0.5
INSPECT = Inspect(request=0, deadline_s=LONG_S)
REPLIES = (Inspected, Detached, Failed)


def inspected(number: int, rank: int = 0, version: int = 3) -> Inspected:
    return Inspected(request=number, rank=rank, instance="", version=version, touched=False)


def failed(number: int, error: MessageInvalid) -> Failed:
    return Failed(request=number, rank=0, error="MessageInvalid", reason=str(error))


@contextmanager
def worker(
    path: Path,
    rank: int = 0,
    instance: str = "first",
    requests: tuple[type[WorkerMessage], ...] = (Inspect, Detach),
) -> Iterator[WorkerEndpoint[WorkerMessage]]:
    endpoint = WorkerEndpoint(path, rank, instance, requests, failed)
    try:
        yield endpoint
    finally:
        endpoint.close()


@asynccontextmanager
async def serving(endpoint: WorkerEndpoint[WorkerMessage], version: int = 3) -> AsyncIterator[None]:
    """The worker answers every `Inspect` while the context is open."""
    async with open_background() as tasks:
        tasks.start_soon(serve, endpoint, version)
        yield


async def serve(endpoint: WorkerEndpoint[WorkerMessage], version: int) -> None:
    while True:
        request = await receive(endpoint)
        if isinstance(request, Inspect):
            endpoint.reply(inspected(request.request, version=version))


async def receive(endpoint: WorkerEndpoint[WorkerMessage]) -> WorkerMessage:
    """The next request; the test's own time limit bounds it."""
    while (request := endpoint.receive_nowait()) is None:
        await anyio.to_thread.run_sync(endpoint.socket.poll, 100)
    return request


async def receive_inspect(endpoint: WorkerEndpoint[WorkerMessage]) -> Inspect:
    request = await receive(endpoint)
    assert isinstance(request, Inspect)
    return request


async def ask(channel: WorkerChannel, *, adopt: bool = False) -> int:
    """The version that rank 0 says it holds."""
    reply = await channel.request(0, INSPECT, LONG_S, adopt=adopt)
    assert isinstance(reply, Inspected)
    return reply.version


async def give_up_soon(channel: WorkerChannel, number: int) -> None:
    await anyio.wait_all_tasks_blocked()
    channel.give_up_nowait([number], EngineUnavailable("here", "its turn came to nothing"))


@pytest.fixture
def path(short_path: Path) -> Path:
    return short_path / "control.ipc"


async def test_reply_comes_back_when_worker_connects_before_the_consumer(path: Path) -> None:
    with worker(path) as endpoint:
        async with open_channel(path, 1, REPLIES) as channel, serving(endpoint):
            assert await ask(channel) == 3


async def test_request_fails_at_once_and_is_never_sent_when_it_is_given_up_before_a_worker_comes(
    path: Path,
) -> None:
    async with open_channel(path, 1, REPLIES) as channel:
        number = channel.next_number()
        with anyio.fail_after(LONG_S / 2):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_up_soon, channel, number)
                outcomes = await channel.request_each({0: INSPECT}, LONG_S, numbers={0: number})
        assert isinstance(outcomes[0], EngineUnavailable)
        with worker(path) as endpoint:
            async with serving(endpoint, version=5):
                assert await ask(channel) == 5


async def test_reply_comes_back_when_worker_connects_after_the_request(path: Path) -> None:
    async with open_channel(path, 1, REPLIES) as channel, anyio.create_task_group() as tasks:
        tasks.start_soon(ask, channel)
        await anyio.wait_all_tasks_blocked()
        with worker(path) as endpoint:
            request = await receive_inspect(endpoint)
            endpoint.reply(inspected(request.request))


async def test_each_rank_has_its_own_outcome_when_several_are_asked(path: Path) -> None:
    with worker(path) as endpoint:
        async with open_channel(path, 2, REPLIES) as channel, serving(endpoint):
            await ask(channel)
            outcomes = await channel.request_each({0: INSPECT, 1: INSPECT}, SHORT_S)
    assert isinstance(outcomes[0], Inspected)
    assert isinstance(outcomes[1], WorkerLost)
    assert "did not connect within 0.5 s" in str(outcomes[1])


async def test_late_reply_is_dropped_when_its_request_was_given_up(path: Path) -> None:
    with worker(path) as endpoint:
        async with open_channel(path, 1, REPLIES) as channel:
            async with serving(endpoint):
                await ask(channel)
            with pytest.raises(DeadlineExceeded, match=r"Inspect of rank 0 .* 0.5 s"):
                await channel.request(0, INSPECT, SHORT_S)
            given_up = await receive_inspect(endpoint)
            endpoint.reply(inspected(given_up.request, version=99))
            async with serving(endpoint):
                assert await ask(channel) == 3


async def test_worker_is_lost_when_it_dies_before_it_replied(path: Path) -> None:
    async with open_channel(path, 1, REPLIES) as channel:

        async def die_on_request() -> None:
            with worker(path) as endpoint:
                await receive(endpoint)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(die_on_request)
            with pytest.raises(WorkerLost, match="closed before it replied"):
                await channel.request(0, INSPECT, LONG_S)


async def test_worker_is_lost_until_adopted_when_it_was_replaced(path: Path) -> None:
    async with open_channel(path, 1, REPLIES) as channel:
        with worker(path, instance="first") as first:
            async with serving(first):
                await ask(channel)
        with pytest.raises(WorkerLost, match="its connection"):
            await ask(channel)  # returns once zmq has noticed the end, before or after it was sent
        with pytest.raises(WorkerLost, match="its connection is closed"):
            await ask(channel)
        with worker(path, instance="second") as second:
            async with serving(second, version=5):
                with pytest.raises(WorkerLost, match=r"replaced|closed"):
                    await ask(channel)
                assert await ask(channel, adopt=True) == 5
                assert await ask(channel) == 5


async def test_worker_is_lost_when_another_answers_in_its_place(path: Path) -> None:
    with worker(path, instance="first") as first:
        async with open_channel(path, 1, REPLIES) as channel:
            async with serving(first):
                await ask(channel)
            with worker(path, instance="second") as second, pytest.raises(WorkerLost, match="repl"):
                async with serving(second):
                    await ask(channel)


def test_request_for_a_predecessor_is_not_carried_out(path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.rcvtimeo = int(LONG_S * 1000)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.bind(f"ipc://{path}")
        with worker(path, instance="second") as endpoint:
            while not send_if_connected(router, [b"rank-0", b"\x05first" + encode(INSPECT)]):
                endpoint.socket.poll(10)
            assert endpoint.socket.poll(router.rcvtimeo)
            assert endpoint.receive_nowait() is None
            assert router.recv_multipart() == [b"rank-0", b"\x06second"]


def test_frame_that_is_not_ours_is_dropped(path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.bind(f"ipc://{path}")
        with worker(path) as endpoint:
            for frame in (b"\x09short", b""):
                while not send_if_connected(router, [b"rank-0", frame]):
                    endpoint.socket.poll(10)
            router.send_multipart([b"rank-0", b"\x00" + encode(INSPECT)])
            assert endpoint.socket.poll(int(LONG_S * 1000))
            assert isinstance(endpoint.receive_nowait(), Inspect)


def test_worker_outlives_a_consumer_that_ends_with_many_probes_unread(path: Path) -> None:
    """In a process of its own: where this goes wrong, libzmq aborts it."""
    outcome = subprocess.run(
        [sys.executable, "-c", OUTLIVE, str(path)], capture_output=True, timeout=60, check=False
    )
    assert (outcome.returncode, outcome.stdout) == (0, b"alive\n"), outcome.stderr.decode()


OUTLIVE = """
import sys
from pathlib import Path

import zmq

from weightbus.consumers.engines.channel import WorkerEndpoint

path = Path(sys.argv[1])
endpoint = WorkerEndpoint(path, 0, "first", (), None)
ended = endpoint.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
    router.linger = 0
    router.set(zmq.ROUTER_MANDATORY, 1)
    router.bind(f"ipc://{path}")
    while True:
        try:
            router.send_multipart([b"rank-0", b"\\0"])
            break
        except zmq.ZMQError:
            endpoint.socket.poll(10)
    endpoint.receive_nowait()
    for _ in range(300):
        router.send_multipart([b"rank-0", b"\\0"])
    assert endpoint.socket.poll(30_000)
    endpoint._send(b"")  # zmq learns of the probes, and reads none of them
assert ended.poll(30_000)
endpoint.socket.disable_monitor()
ended.close()
endpoint.receive_nowait()
endpoint.close()
print("alive")
"""


def send_if_connected(router: zmq.Socket[bytes], frames: list[bytes]) -> bool:
    try:
        router.send_multipart(frames)
    except zmq.ZMQError:
        return False
    return True


async def test_requests_die_with_their_consumer_when_not_yet_read(path: Path) -> None:
    with worker(path) as endpoint:
        async with open_channel(path, 1, REPLIES) as first:
            async with serving(endpoint):
                await ask(first)
            with pytest.raises(DeadlineExceeded):
                await first.request(0, Detach(request=0, deadline_s=1.0), SHORT_S)
            connected = endpoint.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        with connected:  # by then zmq has noticed the end of the first
            async with open_channel(path, 1, REPLIES) as second, open_background() as tasks:
                assert await anyio.to_thread.run_sync(connected.poll, int(LONG_S * 1000))
                tasks.start_soon(ask, second)
                request = await receive(endpoint)
            endpoint.socket.disable_monitor()
    assert isinstance(request, Inspect), "what the first consumer had asked for came late"


async def test_reply_is_dropped_when_its_consumer_is_gone(path: Path) -> None:
    with worker(path) as endpoint:
        async with open_channel(path, 1, REPLIES) as first, open_background() as tasks:
            tasks.start_soon(ask, first)
            request = await receive_inspect(endpoint)
        for _ in range(3000):
            endpoint.reply(inspected(request.request, version=99))
        async with open_channel(path, 1, REPLIES) as second, serving(endpoint):
            assert await ask(second) == 3


async def test_request_is_answered_when_worker_cannot_read_it(path: Path) -> None:
    with worker(path, requests=(Detach,)) as endpoint:
        async with open_channel(path, 1, REPLIES) as channel, serving(endpoint):
            reply = await channel.request(0, INSPECT, LONG_S)
    assert isinstance(reply, Failed)
    assert reply.error == "MessageInvalid"


async def test_reply_that_breaks_the_contract_is_replaced_when_sent(path: Path) -> None:
    with worker(path) as endpoint:
        async with open_channel(path, 1, REPLIES) as channel, serving(endpoint, version=-7):
            reply = await channel.request(0, INSPECT, LONG_S)
    assert isinstance(reply, Failed)
    assert "version" in reply.reason


async def test_worker_is_lost_when_its_reply_cannot_be_read(path: Path) -> None:
    with worker(path) as endpoint:
        async with open_channel(path, 1, (Detached,)) as channel, serving(endpoint):
            with pytest.raises(WorkerLost, match="cannot be read"):
                await channel.request(0, INSPECT, LONG_S)


async def test_request_is_not_sent_when_it_breaks_the_contract(path: Path) -> None:
    async with open_channel(path, 1, REPLIES) as channel:
        with pytest.raises(MessageInvalid, match="deadline_s"):
            await channel.request(0, Inspect(request=0, deadline_s=-1.0), LONG_S)


async def test_second_consumer_is_refused_when_one_is_bound(path: Path) -> None:
    async with open_channel(path, 1, REPLIES):
        with pytest.raises(EngineUnavailable, match="another process is bound"):
            async with open_channel(path, 1, REPLIES):
                pass
    assert not os.listdir(path.parent)


async def test_requests_end_when_channel_is_closed(path: Path) -> None:
    outcomes: list[WorkerMessage | WeightBusError] = []

    async def wait(channel: WorkerChannel) -> None:
        outcomes.extend((await channel.request_each({0: INSPECT}, LONG_S)).values())

    with worker(path) as endpoint:
        async with anyio.create_task_group() as tasks, open_channel(path, 1, REPLIES) as channel:
            tasks.start_soon(wait, channel)
            await receive(endpoint)
        with pytest.raises(WorkerLost):
            await ask(channel)
    assert [str(one) for one in outcomes] == [
        "worker of rank 0 is lost: the channel to it was closed"
    ]


async def test_request_has_the_number_that_was_drawn_for_it(short_path: Path) -> None:
    path = short_path / "control.ipc"
    with worker(path) as endpoint:
        async with open_channel(path, 1, REPLIES) as channel:
            number = channel.next_number()
            assert channel.next_number() > number
            async with serving(endpoint):
                outcomes = await channel.request_each({0: INSPECT}, LONG_S, numbers={0: number})
            reply = outcomes[0]
            assert isinstance(reply, Inspected)
            assert reply.request == number


async def test_requests_fail_at_once_when_they_are_given_up(short_path: Path) -> None:
    """But for those that have their reply, and for those of other numbers."""
    path = short_path / "control.ipc"
    with worker(path):
        async with open_channel(path, 1, REPLIES) as channel:
            number, other = channel.next_number(), channel.next_number()
            gone = EngineUnavailable("it", "its turn failed")
            outcomes: dict[int, WorkerMessage | WeightBusError] = {}

            async def ask() -> None:
                outcomes.update(
                    await channel.request_each({0: INSPECT}, LONG_S, numbers={0: number})
                )

            with anyio.fail_after(LONG_S / 2):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask)
                    while not outcomes:
                        channel.give_up_nowait([other], WorkerLost(0, "not of this request"))
                        channel.give_up_nowait([number], gone)
                        await anyio.sleep(0.01)
            assert outcomes == {0: gone}


async def test_worker_is_seen_as_long_as_it_is_connected(short_path: Path) -> None:
    path = short_path / "control.ipc"
    async with open_channel(path, 2, REPLIES) as channel:
        assert not await channel.is_connected(0)
        with worker(path):
            await until_connected(channel, True)
            assert not await channel.is_connected(1)
        await until_connected(channel, False)


async def until_connected(channel: WorkerChannel, expected: bool) -> None:
    with anyio.fail_after(LONG_S):
        while True:
            if await channel.is_connected(0) == expected:
                return
            await anyio.sleep(0.01)

"""The channel between the ranks' workers and the one process that instructs them, over ZeroMQ
`ipc://`.

    WorkerChannel (asynchronous)  ROUTER, bound      <->  DEALER, connected  WorkerEndpoint
    (blocking) [identity, frame]                                     [frame]

Independent of any engine. The instructing side binds, so that it may come and go while the workers
live on; each worker connects with the identity `rank-<r>`. A payload is one message of
`weightbus.schemas.worker` (or of the same base) in MessagePack; a reply carries its request's
number.

A frame is the length of an instance (one byte), the instance, and a payload. It is one frame since
libzmq aborts the process (`!_more`, fq.cpp) when a connection ends between the frames of a message
that a socket with IMMEDIATE is reading: an engine's worker would die with its consumer.

`instance` names one worker process. On the way to a worker it says for whom the payload is, or is
empty: for whoever is there. A worker that gets what was meant for its predecessor answers with its
own instance and no payload, and does nothing else. On the way back it says who answers.

Invariants:
    Nothing is queued for a peer that is not there (ROUTER_MANDATORY here, IMMEDIATE there), and
    what waits in a connection dies with it: no request outlives the side that made it.
    While a reply is waited for, an empty payload is sent every `PROBE_S`. The kernel closes the
    socket of a dead process, so a worker's death is noticed within that time, without its help.
    A reply whose request was given up is dropped; numbers start at random, so that a reply to an
    earlier owner of the socket is never taken for one to this one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

import anyio
import msgspec
import zmq
import zmq.asyncio

from weightbus.bus.background import open_background
from weightbus.consumers.engines.directory import own_socket, socket_path
from weightbus.consumers.errors import DeadlineExceeded, WorkerLost
from weightbus.schemas.codec import CONTENT_TYPE_MSGPACK, decode, encode
from weightbus.schemas.errors import MessageInvalid, WeightBusError
from weightbus.schemas.limits import DEFAULT_LIMITS
from weightbus.schemas.worker import WorkerMessage

__all__ = ("PROBE_S", "WorkerChannel", "WorkerEndpoint", "number_of", "open_channel")

PROBE_S = 0.25
"""How soon the death of a worker that owes a reply is noticed."""

_CONNECT_POLL_S = 0.02
_RECONNECT_MS = 20
_LINGER_MS = 500
"""How long an endpoint that is closed may take to hand over its last reply."""

_FRAME_BYTES = 256
"""More than a payload has at most: the length of an instance, and the instance."""

_ANYONE = b""
_NOTHING = b""

_log = logging.getLogger(__name__)


R = TypeVar("R", bound=WorkerMessage)
"""What a worker can be asked."""


class _Numbered(Protocol):
    request: int


class _Pending:
    """A request that waits for its reply."""

    def __init__(self, rank: int, instance: bytes) -> None:
        self.rank, self.instance = rank, instance
        self.settled = anyio.Event()
        self.reply: WorkerMessage | WeightBusError | None = None

    def settle(self, reply: WorkerMessage | WeightBusError) -> None:
        if self.reply is None:
            self.reply = reply
            self.settled.set()


class WorkerChannel:
    """The instructing side. Any number of requests may be under way at once."""

    def __init__(
        self, socket: zmq.asyncio.Socket, ranks: int, replies: tuple[type[WorkerMessage], ...]
    ) -> None:
        self.ranks = ranks
        self._socket = socket
        self._replies = replies
        self._numbers = itertools.count(secrets.randbits(48))
        self._pending: dict[int, _Pending] = {}
        self._instances: dict[int, bytes] = {}
        self._closed = False

    def next_number(self) -> int:
        """A number for a request that somebody else has to know, too."""
        return next(self._numbers)

    async def request_each(
        self,
        requests: Mapping[int, WorkerMessage],
        deadline_s: float,
        *,
        adopt: bool = False,
        numbers: Mapping[int, int] | None = None,
    ) -> dict[int, WorkerMessage | WeightBusError]:
        """Ask several workers at once: the reply of each rank, or why there is none.

        Returns when every rank has replied, is lost, or the time is up. `numbers` are those of the
        requests, by rank, each from `next_number`. See `request`.
        """
        outcomes: dict[int, WorkerMessage | WeightBusError] = {}

        async def ask(rank: int, request: WorkerMessage) -> None:
            try:
                outcomes[rank] = await self.request(
                    rank,
                    request,
                    deadline_s,
                    adopt=adopt,
                    number=None if numbers is None else numbers[rank],
                )
            except WeightBusError as error:
                outcomes[rank] = error

        async with anyio.create_task_group() as tasks:
            for rank, request in requests.items():
                tasks.start_soon(ask, rank, request)
        return {rank: outcomes[rank] for rank in requests}

    async def request(
        self,
        rank: int,
        request: WorkerMessage,
        deadline_s: float,
        *,
        adopt: bool = False,
        number: int | None = None,
    ) -> WorkerMessage:
        """Ask one worker and wait for its reply. The request's number is set here; by default it is
        the next one.

        A rank's worker is the one that answered first; from then on only that process is spoken to.
        With `adopt`, or before the first answer, whoever is there is waited for and taken.

        Raises:
            DeadlineExceeded: no reply in time. The worker may still carry the request out.
            WorkerLost: the worker died, was replaced, never came, or said what cannot be read.
            MessageInvalid: the request breaks the contract; it was not sent.
            WeightBusError: what `give_up_nowait` was told.
        """
        number = self.next_number() if number is None else number
        payload = encode(msgspec.structs.replace(request, request=number))
        instance = _ANYONE if adopt else self._instances.get(rank, _ANYONE)
        pending = _Pending(rank, instance)
        self._pending[number] = pending
        sent = False
        try:
            with anyio.move_on_after(deadline_s):
                await self._send(pending, payload)
                sent = True
                await self._wait(pending)
        finally:
            del self._pending[number]
        if pending.reply is None:
            if not sent:
                raise WorkerLost(rank, f"it did not connect within {deadline_s:g} s")
            raise DeadlineExceeded(f"{type(request).__name__} of rank {rank}", deadline_s)
        if isinstance(pending.reply, WeightBusError):
            raise pending.reply
        self._instances[rank] = pending.instance
        return pending.reply

    def give_up_nowait(self, numbers: Iterable[int], error: WeightBusError) -> None:
        """Let requests that have not been replied to fail with `error`, now."""
        for number in numbers:
            if (pending := self._pending.get(number)) is not None:
                pending.settle(error)

    async def is_connected(self, rank: int) -> bool:
        """Whether a worker of this rank is connected now, whichever process that is."""
        return await self._try_send(_Pending(rank, _ANYONE), _NOTHING)

    async def _send(self, pending: _Pending, payload: bytes) -> None:
        """Waits for a worker to connect, unless it is one that was there before; not sent if it is
        given up before that."""
        while not (pending.settled.is_set() or await self._try_send(pending, payload)):
            if pending.instance != _ANYONE or self._closed:
                raise WorkerLost(pending.rank, "its connection is closed")
            await anyio.sleep(_CONNECT_POLL_S)

    async def _wait(self, pending: _Pending) -> None:
        while not pending.settled.is_set():
            with anyio.move_on_after(PROBE_S):
                await pending.settled.wait()
                return
            if not await self._try_send(pending, _NOTHING):
                pending.settle(WorkerLost(pending.rank, "its connection closed before it replied"))

    async def _try_send(self, pending: _Pending, payload: bytes) -> bool:
        """Whether a worker of this rank is connected. A probe may be lost if its queue is full."""
        if self._closed:
            return False
        identity = f"rank-{pending.rank}".encode()
        try:
            await self._socket.send_multipart(
                [identity, _frame(pending.instance, payload)], zmq.NOBLOCK
            )
        except zmq.Again:
            return payload is _NOTHING
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def close_nowait(self) -> None:
        """Give up every request; the socket is about to be closed."""
        self._closed = True
        for pending in self._pending.values():
            pending.settle(WorkerLost(pending.rank, "the channel to it was closed"))

    async def run_receiver(self) -> None:
        """Hand replies to those who wait for them. Runs for as long as the channel is open."""
        identities = {f"rank-{rank}".encode(): rank for rank in range(self.ranks)}
        while True:
            frames = await self._socket.recv_multipart()
            rank = identities.get(frames[0])
            parts = _parts(frames[1]) if len(frames) == 2 else None
            if rank is None or parts is None:
                _log.warning("dropped %d frames from %r: not a worker", len(frames), frames[0])
            else:
                self._receive(rank, *parts)

    def _receive(self, rank: int, instance: bytes, payload: bytes) -> None:
        for pending in self._pending.values():
            if pending.rank == rank and pending.instance not in (_ANYONE, instance):
                pending.settle(WorkerLost(rank, "its process was replaced by another"))
        if not payload:
            return
        try:
            reply = decode(payload, CONTENT_TYPE_MSGPACK, self._replies)
        except MessageInvalid as error:
            for pending in self._pending.values():
                if pending.rank == rank:
                    pending.settle(WorkerLost(rank, f"its reply cannot be read: {error}"))
            return
        answered = self._pending.get(cast(_Numbered, reply).request)
        if answered is not None and answered.rank == rank:
            answered.instance = instance
            answered.settle(reply)


@asynccontextmanager
async def open_channel(
    path: Path, ranks: int, replies: tuple[type[WorkerMessage], ...]
) -> AsyncIterator[WorkerChannel]:
    """Bind a socket for the workers of `ranks` ranks, who answer with messages of `replies`.

    Its directory must be one that only we can enter (`EngineDirectory`).

    Raises:
        EngineUnavailable: another process is bound to the path, or the path is too long.
    """
    with (
        own_socket(socket_path(path)),
        zmq.asyncio.Context() as context,
        context.socket(zmq.ROUTER) as socket,
    ):
        socket.linger = 0
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        socket.set(zmq.MAXMSGSIZE, DEFAULT_LIMITS.max_worker_payload_bytes + _FRAME_BYTES)
        socket.bind(f"ipc://{path}")
        channel = WorkerChannel(socket, ranks, replies)
        async with open_background() as tasks:
            tasks.start_soon(channel.run_receiver)
            try:
                yield channel
            finally:
                channel.close_nowait()


class WorkerEndpoint(Generic[R]):
    """A worker's side: blocking, for one thread. `socket` may be polled together with others."""

    def __init__(
        self,
        path: Path,
        rank: int,
        instance: str,
        requests: tuple[type[R], ...],
        refuse: Callable[[int, MessageInvalid], WorkerMessage],
    ) -> None:
        """Connects, now or whenever somebody binds `path`.

        `refuse(number, error)` makes the reply to a request that cannot be read, and to one whose
        reply cannot be sent.

        Raises:
            EngineUnavailable: the path is too long.
        """
        self._instance = instance.encode()
        self._requests = requests
        self._refuse = refuse
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = _LINGER_MS
        self.socket.set(zmq.IDENTITY, f"rank-{rank}".encode())
        self.socket.set(zmq.IMMEDIATE, 1)
        self.socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self.socket.set(zmq.MAXMSGSIZE, DEFAULT_LIMITS.max_worker_payload_bytes + _FRAME_BYTES)
        self.socket.connect(f"ipc://{socket_path(path)}")

    def receive_nowait(self) -> R | None:
        """The next request for this worker, or None if there is none yet."""
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            parts = _parts(frame)
            if parts is None:
                _log.warning("dropped %d bytes: not a request", len(frame))
                continue
            instance, payload = parts
            if instance not in (_ANYONE, self._instance):
                self._send(_NOTHING)
            elif payload:
                try:
                    return decode(payload, CONTENT_TYPE_MSGPACK, self._requests)
                except MessageInvalid as error:
                    self.reply(self._refuse(number_of(payload), error))

    def reply(self, reply: WorkerMessage) -> None:
        """Answer a request. If whoever asked is gone, the reply is dropped."""
        try:
            payload = encode(reply)
        except MessageInvalid as error:
            payload = encode(self._refuse(cast(_Numbered, reply).request, error))
        self._send(payload)

    def close(self) -> None:
        """Leave; the last reply may take half a second to be handed over."""
        self.socket.close()
        self._context.term()

    def _send(self, payload: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self.socket.send(_frame(self._instance, payload), zmq.NOBLOCK)


def _frame(instance: bytes, payload: bytes) -> bytes:
    return b"".join((bytes((len(instance),)), instance, payload))


def _parts(frame: bytes) -> tuple[bytes, bytes] | None:
    """Instance and payload; None: it is no frame of ours."""
    end = 1 + frame[0] if frame else 1
    return (frame[1:end], frame[end:]) if end <= len(frame) else None


def number_of(payload: bytes) -> int:
    """The number of a request that cannot be read otherwise; 0 if not even that can be."""
    try:
        document = msgspec.msgpack.decode(payload, type=dict[str, msgspec.Raw])
        return msgspec.msgpack.decode(document["request"], type=int)
    except (msgspec.DecodeError, KeyError):
        return 0

"""A client of a running `torch` engine: requests, and the commands that go to its front process.

Owns one connection to `front.ipc`, opened when it is first needed and again after it broke. Any
number of requests may be under way at once. Imports neither torch nor zmq.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import msgspec
from anyio.abc import TaskGroup

from weightbus.bus.background import open_background
from weightbus.consumers.engines.budget import share_for_peer
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.errors import RequestFailed
from weightbus.consumers.engines.torch.frames import STREAM_ENDED, FrameStream
from weightbus.consumers.engines.torch.messages import (
    CLIENT_REPLIES,
    AskFingerprints,
    AskFirstAnswer,
    AskState,
    ClientReply,
    ClientRequest,
    Done,
    Fingerprints,
    FirstAnswered,
    Infer,
    Inferred,
    Inputs,
    Pause,
    Refused,
    Restart,
    Resume,
    StateReport,
)
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable
from weightbus.schemas.codec import CONTENT_TYPE_MSGPACK, decode
from weightbus.schemas.errors import MessageInvalid

__all__ = ("TorchEngineClient", "open_torch_client")

R = TypeVar("R", Inferred, Fingerprints, StateReport, FirstAnswered, Done)


class _Pending:
    def __init__(self) -> None:
        self.settled = anyio.Event()
        self.reply: ClientReply | None = None


class _Connection:
    """One connection, and who waits for an answer on it."""

    def __init__(self, frames: FrameStream) -> None:
        self.frames = frames
        self.pending: dict[int, _Pending] = {}
        self.broken = ""
        """Why it is of no more use; empty: it is not broken."""

    async def run_receiver(self) -> None:
        try:
            while True:
                reply = decode(await self.frames.receive(), CONTENT_TYPE_MSGPACK, CLIENT_REPLIES)
                pending = self.pending.get(reply.request)
                if pending is not None:
                    pending.reply = reply
                    pending.settled.set()
        except STREAM_ENDED:
            self.broken = "its front process closed the connection"
        except MessageInvalid as error:
            self.broken = f"its answer cannot be read: {error}"
        finally:
            await self.frames.aclose()
            self.broken = self.broken or "the client was closed"
            for waiting in self.pending.values():
                waiting.settled.set()


class TorchEngineClient:
    """Every method raises, beside what it says:

    Raises:
        EngineUnavailable: there is no such engine, or it went away before it answered.
        DeadlineExceeded: it did not answer in time.
        RequestFailed: it refused, and says why.
    """

    def __init__(self, directory: Path, tasks: TaskGroup) -> None:
        self._place = EngineDirectory(directory)
        self._tasks = tasks
        self._numbers = itertools.count(1)
        self._connecting = anyio.Lock()
        self._connection: _Connection | None = None

    async def infer(self, inputs: Inputs, deadline_s: float) -> Inferred:
        """What the model answers, and with which version. Waits while the engine is paused."""
        request = Infer(request=0, inputs=inputs, deadline_s=share_for_peer(deadline_s))
        return await self._ask(request, Inferred, deadline_s)

    async def fingerprint(self, deadline_s: float) -> Fingerprints:
        """What every rank holds, as a hash. Takes its turn among the requests."""
        request = AskFingerprints(request=0, deadline_s=share_for_peer(deadline_s))
        return await self._ask(request, Fingerprints, deadline_s)

    async def state(self, deadline_s: float) -> StateReport:
        """What the engine serves; answered at once, whatever it is doing."""
        return await self._ask(
            AskState(request=0, deadline_s=share_for_peer(deadline_s)), StateReport, deadline_s
        )

    async def first_answer(self, version: int, deadline_s: float) -> int:
        """When the first answer was made with a version that is served now; waits for it. 0: the
        engine was paused before one was made, or none was in time."""
        request = AskFirstAnswer(request=0, version=version, deadline_s=share_for_peer(deadline_s))
        return (await self._ask(request, FirstAnswered, deadline_s)).at_ns

    async def pause(self, deadline_s: float) -> None:
        """Returns when no request is running; requests that come wait. Idempotent."""
        await self._ask(Pause(request=0, deadline_s=share_for_peer(deadline_s)), Done, deadline_s)

    async def resume(self, version: int, deadline_s: float) -> None:
        """Serve a version that every rank holds whole."""
        request = Resume(request=0, version=version, deadline_s=share_for_peer(deadline_s))
        await self._ask(request, Done, deadline_s)

    async def restart(self, reason: str, deadline_s: float) -> None:
        """Kill the ranks and start them anew; returns when the old ones are gone."""
        request = Restart(request=0, reason=reason, deadline_s=share_for_peer(deadline_s))
        await self._ask(request, Done, deadline_s)

    async def _ask(self, request: ClientRequest, expected: type[R], deadline_s: float) -> R:
        number = next(self._numbers)
        what = f"{type(request).__name__} of the engine"
        pending = _Pending()
        with anyio.move_on_after(deadline_s):
            connection = await self._connect()
            connection.pending[number] = pending
            try:
                await connection.frames.send(msgspec.structs.replace(request, request=number))
                await pending.settled.wait()
            except STREAM_ENDED:
                pass  # `broken` says why
            finally:
                del connection.pending[number]
            if pending.reply is None:
                raise self._unavailable(connection.broken or "the connection broke")
        match pending.reply:
            case None:
                raise DeadlineExceeded(what, deadline_s)
            case Refused(error="DeadlineExceeded", reason=stage):
                raise DeadlineExceeded(stage, deadline_s)
            case Refused(error=error, reason=reason):
                raise RequestFailed(error, reason)
            case reply if isinstance(reply, expected):
                return reply
            case other:
                raise self._unavailable(f"it answered {what} with {type(other).__name__}")

    async def _connect(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or self._connection.broken:
                self._place.check()
                try:
                    stream = await anyio.connect_unix(self._place.front)
                except OSError as error:
                    raise self._unavailable(f"nothing runs there: {error.strerror}") from None
                self._connection = _Connection(FrameStream(stream))
                self._tasks.start_soon(self._connection.run_receiver)
            return self._connection

    def _unavailable(self, reason: str) -> EngineUnavailable:
        return EngineUnavailable(str(self._place.path), reason)


@asynccontextmanager
async def open_torch_client(directory: Path) -> AsyncIterator[TorchEngineClient]:
    """A client of the engine in a directory, whether it runs yet or not."""
    async with open_background() as tasks:
        yield TorchEngineClient(directory, tasks)

"""Runs the front process of a `torch` engine: the socket for clients, the signals, the end.

Owns `front.ipc` and, through `Front`, the rank processes. Does not import torch. It leaves no
process behind: SIGTERM and SIGINT end it in order, and if it is killed the kernel ends the ranks.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import ByteStream

from weightbus.bus.background import open_background
from weightbus.consumers.engines.channel import number_of
from weightbus.consumers.engines.directory import EngineDirectory, own_socket
from weightbus.consumers.engines.torch.frames import STREAM_ENDED, FrameStream
from weightbus.consumers.engines.torch.front import Front
from weightbus.consumers.engines.torch.messages import CLIENT_REQUESTS, ClientRequest, Refused
from weightbus.consumers.engines.torch.ranks import open_ranks
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.errors import EngineUnavailable
from weightbus.schemas.codec import CONTENT_TYPE_MSGPACK, decode
from weightbus.schemas.errors import MessageInvalid, WeightBusError

__all__ = ("run_engine",)

LOCK_WAIT_S = 3.0
"""How long the process that was bound to the directory before may take to end."""

_LOCK_POLL_S = 0.05


async def run_engine(
    directory: Path, spec: TorchEngineSpec, on_ready: Callable[[], None] | None = None
) -> None:
    """Serve clients until SIGTERM or SIGINT. `on_ready` is called once, when the ranks answer.

    Raises:
        EngineUnavailable: the directory is taken or open to others, or the ranks cannot be started.
    """
    place = EngineDirectory(directory)
    place.prepare()
    with ExitStack() as stack:
        await _take(place.front, stack)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with open_background() as tasks:
                front = Front(spec, partial(open_ranks, place, spec))
                tasks.start_soon(front.run_ranks)
                tasks.start_soon(_serve, place.front, front)
                if on_ready is not None:
                    tasks.start_soon(_announce, front, on_ready)
                async for _ in signals:
                    break


async def _take(socket: Path, stack: ExitStack) -> None:
    """Hold the socket's lock until the stack is closed, which leaves no socket behind.

    Raises:
        EngineUnavailable: another process keeps it for `LOCK_WAIT_S`.
    """
    give_up = anyio.current_time() + LOCK_WAIT_S
    while True:
        try:
            stack.enter_context(own_socket(socket))
        except EngineUnavailable:
            if anyio.current_time() > give_up:
                raise
            await anyio.sleep(_LOCK_POLL_S)
        else:
            return


async def _announce(front: Front, on_ready: Callable[[], None]) -> None:
    await front.ready.wait()
    on_ready()


async def _serve(socket: Path, front: Front) -> None:
    async with await anyio.create_unix_listener(socket, mode=0o600) as listener:
        await listener.serve(partial(_serve_client, front))


async def _serve_client(front: Front, stream: ByteStream) -> None:
    """Answer one client, as many requests at once as it likes; what it asked for ends with it."""
    frames = FrameStream(stream)
    async with anyio.create_task_group() as tasks:
        try:
            while True:
                payload = await frames.receive()
                try:
                    request = decode(payload, CONTENT_TYPE_MSGPACK, CLIENT_REQUESTS)
                except MessageInvalid as error:
                    number, reason = number_of(payload), str(error)
                    refused = Refused(request=number, error="MessageInvalid", reason=reason)
                    await frames.send(refused)
                else:
                    tasks.start_soon(_answer, front, frames, request)
        except STREAM_ENDED:
            pass
        finally:
            tasks.cancel_scope.cancel()
            await frames.aclose()


async def _answer(front: Front, frames: FrameStream, request: ClientRequest) -> None:
    reply = await front.answer(request)
    with suppress(*STREAM_ENDED):
        await frames.send(reply)


def main(directory: str, spec: str) -> int:
    """The front process of an engine that a consumer has started; returns its exit status."""
    try:
        anyio.run(run_engine, Path(directory), TorchEngineSpec.from_json(spec))
    except WeightBusError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

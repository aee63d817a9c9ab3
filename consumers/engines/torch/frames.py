"""Messages over a unix stream socket, each after its length. Owns the stream it is given.

Clients and the front speak over a stream because its end tells each side at once that the other
is gone, without a probe.
"""

from __future__ import annotations

import struct

import anyio
from anyio.abc import ByteReceiveStream, ByteStream, SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream

from weightbus.schemas.codec import encode
from weightbus.schemas.limits import DEFAULT_LIMITS
from weightbus.schemas.worker import WorkerMessage

__all__ = ("STREAM_ENDED", "FrameStream")

STREAM_ENDED = (
    anyio.EndOfStream,
    anyio.IncompleteRead,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
)
"""What sending and receiving raise when the other side is gone, or the stream was closed."""

_LENGTH = struct.Struct("<I")


class FrameStream:
    """One side of a connection. One task receives; any number may send."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._received = BufferedByteReceiveStream(_Readable(stream))
        self._sending = anyio.Lock()

    async def send(self, message: WorkerMessage) -> None:
        """Send one message whole. If it is cancelled half-way, the stream is of no more use.

        Raises:
            MessageInvalid: the message breaks the contract; nothing was sent.
            anyio.BrokenResourceError, anyio.ClosedResourceError: the other side is gone.
        """
        payload = encode(message)
        async with self._sending:
            sent = False
            try:
                await self._stream.send(_LENGTH.pack(len(payload)) + payload)
                sent = True
            finally:
                if not sent:
                    await self.aclose()

    async def receive(self) -> bytes:
        """The next payload.

        Raises:
            any of STREAM_ENDED: there are no more, or the other side announced more than may be.
        """
        (size_bytes,) = _LENGTH.unpack(await self._received.receive_exactly(_LENGTH.size))
        if size_bytes > DEFAULT_LIMITS.max_worker_payload_bytes:
            await self.aclose()
            raise anyio.BrokenResourceError
        return await self._received.receive_exactly(size_bytes)

    async def aclose(self) -> None:
        anyio.notify_closing(self._stream.extra(SocketAttribute.raw_socket))
        await anyio.aclose_forcefully(self._stream)


class _Readable(ByteReceiveStream):
    """Waits for bytes before it receives: a stream of anyio that is cancelled while it waits, in
    the very moment in which bytes come, lets `InvalidStateError` out of the event loop."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.wait_readable(self._stream.extra(SocketAttribute.raw_socket))
        return await self._stream.receive(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()

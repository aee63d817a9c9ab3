"""The connection to the NATS server: the only module that knows nats-py.

Owns one nats-py client. Its exceptions, callbacks and logging end here: they become `BusError`s.

- A lost connection is silent: requests under way are interrupted, new ones wait for the next
  connection, and listeners hear of it. After `reconnect_for_s` without a server the link fails, for
  good, with one `BusUnavailable` that reaches every request and every listener.
- nats-py's `flush`, `rtt` and `drain` are not used: a cancelled one leaves a future behind on which
  the client's read loop dies.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import anyio
import nats.errors
from anyio.abc import TaskGroup
from nats.aio.client import Client
from nats.aio.msg import Msg

from weightbus.bus.background import open_background
from weightbus.bus.errors import (
    BusTimeout,
    BusUnavailable,
    PayloadTooLarge,
    ServerTooOld,
)
from weightbus.bus.host import unknown_host, without_credentials
from weightbus.bus.security import connect_arguments
from weightbus.bus.server import MINIMUM_VERSION, is_too_old
from weightbus.bus.settings import BusSettings

__all__ = ("Incoming", "Interrupted", "Link", "Listener", "NoResponders", "open_link")

_RECONNECT_WAIT_S = 0.25
_PING_INTERVAL_S = 5
_MAX_OUTSTANDING_PINGS = 2
"""A server that is silent for 15 s counts as lost."""
_CLOSE_TIMEOUT_S = 2.0
_HEADER_FRAME_BYTES = len("NATS/1.0\r\n\r\n")
_HEADER_LINE_BYTES = len(": \r\n")

# What nats-py's errors say, by which alone they can be told apart.
_AUTHORIZATION = "authorization"
_PERMISSIONS = "permissions violation"

logging.getLogger("nats").addHandler(logging.NullHandler())  # nothing of it goes to stderr
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message as it came."""

    subject: str
    headers: Mapping[str, str]
    payload: bytes


class NoResponders(Exception):
    """Nobody serves the subject of a request. Stays inside the bus."""


class Interrupted(Exception):
    """The connection was lost during a request: whether it was carried out is not known.

    Whoever sends it again must make that harmless. Stays inside the bus.
    """


class Listener(Protocol):
    """Who wants to know what becomes of the connection. Both methods return at once."""

    def reconnected_nowait(self) -> None:
        """Connected again; whatever was published meanwhile was missed."""

    def failed_nowait(self, error: BusUnavailable) -> None:
        """The link has failed, for good."""


class Link:
    """One connection; made by `open_link`."""

    url: str
    """Where it was told to connect, without credentials."""

    def __init__(self, settings: BusSettings, url: str, tasks: TaskGroup) -> None:
        self.url = without_credentials(url)
        self._servers = url.split(",")
        self._settings = settings
        self._tasks = tasks
        self._client = Client()
        self._up = anyio.Event()
        self._failure: str | None = None
        self._connections = 1
        self._closing = False
        self._last_error = "no server answers"
        self._last_refusal = ""
        self._in_flight: set[anyio.CancelScope] = set()
        self._listeners: list[Listener] = []
        self._connecting = anyio.CancelScope()

    @property
    def connections(self) -> int:
        """How many there have been; another number than before means another connection."""
        return self._connections

    @property
    def is_up(self) -> bool:
        """Connected now, as far as we know."""
        return self._up.is_set() and self._failure is None

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        operation: str,
    ) -> Incoming:
        """One request and its answer. `operation` names it in messages.

        Raises:
            Interrupted: the connection was lost before the answer came.
            NoResponders: nobody serves the subject.
            BusTimeout, BusUnavailable, PayloadTooLarge
        """
        self._check_size(subject, payload, headers)
        await self.wait_until_up()
        with self._until_interrupted(), self._mapped_errors(operation):
            answer = await self._client.request(
                subject,
                payload,
                timeout=self._settings.request_timeout_s,
                headers=_headers(headers),
            )
            return _incoming(answer)
        raise Interrupted(operation)

    async def request_many(
        self,
        subject: str,
        payload: bytes,
        *,
        is_last: Callable[[Incoming], bool],
        operation: str,
    ) -> list[Incoming]:
        """One request and all its answers, up to and with the one that `is_last`.

        Raises:
            Interrupted: the connection was lost before the last answer came.
            NoResponders: nobody serves the subject.
            BusTimeout, BusUnavailable, PayloadTooLarge
        """
        self._check_size(subject, payload, None)
        answers: list[Incoming] = []
        complete = anyio.Event()

        def deliver(answer: Incoming) -> None:
            answers.append(answer)
            if _is_no_responders(answer) or is_last(answer):
                complete.set()

        await self.wait_until_up()
        inbox = str(self._client.new_inbox())
        with self._until_interrupted(), self._mapped_errors(operation):
            async with self.subscribe(inbox, deliver):
                await self._client.publish(subject, payload, reply=inbox)
                with anyio.move_on_after(self._settings.request_timeout_s):
                    await complete.wait()
            if not complete.is_set():
                raise nats.errors.TimeoutError
            if _is_no_responders(answers[-1]):
                raise nats.errors.NoRespondersError
            return answers
        raise Interrupted(operation)

    @asynccontextmanager
    async def subscribe(
        self, subject: str, deliver: Callable[[Incoming], None]
    ) -> AsyncIterator[None]:
        """Hand every message of a subject to `deliver`, which must not raise or wait.

        Entered before the server knows of it: see `settle`.

        Raises:
            BusUnavailable
        """

        async def receive(message: Msg) -> None:
            deliver(_incoming(message))

        await self.wait_until_up()
        with self._mapped_errors("subscription"):
            subscription = await self._client.subscribe(
                subject, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0
            )
        try:
            yield
        finally:
            with (
                anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True),
                suppress(nats.errors.Error, OSError),
            ):
                await subscription.unsubscribe()

    async def settle(self) -> None:
        """Returns once the server has taken in everything that was sent to it before.

        Raises:
            BusTimeout, BusUnavailable
        """
        with suppress(NoResponders, Interrupted):  # an answer too; a new connection starts with it
            await self.request("$JS.API.INFO", operation="subscription")

    @contextmanager
    def listen(self, listener: Listener) -> Iterator[None]:
        """Tell `listener` of reconnects and of the failure, while the context is open."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    async def wait_until_up(self) -> None:
        """Returns while connected; waits out a lost connection.

        Raises:
            BusUnavailable: it was lost for `reconnect_for_s`, or ended for good.
        """
        while not self._up.is_set():
            await self._up.wait()  # it may be lost again before this task's turn comes
        if self._failure is not None:
            raise BusUnavailable(self.url, self._failure)

    async def connect(self) -> None:
        """The first connection; called once, by `open_link`."""
        timeout_s = self._settings.connect_timeout_s
        options = connect_arguments(self._settings)
        options["connect_timeout"] = timeout_s  # nats-py annotates these two as int
        options["reconnect_time_wait"] = _RECONNECT_WAIT_S
        with anyio.move_on_after(timeout_s), self._connecting:
            try:
                await self._client.connect(
                    self._servers,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    closed_cb=self._on_closed,
                    name=self._settings.name,
                    max_reconnect_attempts=-1,
                    ping_interval=_PING_INTERVAL_S,
                    max_outstanding_pings=_MAX_OUTSTANDING_PINGS,
                    **options,
                )
            except (nats.errors.Error, OSError) as error:
                raise BusUnavailable(self.url, _reason(error, self.url)) from None
            self._check_version()
            self._up.set()
            return
        raise BusUnavailable(self.url, self._last_error)

    async def close(self) -> None:
        """Called once, by `open_link`."""
        self._closing = True
        if self._client.options:  # else it never got as far as having something to close
            await self._close_client()

    @contextmanager
    def _until_interrupted(self) -> Iterator[None]:
        """Leaves the body when the connection is lost; the code after it runs only then."""
        with anyio.CancelScope() as scope:
            self._in_flight.add(scope)
            try:
                yield
            finally:
                self._in_flight.discard(scope)

    @contextmanager
    def _mapped_errors(self, operation: str) -> Iterator[None]:
        """What nats-py raises becomes ours."""
        try:
            yield
        except nats.errors.NoRespondersError:
            raise NoResponders(operation) from None
        except nats.errors.TimeoutError:
            timeout_s = self._settings.request_timeout_s
            raise BusTimeout(operation, timeout_s, self._last_refusal) from None
        except (nats.errors.OutboundBufferLimitError, OSError):
            raise Interrupted(operation) from None  # it is on its way to the next connection
        except nats.errors.Error as error:
            raise BusUnavailable(self.url, self._failure or _reason(error, self.url)) from None

    def _check_version(self) -> None:
        found = self._client.connected_server_version
        version = f"{found.major}.{found.minor}.{found.patch}"
        if is_too_old(version):
            raise ServerTooOld(self.url, version, ".".join(map(str, MINIMUM_VERSION)))

    def _check_size(self, subject: str, payload: bytes, headers: Mapping[str, str] | None) -> None:
        """The server counts headers too, and closes the connection of who sends too much."""
        size_bytes = len(payload) + _HEADER_FRAME_BYTES
        for name, value in (headers or {}).items():
            size_bytes += len(name.encode()) + len(value.encode()) + _HEADER_LINE_BYTES
        limit_bytes = self._client.max_payload
        if size_bytes > limit_bytes:
            raise PayloadTooLarge(subject, size_bytes, limit_bytes)

    async def _on_error(self, error: Exception) -> None:
        """nats-py reports here what it goes on after; during an outage it is the reason."""
        self._last_error = _reason(error, self.url)
        _log.debug("nats: %s", self._last_error)
        if _PERMISSIONS in self._last_error.lower():
            self._last_refusal = self._last_error
        if _AUTHORIZATION in self._last_error.lower() or isinstance(error, ssl.SSLError):
            self._connecting.cancel()  # the first connection only: trying again would not help

    async def _on_disconnected(self) -> None:
        if self._closing or self._failure is not None or not self._up.is_set():
            return
        self._up = anyio.Event()
        self._interrupt()
        self._tasks.start_soon(self._limit_outage, self._up)

    def _interrupt(self) -> None:
        for scope in tuple(self._in_flight):
            scope.cancel()

    async def _limit_outage(self, up: anyio.Event) -> None:
        allowed_s = self._settings.reconnect_for_s
        with anyio.move_on_after(allowed_s):
            await up.wait()
            return
        self.fail_nowait(f"lost for {allowed_s:g} s: {self._last_error}")
        await self._close_client()

    async def _close_client(self) -> None:
        """In a task of its own: nats-py's `close` may raise `CancelledError` by itself, when it
        waits for the same transport as a reconnect that it has cancelled."""

        async def close() -> None:
            try:
                await self._client.close()
            except (nats.errors.Error, OSError):  # of a transport that was lost: it ends midway
                for subscription in tuple(self._client._subs.values()):
                    subscription._stop_processing()

        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(close)

    async def _on_reconnected(self) -> None:
        if self._failure is not None:
            return
        self._connections += 1
        self._up.set()
        for listener in tuple(self._listeners):
            listener.reconnected_nowait()

    async def _on_closed(self) -> None:
        """nats-py closes by itself on errors that it does not reconnect after."""
        if not self._closing:
            self.fail_nowait(_reason(self._client.last_error, self.url) or self._last_error)

    def fail_nowait(self, reason: str) -> None:
        """Nothing will come of this link any more."""
        if self._failure is not None:
            return
        self._failure = reason
        self._up.set()
        self._interrupt()
        for listener in tuple(self._listeners):
            listener.failed_nowait(BusUnavailable(self.url, reason))


@asynccontextmanager
async def open_link(settings: BusSettings, url: str) -> AsyncIterator[Link]:
    """Connect.

    Raises:
        BusUnavailable: no server within `connect_timeout_s`, or it refused us.
        ServerTooOld: its version is below `MINIMUM_VERSION`.
        SettingInvalid: certificates or credentials cannot be read.
    """
    async with open_background() as tasks:
        link = Link(settings, url, tasks)
        try:
            await link.connect()
            yield link
        finally:
            await link.close()


def _incoming(message: Msg) -> Incoming:
    return Incoming(message.subject, message.headers or {}, message.data)


def _headers(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(headers) if headers else None


def _is_no_responders(answer: Incoming) -> bool:
    return not answer.payload and answer.headers.get("Status") == "503"


def _reason(error: Exception | None, url: str) -> str:
    if isinstance(error, socket.gaierror):
        return unknown_host(url, error)
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return "" if error is None else (str(error) or type(error).__name__)

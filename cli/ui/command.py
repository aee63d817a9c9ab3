"""The command itself: a page about a bus, served until it is told to stop."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import webbrowser
from collections.abc import Iterator
from typing import Final

import anyio
import anyio.abc
import click
import uvicorn
from msgspec import Struct

from weightbus.bus.settings import BusSettings
from weightbus.cli.monitoring import running_bus
from weightbus.cli.ui.app import build_app
from weightbus.cli.ui.feed import Feed
from weightbus.cli.ui.stream import EventStreams
from weightbus.cli.until import until_stopped
from weightbus.schemas.errors import WeightBusError

__all__ = ("Options", "command", "run_ui")

DEFAULT_PORT: Final = 8420
CONNECTIONS_MAX: Final = 256
STOP_S: Final = 2
"""How long answers under way may take when the server stops."""


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for."""

    bus: BusSettings
    model: str | None
    host: str
    port: int
    open_page: bool


class AddressUnusable(WeightBusError):
    """The page cannot be served there."""

    def __init__(self, host: str, port: int, reason: str, remedy: str) -> None:
        self.host, self.port, self.reason, self.remedy = host, port, reason, remedy
        super().__init__(f"the page cannot be served at {host} port {port}: {reason}; {remedy}")


@click.command("ui")
@click.option("--nats", "nats_url", help="NATS URL; else WEIGHTBUS_NATS_URL.")
@click.option("--model", help="Only this model; else all that the bus knows of.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve it at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Port; 0: a free one.",
)
@click.option("--open", "open_page", is_flag=True, help="Open it in the browser.")
def command(nats_url: str | None, model: str | None, host: str, port: int, open_page: bool) -> None:
    """Serve a web page about the fleet, until Ctrl-C.

    Engines with their versions and states, rounds as they run, the history, the waterfall of every
    round with its critical path, failures with their reasons. It only reads. Whoever reaches its
    address may look: by default that is this machine alone.

    Exit codes: 0 interrupted, 1 no bus or no such address, 2 used wrongly.
    """
    bus = running_bus(nats_url, "weightbus-ui")
    options = Options(bus=bus, model=model, host=host, port=port, open_page=open_page)
    anyio.run(run_ui, options)


async def run_ui(options: Options) -> None:
    """Serve until SIGINT or SIGTERM; the URL is printed once the page can be asked for."""
    feed = Feed(options.bus, options.model)
    streams = EventStreams(feed.board, feed.now_ns)
    with _listen(options.host, options.port) as listening:
        url = _url(options.host, listening.getsockname()[1])
        server = _Server(
            uvicorn.Config(
                build_app(feed, streams, options.host),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS_MAX,
                timeout_graceful_shutdown=STOP_S,
            )
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(feed.run)
            async with anyio.create_task_group() as serving:
                serving.start_soon(server.serve, [listening])
                click.echo(f"weightbus ui at {url} (Ctrl-C stops it)")
                if options.open_page:
                    serving.start_soon(_open_page, url)
                await until_stopped()
                server.should_exit = True
                streams.close()
            tasks.cancel_scope.cancel()


async def _open_page(url: str) -> None:
    await anyio.to_thread.run_sync(webbrowser.open, url, abandon_on_cancel=True)


class _Server(uvicorn.Server):
    """Leaves signals to the command."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        AddressUnusable
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            remedy = "--host must be an address of this machine"
        else:
            remedy = "give another --port, or 0 for a free one"
        raise AddressUnusable(host, port, reason, remedy) from None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

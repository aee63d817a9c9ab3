"""`weightbus doctor`: what is installed here, and how fast this host's links are.

Loads what it measures with when it measures: what is missing is a line of the table, not an error.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import anyio
import anyio.to_thread
import click
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from weightbus.bus.blocks import SHM_DIRECTORY
from weightbus.bus.server import find_server
from weightbus.consumers.cards import network_cards
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.rounds import Links
from weightbus.tracing.text import format_bytes, format_rate, gigabytes_per_second, printable

__all__ = ("Finding", "Options", "command", "examine")

MEASURE_TIMEOUT_S = 60.0
"""Of one measurement, with all that it loads and starts."""

_TORCH = "pip install 'weightbus[torch]'"


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for."""

    directory: Path | None
    address: str
    p2p_protocol: str
    p2p_device: str
    network: int
    """Bytes per second of one card; 0: what the system says."""
    cards: int


class Finding(Struct, frozen=True):
    """One line of the table."""

    what: str
    found: str
    ok: bool = True


@click.command("doctor")
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure reading files in this directory, too: one that checkpoints lie on.",
)
@click.option(
    "--address",
    default="127.0.0.1",
    envvar="WEIGHTBUS_ADDRESS",
    show_default=True,
    help="Of this host, over which groups and the transfer engine are measured.",
)
@click.option("--p2p-protocol", default="tcp", envvar="WEIGHTBUS_P2P_PROTOCOL", show_default=True)
@click.option("--p2p-device", default="", envvar="WEIGHTBUS_P2P_DEVICE")
@click.option(
    "--network-gbit",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Of one network card, one way.  [default: what the system says]",
)
@click.option(
    "--cards",
    type=click.IntRange(0, 1024),
    default=0,
    help="Network cards that are used side by side.  [default: the fastest that are up]",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rates to this file, for `weightbus consume --links`.",
)
def command(
    directory: Path | None,
    address: str,
    p2p_protocol: str,
    p2p_device: str,
    network_gbit: float,
    cards: int,
    json_file: Path | None,
) -> None:
    """Check this host, and measure the rates that routes are chosen by; about a second each.

    What crosses the network is measured on one address of this host: between hosts the network may
    be slower, and --network-gbit then says so.
    """
    options = Options(
        directory=directory,
        address=address,
        p2p_protocol=p2p_protocol,
        p2p_device=p2p_device,
        network=round(network_gbit * 1e9 / 8),
        cards=cards,
    )
    findings, links = anyio.run(examine, options)
    table = Table("", "what", "found", box=None, pad_edge=False)
    for finding in findings:
        table.add_row("ok" if finding.ok else "--", finding.what, printable(finding.found))
    Console().print(table, markup=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(links), indent=2) + b"\n")
        click.echo(f"rates written to {json_file}")


async def examine(options: Options) -> tuple[list[Finding], Links]:
    """Everything, one after the other, so that no measurement disturbs another."""
    findings = [await anyio.to_thread.run_sync(_server), _shared_memory(), _package("torch")]
    rates: dict[str, int] = {}
    for name, measure in _measurements(options).items():
        finding, rates[name] = await _measured(name, measure)
        findings.append(finding)
    network, cards = options.network, options.cards
    if not (network and cards):
        found, count = network_cards()
        network, cards = network or found, cards or count
    told = f"{cards} x {_rate(network)}" if network else "the system does not say: --network-gbit"
    findings.append(Finding("network cards", told, bool(network)))
    return findings, Links(**rates, network=network, cards=cards)


def _measurements(options: Options) -> dict[str, Callable[[], Awaitable[int]]]:
    """Rate of `Links` -> how it is measured. Imports only when it is called."""

    async def memory() -> int:
        from weightbus.consumers.measuring import measure_memory

        return await anyio.to_thread.run_sync(measure_memory, abandon_on_cancel=True)

    async def disk(directory: Path) -> int:
        from weightbus.consumers.measuring import measure_disk

        return await anyio.to_thread.run_sync(measure_disk, directory, abandon_on_cancel=True)

    async def broadcast() -> int:
        from weightbus.consumers.measuring import measure_broadcast

        return await measure_broadcast(options.address)

    async def p2p() -> int:
        from weightbus.consumers.measuring import measure_p2p

        return await measure_p2p(options.address, options.p2p_protocol, options.p2p_device)

    measurements: dict[str, Callable[[], Awaitable[int]]] = {"memory": memory}
    if options.directory is not None:
        measurements["disk"] = partial(disk, options.directory)
    return measurements | {"broadcast": broadcast, "p2p": p2p}


async def _measured(name: str, measure: Callable[[], Awaitable[int]]) -> tuple[Finding, int]:
    """A rate, or why there is none (0)."""
    what = f"rate: {name}"
    try:
        with anyio.fail_after(MEASURE_TIMEOUT_S):
            rate = await measure()
    except TimeoutError:
        return Finding(what, f"not measured within {MEASURE_TIMEOUT_S:g} s", False), 0
    except ModuleNotFoundError as error:
        return Finding(what, f"needs {error.name}: {_TORCH}", False), 0
    except WeightBusError as error:
        return Finding(what, str(error), False), 0
    return Finding(what, _rate(rate)), rate


def _rate(rate: int) -> str:
    return f"{format_rate(gigabytes_per_second(rate, 1.0))} GB/s"


def _server() -> Finding:
    try:
        return Finding("nats-server", str(find_server()))
    except WeightBusError as error:
        return Finding("nats-server", str(error), False)


def _shared_memory() -> Finding:
    try:
        room = os.statvfs(SHM_DIRECTORY)
    except OSError as error:
        return Finding(str(SHM_DIRECTORY), str(error.strerror), False)
    size, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    return Finding(
        str(SHM_DIRECTORY), f"{format_bytes(free)} free of {format_bytes(size)}", free > 0
    )


def _package(name: str) -> Finding:
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, f"not installed: {_TORCH}", False)

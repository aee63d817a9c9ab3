"""`weightbus doctor`: what is installed here, and how fast this host's links are.

Loads what it measures with when it measures: what is missing, or broken, is a line of the table.
What libraries write to the terminal meanwhile is not shown.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
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
from weightbus.cli.links import LINKS_FILE
from weightbus.cli.options import p2p_options
from weightbus.consumers.cards import card_holding, network_cards
from weightbus.consumers.planning.cost import ASSUMED_LINKS
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.rounds import Links
from weightbus.tracing.text import format_bytes, format_rate, gigabytes_per_second, printable

__all__ = ("Finding", "Options", "command", "examine")

MEASURE_TIMEOUT_S = 60.0
"""Of one measurement, with all that it loads and starts."""

MAX_GBIT = 1e6
"""Of one card: more is a slip of the pen."""

EXIT_MISSING = 1

FILE_MODE = 0o644
"""Of what is written: rates are no secret."""

LOOPBACK = "lo"
STDERR = 2

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
    note: bool = False
    """Nothing is wrong: it could be known better."""

    @property
    def mark(self) -> str:
        return "--" if not self.ok else "note" if self.note else "ok"


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no rate")
    return value


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
@p2p_options
@click.option(
    "--network-gbit",
    type=click.FloatRange(min=0, max=MAX_GBIT),
    default=0.0,
    callback=_finite,
    help="Of one network card, one way.  [default: what the system says]",
)
@click.option(
    "--cards",
    type=click.IntRange(0, 1024),
    default=0,
    help="Network cards that are used side by side.  [default: with tcp the one that has the "
    "address, else the fastest that are up]",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rates to this file, for `weightbus consume --links`, which by default reads "
    f"{LINKS_FILE}.",
)
def command(
    directory: Path | None,
    address: str,
    p2p_protocol: str,
    p2p_device: str,
    network_gbit: float,
    cards: int,
    output: Path | None,
) -> None:
    """Check this host, and measure the rates that routes are chosen by; about a second each.

    What crosses the network is measured on one address of this host: between hosts the network may
    be slower, and --network-gbit then says so. For a rate that is not known the planner takes an
    assumption. Exits with 1 if a check failed: the last line names which.
    """
    options = Options(
        directory=directory,
        address=address,
        p2p_protocol=p2p_protocol,
        p2p_device=p2p_device,
        network=round(network_gbit * 1e9 / 8),
        cards=cards,
    )
    with _replacing(output) as write:
        findings, links = anyio.run(examine, options)
        table = Table("", "what", "found", box=None, pad_edge=False)
        for finding in findings:
            table.add_row(finding.mark, finding.what, printable(finding.found))
        Console().print(table, markup=False)
        if output is not None:
            write(msgspec.json.format(msgspec.json.encode(links), indent=2) + b"\n")
            click.echo(f"rates written to {output}")
    if failed := [finding.what for finding in findings if not finding.ok]:
        click.echo(f"failed: {', '.join(failed)}")
        click.get_current_context().exit(EXIT_MISSING)


@contextmanager
def _replacing(path: Path | None) -> Iterator[Callable[[bytes], None]]:
    """What writes a file whole, or leaves it as it was; whether it can be made is known at once.

    Raises:
        BadParameter: it cannot.
    """
    if path is None:
        yield lambda content: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise click.BadParameter(f"--output {path} cannot be written: {error.strerror}") from None

    def write(content: bytes) -> None:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), FILE_MODE)
        os.replace(name, path)

    try:
        with os.fdopen(handle, "wb") as file:
            yield write
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)


async def examine(options: Options) -> tuple[list[Finding], Links]:
    """Everything, one after the other, so that no measurement disturbs another."""
    findings = [await anyio.to_thread.run_sync(_server), _shared_memory(), _package("torch")]
    rates: dict[str, int] = {}
    for name, measure in _measurements(options).items():
        finding, rates[name] = await _measured(name, measure)
        findings.append(finding)
    if options.directory is None:
        told = f"not measured: --dir; {_assumed('disk')}"
        findings.append(Finding("rate: disk", told, note=True))
    network, cards = options.network, options.cards
    if not (network and cards):
        found, count = await anyio.to_thread.run_sync(_cards, options)
        network, cards = network or found, cards or count
    told = f"{cards} x {_rate(network)}"
    if not network:
        told = f"the system does not say: --network-gbit; {_assumed('network')}"
    findings.append(Finding("network cards", told, note=not network))
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
        with _quiet(), anyio.fail_after(MEASURE_TIMEOUT_S):
            rate = await measure()
    except BaseExceptionGroup as group:
        known, others = group.split((WeightBusError, ImportError, OSError, UnicodeError))
        if known is None or others is not None:
            raise
        return _unmeasured(name, next(_leaves(known))), 0
    except (WeightBusError, ImportError, OSError, UnicodeError) as error:
        return _unmeasured(name, error), 0
    return Finding(what, _rate(rate)), rate


def _unmeasured(name: str, error: BaseException) -> Finding:
    return Finding(f"rate: {name}", f"{_why(error)}; {_assumed(name)}", False)


def _assumed(name: str) -> str:
    """What stands in for a rate that is 0."""
    return f"the planner takes {_rate(getattr(ASSUMED_LINKS, name))}"


def _why(error: BaseException) -> str:
    match error:
        case WeightBusError():
            return str(error)
        case TimeoutError():
            return f"not measured within {MEASURE_TIMEOUT_S:g} s"
        case ModuleNotFoundError():
            return f"needs {error.name}: {_TORCH}"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


@contextmanager
def _quiet() -> Iterator[None]:
    """What this process and its children write to standard error goes nowhere: libraries of other
    languages log there, whatever they are told."""
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(STDERR)
        try:
            os.dup2(nowhere.fileno(), STDERR)
            yield
        finally:
            os.dup2(kept, STDERR)
            os.close(kept)


def _cards(options: Options) -> tuple[int, int]:
    """One stream of tcp goes through one card: the one that has the address, unless that is a
    loopback. RDMA uses all of them."""
    if options.p2p_protocol != "tcp":
        return network_cards()
    holding = card_holding(options.address)
    if holding is None or holding == LOOPBACK:
        return network_cards()[0], 1
    return network_cards(only=holding)


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

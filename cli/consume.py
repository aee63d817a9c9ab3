"""`weightbus consume`: the consumer service beside one engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import click
import msgspec
from msgspec import Struct

from weightbus.bus.background import open_background
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.host import address_towards, host_id, why_not_own_address
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.cli.engines import (
    EngineChoice,
    TorchChoice,
    choose_engine,
    engine_options,
    open_engine,
)
from weightbus.cli.links import LINKS_FILE, read_links
from weightbus.cli.options import p2p_options
from weightbus.cli.outage import tell_outages
from weightbus.cli.sizes import read_size
from weightbus.cli.until import open_stop
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.planning.staging import MIB, StagingLimits
from weightbus.consumers.service import open_consumer
from weightbus.consumers.transfer.compose import open_routes
from weightbus.schemas.base import RouteName, Token
from weightbus.schemas.placement import HostId
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import CommitPolicy
from weightbus.tracing.narration import narrate
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import open_telemetry
from weightbus.tracing.text import counted

__all__ = ("command",)


LOOPBACK = "127.0.0.1"
"""Where nobody but this host reaches it: a bus of its own serves no other."""


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for: the command line and the environment, read once."""

    bus: BusSettings
    consumer: ConsumerConfig
    required: tuple[RouteName, ...]
    """Routes that were asked for by name."""
    otlp: OtlpSettings | None
    engine: EngineChoice
    engine_dir: Path | None
    """Of the engine's sockets; None: a new one, removed at the end."""


def _own_address(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value is not None and (reason := why_not_own_address(value)):
        raise click.BadParameter(f"{value!r} must be an address of this host: {reason}")
    return value


def _host_id(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return msgspec.convert(value, HostId | None)
    except msgspec.ValidationError:
        raise click.BadParameter(
            f"{value!r} is not 1 to 128 of the characters A-Z a-z 0-9 _ . : -"
        ) from None


def _token(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        return msgspec.convert(value, Token)
    except msgspec.ValidationError:
        raise click.BadParameter(
            f"{value!r} is not 1 to 64 of the characters A-Z a-z 0-9 _ -"
        ) from None


def _staging(context: click.Context, parameter: click.Parameter, value: str) -> int:
    size, least = read_size(context, parameter, value), StagingLimits().min_bucket_bytes
    if 0 < size < least:
        raise click.BadParameter(f"{value} must be {least // MIB}MiB at least: one slot takes it")
    return size


@click.command()
@click.option("--model", required=True, callback=_token, help="Model whose versions to follow.")
@click.option(
    "--engine-id", required=True, callback=_token, help="Id of the engine, unique for the model."
)
@click.option(
    "--nats", "nats_url", help="NATS URL; else WEIGHTBUS_NATS_URL, else a bus of its own."
)
@engine_options
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Directory below which files may be read; without one no checkpoint of files is taken.",
)
@click.option(
    "--route",
    "routes",
    multiple=True,
    type=click.Choice(["local", "broadcast", "p2p"]),
    envvar="WEIGHTBUS_ROUTE",
    help="Allow this route; may be repeated. Broadcast needs local or p2p beside it: by it alone "
    "no engine gets its first version.  [default: all]",
)
@click.option(
    "--address",
    callback=_own_address,
    envvar="WEIGHTBUS_ADDRESS",
    help="Where other hosts reach this one, for broadcast and p2p.  [default: the address of this "
    "host towards NATS]",
)
@p2p_options
@click.option(
    "--keep-copy",
    is_flag=True,
    envvar="WEIGHTBUS_KEEP_COPY",
    help="Hold a whole copy of each version, and offer it to engines that come later.",
)
@click.option(
    "--staging-bytes",
    default="0",
    metavar="SIZE",
    callback=_staging,
    envvar="WEIGHTBUS_STAGING_BYTES",
    help="Most memory for staging, such as 512MiB.  [default: a share of what is free]",
)
@click.option(
    "--links",
    "links_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="WEIGHTBUS_LINKS",
    help="Rates of this host, as `weightbus doctor --output` has written them.  [default: "
    f"{LINKS_FILE}, if it exists]",
)
@click.option(
    "--commit", type=click.Choice(["each", "together"]), default="each", show_default=True
)
@click.option(
    "--join-window",
    type=click.FloatRange(min=0),
    default=0.2,
    show_default=True,
    help="Seconds that a leader waits for the others.",
)
@click.option(
    "--host-id",
    "host",
    callback=_host_id,
    help="Instead of this host's: hosts of one id share memory.",
)
def command(
    model: str,
    engine_id: str,
    nats_url: str | None,
    roots: Sequence[str],
    routes: Sequence[Any],
    address: str | None,
    p2p_protocol: str,
    p2p_device: str,
    keep_copy: bool,
    staging_bytes: int,
    links_file: Path | None,
    commit: CommitPolicy,
    join_window: float,
    host: str | None,
    **engine: Any,
) -> None:
    """Keep an inference engine on the newest version of a model.

    The consumer hears of new versions, negotiates with the others how the bytes travel, moves them
    into the engine's live parameters, proves them by their digest, and reports every stage. It runs
    until SIGINT or SIGTERM. An engine that it started ends with it; one that ran before goes on.

    What is the same for all engines of a host can be in the environment: WEIGHTBUS_ROUTE (several:
    with spaces), WEIGHTBUS_ADDRESS, WEIGHTBUS_P2P_PROTOCOL, WEIGHTBUS_P2P_DEVICE,
    WEIGHTBUS_KEEP_COPY, WEIGHTBUS_STAGING_BYTES and WEIGHTBUS_LINKS. The API key of the engine's
    server is there and nowhere else: WEIGHTBUS_ENGINE_KEY.
    """
    choice = choose_engine(click.get_current_context(), engine, os.environ)
    if set(routes) == {"broadcast"}:
        raise click.UsageError(
            "--route broadcast needs --route local or --route p2p beside it: by it alone no engine "
            "gets its first version"
        )
    bus = BusSettings.from_env(os.environ)
    url = nats_url or bus.url
    options = Options(
        bus=msgspec.structs.replace(bus, url=url, name=f"consumer-{engine_id}"),
        consumer=ConsumerConfig(
            model=model,
            engine=engine_id,
            host_id=host if host is not None else host_id(),
            file_roots=tuple(roots),
            routes=tuple(routes) or ("local", "broadcast", "p2p"),
            address=address or (address_towards(url) if url else LOOPBACK),
            p2p_protocol=p2p_protocol,
            p2p_device=p2p_device,
            keep_copy=keep_copy,
            staging_bytes=staging_bytes,
            links=read_links(links_file),
            commit=commit,
            join_window_s=join_window,
        ),
        required=tuple(routes),
        otlp=OtlpSettings.from_env(os.environ),
        engine_dir=engine["engine_dir"],
        engine=choice,
    )
    anyio.run(run_consumer, options)


async def run_consumer(options: Options) -> None:
    """One consumer, from its parts, until SIGINT or SIGTERM."""
    config = options.consumer
    async with open_stop() as stop, AsyncExitStack() as stack:
        directory = options.engine_dir or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="weightbus-engine-"))
        )
        bus = await stack.enter_async_context(open_bus(options.bus))
        if options.bus.url is None:
            click.echo(
                "no --nats and no WEIGHTBUS_NATS_URL: this bus is private to this process, others "
                f"join it by {bus.url}"
            )
        telemetry = stack.enter_context(
            open_telemetry(
                "weightbus-consumer",
                otlp=options.otlp,
                resource={"weightbus.engine": config.engine},
            )
        )
        if telemetry.metrics_url:
            click.echo(f"Prometheus reads metrics at {telemetry.metrics_url}")
        if not isinstance(options.engine, TorchChoice):
            click.echo(f"engine {config.engine}: waiting for the server at {options.engine.url}")
        engine = await stack.enter_async_context(
            open_engine(options.engine, directory, roots=config.file_roots, host_id=config.host_id)
        )
        opened = open_routes(config, bus, options.required)
        routes = await stack.enter_async_context(opened)
        tasks = await stack.enter_async_context(open_background())
        async with open_consumer(
            config, bus=bus, engine=engine, routes=routes, telemetry=telemetry
        ):
            ranks = counted(engine.ranks, "rank")
            click.echo(
                f"engine {config.engine} ({ranks}) follows {config.model} on "
                f"{bus.url}; its sockets are in {directory}"
            )
            await tasks.start(_tell, bus, config)
            tasks.start_soon(tell_outages, bus, lambda lost: click.echo(lost or "bus is back"))
            await stop.wait()


async def _tell(
    bus: Bus, config: ConsumerConfig, *, task_status: anyio.abc.TaskStatus[None]
) -> None:
    """One line for every update of this engine, and for every one that failed."""
    async with bus.subscribe(UpdateComplete, UpdateFailed, model=config.model) as updates:
        task_status.started()
        async for heard in updates:
            if not isinstance(heard, Received):
                continue
            match heard.message:
                case UpdateComplete() | UpdateFailed() as update if update.engine == config.engine:
                    click.echo(narrate(update))

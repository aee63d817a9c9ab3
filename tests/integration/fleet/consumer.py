"""A consumer process for tests that kill it: as `weightbus consume`, but it can be held.

Its one argument is JSON (`Arguments`). Reports on stdout, one word per line: `following` once it
is, and the moment it is held at when it is there. SIGUSR1 lets it go on; SIGTERM, or the end of
stdin, ends it in order.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import anyio
import msgspec
from msgspec import Struct

from tests.integration.fleet.held import HeldEngine, Hold, Moment
from tests.integration.fleet.reports import take_stdout
from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.cli.until import until_stopped
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.service import open_consumer
from weightbus.consumers.transfer.compose import open_routes
from weightbus.tracing.telemetry import Telemetry

__all__ = ("FOLLOWING", "Arguments")

FOLLOWING = "following"


class Arguments(Struct, frozen=True, kw_only=True):
    url: str
    presence_ttl_s: int
    config: ConsumerConfig
    directory: str
    """Of the engine's sockets."""
    hold: Moment | None = None
    """Where the engine is held, the first time it comes there."""


async def main(arguments: Arguments) -> None:
    config = arguments.config
    settings = BusSettings(url=arguments.url, presence_ttl_s=arguments.presence_ttl_s)
    async with (
        open_bus(settings) as bus,
        open_torch_engine(
            Path(arguments.directory), roots=config.file_roots, host_id=config.host_id
        ) as torch_engine,
        open_routes(config, bus) as routes,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_stop_with_tests)
        engine = HeldEngine(torch_engine)
        if arguments.hold is not None:
            tasks.start_soon(_run_hold, engine.hold(arguments.hold))
        async with open_consumer(
            config,
            bus=bus,
            engine=engine,
            routes=routes,
            telemetry=Telemetry(),
        ):
            _say(FOLLOWING)
            await until_stopped()
        tasks.cancel_scope.cancel()


async def _stop_with_tests() -> None:
    """Nobody writes to stdin: it can be read once its other end is gone."""
    await anyio.wait_readable(sys.stdin)
    signal.raise_signal(signal.SIGTERM)


async def _run_hold(hold: Hold) -> None:
    await hold.reached.wait()
    with anyio.open_signal_receiver(signal.SIGUSR1) as signals:
        _say(hold.moment)
        async for _ in signals:
            hold.release()


def _say(word: str) -> None:
    REPORTS.write(word + "\n")


if __name__ == "__main__":
    REPORTS = take_stdout()
    anyio.run(main, msgspec.json.decode(sys.argv[1], type=Arguments))

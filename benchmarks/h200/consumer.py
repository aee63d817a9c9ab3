"""A consumer process: `weightbus consume` beside an engine that runs; its argument is JSON.

    python -m benchmarks.h200.consumer ARGUMENTS

Without `digest` its engine, a torch engine, is told to digest nothing, so that the digest's cost
can be measured. That can only go with versions that offer none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import msgspec
from msgspec import Struct, structs

from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.cli.consume import Options, run_consumer
from weightbus.cli.engines import EngineChoice, TorchChoice, VllmChoice
from weightbus.cli.until import until_stopped
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.engine import Engine, EngineReport
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.engines.vllm.engine import VllmSettings
from weightbus.consumers.service import open_consumer
from weightbus.consumers.transfer.compose import open_routes
from weightbus.schemas.worker import Applied, Attached, Cell, Described, Feed, Inspected, Prepared
from weightbus.tracing.telemetry import Telemetry

__all__ = ("Arguments",)

SUM_BYTES = 8


class Arguments(Struct, frozen=True, kw_only=True):
    url: str
    config: ConsumerConfig
    directory: str
    """Of the engine's sockets."""
    server: str = ""
    """URL of the vLLM server that the engine is; empty: it is a torch engine."""
    digest: bool = True


async def main(arguments: Arguments) -> None:
    config = arguments.config
    settings = BusSettings(url=arguments.url, name=f"consumer-{config.engine}")
    if arguments.digest:
        options = Options(
            bus=settings,
            consumer=config,
            required=(),
            otlp=None,
            engine=_engine(arguments.server),
            engine_dir=Path(arguments.directory),
        )
        await run_consumer(options)
        return
    async with (
        open_bus(settings) as bus,
        open_torch_engine(Path(arguments.directory), host_id=config.host_id) as engine,
        open_routes(config, bus) as routes,
        open_consumer(
            config,
            bus=bus,
            engine=UndigestedEngine(engine),
            routes=routes,
            telemetry=Telemetry(),
        ),
    ):
        await until_stopped()


def _engine(server: str) -> EngineChoice:
    return VllmChoice(url=server, settings=VllmSettings()) if server else TorchChoice()


class UndigestedEngine(Engine):
    """See `Engine`; its workers digest nothing, and 0 is reported of every cell."""

    kind = "undigested"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cells: dict[str, list[int]] = {}

    @property
    def ranks(self) -> int:
        return self._engine.ranks

    async def describe(
        self, layout_digest: str, layout: bytes, deadline_s: float
    ) -> tuple[Described, ...]:
        return await self._engine.describe(layout_digest, layout, deadline_s)

    async def attach(
        self,
        layout_digest: str,
        needs_digests: Sequence[str],
        cells: Sequence[Sequence[Cell]],
        deadline_s: float,
    ) -> tuple[Attached, ...]:
        self._cells[layout_digest] = [len(of_rank) for of_rank in cells]
        none: list[Sequence[Cell]] = [()] * self.ranks
        return await self._engine.attach(layout_digest, needs_digests, none, deadline_s)

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        return await self._engine.prepare(layout_digest, feeds, deadline_s)

    async def pause(self, deadline_s: float) -> None:
        await self._engine.pause(deadline_s)

    async def apply(
        self, version: int, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Applied, ...]:
        applied = await self._engine.apply(version, layout_digest, feeds, deadline_s)
        cells = self._cells[layout_digest]
        return tuple(
            structs.replace(reply, cell_digests=bytes(SUM_BYTES * cells[reply.rank]))
            for reply in applied
        )

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        return await self._engine.inspect(layout_digest, deadline_s)

    async def resume(self, version: int, deadline_s: float) -> None:
        await self._engine.resume(version, deadline_s)

    async def state(self, deadline_s: float) -> EngineReport:
        return await self._engine.state(deadline_s)


if __name__ == "__main__":
    anyio.run(main, msgspec.json.decode(sys.argv[1], type=Arguments))

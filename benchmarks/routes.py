"""The rate of every route beside the limit of what it goes over, on one machine, in one run.

    python -m benchmarks.routes [--gib 2] [--runs 5] [--output benchmarks/results/routes.json]

One version of about 2,000 tensors is brought, again and again, to engines in processes of their
own: `local` from shared memory, `p2p` from another process through the transfer engine, `broadcast`
to two and to three virtual hosts from files in memory, so that nothing but the group is measured.
Limits, taken in turns with the routes: one memcpy, one read of one region by the bare transfer
engine, one broadcast of one tensor by a bare gloo group. A route is timed from its call to the last
rank's answer, without and with the digest that proves the update. Needs the extras `embedded`,
`torch` and `p2p-cpu`, 6 x the bytes in memory and 3 x in /dev/shm.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.limits import RunLimit, broadcast_limit, child, memcpy_limit, read_limit
from benchmarks.models import layout_of
from benchmarks.planning import RESULTS, machine
from benchmarks.transport import (
    LOOPBACK,
    Source,
    SourceReady,
)
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.host import host_id
from weightbus.bus.settings import BusSettings
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.torch.engine import TorchEngine, open_torch_engine
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.transfer.compose import open_routes
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.schemas.base import RouteName
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import encode_layout, layout_digest
from weightbus.schemas.placement import (
    FileSegment,
    Placement,
    RemoteSegment,
    SharedMemorySegment,
)
from weightbus.schemas.rounds import EngineRoute, Group, Member, RankRoute, RoundPlan
from weightbus.schemas.worker import Cell

PACKAGES = ("weightbus", "torch", "numpy", "mooncake-transfer-engine-non-cuda")
MODEL = "benchmark"
DEADLINE_S = 300.0
LAYERS_PER_GIB = 5
"""Of 200 tensors and 0.2 GiB each."""
SLOTS = 3
BUCKET_BYTES = 64 * 2**20
"""As the planner chooses them for a version of this size where there is room."""


ROUTES: dict[str, tuple[RouteName, int]] = {
    "local": ("local", 1),
    "p2p": ("p2p", 1),
    "broadcast to 2 hosts": ("broadcast", 2),
    "broadcast to 3 hosts": ("broadcast", 3),
}


TARGETS = {"local": 0.8, "broadcast": 0.8, "p2p": 0.85}
"""Share of its limit that a route is to reach."""


class Options(msgspec.Struct, frozen=True):
    """What was asked for."""

    config: dict[str, Any]
    runs: int
    directory: Path


@dataclass
class Series:
    """Seconds of one thing, run after run."""

    name: str
    what: str
    seconds: list[float] = field(default_factory=list)


@dataclass(kw_only=True)
class Checkpoint:
    """What is brought."""

    layout: Layout
    digest: str
    blob: bytes
    ways: SharedMemorySegment
    remote: RemoteSegment
    file: FileSegment

    @property
    def size_bytes(self) -> int:
        return self.layout.segments[0].size_bytes


def configuration(gib: float) -> dict[str, Any]:
    """A mixture of experts whose tensors are of 1 MiB, nearly all."""
    return {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": max(1, round(gib * LAYERS_PER_GIB)),
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 1024,
        "num_experts": 65,
        "dtype": "BF16",
    }


def layout_of_model(config: dict[str, Any]) -> Layout:
    with torch.device("meta"):
        tensors = build_model("decoder", config).checkpoint_tensors()
    return layout_of(((name, "BF16", tuple(t.shape)) for name, t in tensors.items()), 1)


@contextmanager
def checkpoint_of(config: dict[str, Any], directory: Path) -> Iterator[Checkpoint]:
    """One version: in a process that offers it, and as a file in memory."""
    layout = layout_of_model(config)
    source = Source(f"weightbus-{MODEL}.source", layout.segments[0].size_bytes, seed=1)
    with child("source", source) as process:
        assert process.stdout is not None
        ready = msgspec.json.decode(process.stdout.readline(), type=SourceReady)
        path = directory / "checkpoint"
        with Path("/dev/shm", source.block).open("rb") as block, path.open("wb") as copy:
            block.seek(4096)
            while part := block.read(2**26):
                copy.write(part)
        yield Checkpoint(
            layout=layout,
            digest=layout_digest(layout),
            blob=encode_layout(layout),
            ways=SharedMemorySegment(
                name=source.block, host_id=host_id(), generation=ready.generation
            ),
            remote=RemoteSegment(
                protocol="tcp",
                session=ready.session,
                address=ready.address,
                generation=ready.generation,
            ),
            file=FileSegment(path=str(path)),
        )


class Follower:
    """An engine, and one route that brings it the checkpoint."""

    def __init__(
        self, name: str, engine: TorchEngine, route: Route, checkpoint: Checkpoint, way: Placement
    ) -> None:
        self.name, self.engine, self.route = name, engine, route
        self._checkpoint, self._way = checkpoint, way
        self._version = 0

    async def attach(self, *, digest: bool) -> None:
        """The engine reports the digest of every byte, or of none."""
        checkpoint = self._checkpoint
        described = await self.engine.describe(checkpoint.digest, checkpoint.blob, DEADLINE_S)
        cells: Sequence[Sequence[Cell]] = [()] * self.engine.ranks
        if digest:
            needs = tuple(rank.needs for rank in described)
            cells = plan_cells(checkpoint.layout, needs).cells
        digests = tuple(rank.needs_digest for rank in described)
        await self.engine.attach(checkpoint.digest, digests, cells, DEADLINE_S)

    async def bring(self, plan: RoundPlan, *, proven: bool = True) -> None:
        self._version += 1

        async def pause() -> None:
            await self.engine.pause(DEADLINE_S)

        await self.route.transfer(
            Transfer(
                engine=self.engine,
                ranks=tuple(range(self.engine.ranks)),
                version=self._version,
                layout=self._checkpoint.layout,
                layout_digest=self._checkpoint.digest,
                placement=self._way,
                plan=plan,
                begin_write=pause,
                deadline_s=DEADLINE_S,
                proven=proven,
            )
        )


def plan_of(followers: Sequence[Follower], epoch: int) -> RoundPlan:
    """Everyone by their own route; those of `broadcast` are one group."""
    group = [one for one in followers if one.route.name == "broadcast"]
    lanes = (
        Group(
            id=f"benchmark-{len(group)}",
            members=tuple(Member(one.name, 0) for one in group),
            rendezvous=group[0].route.rendezvous,
        )
        for _ in group[:1]
    )
    return RoundPlan(
        model=MODEL,
        version=epoch,
        round=f"v{epoch}",
        epoch=epoch,
        leader=followers[0].name,
        engines=tuple(
            EngineRoute(
                engine=one.name,
                ranks=tuple(
                    RankRoute(rank=rank, route=one.route.name) for rank in range(one.engine.ranks)
                ),
            )
            for one in followers
        ),
        groups=tuple(lanes),
        bucket_bytes=BUCKET_BYTES,
        slots=SLOTS,
    )


@asynccontextmanager
async def open_follower(
    name: str,
    route: RouteName,
    options: Options,
    checkpoint: Checkpoint,
    bus: Bus,
) -> AsyncIterator[Follower]:
    """An engine of one rank on a host of its own, or on this one if the route is local."""
    way: Placement
    if route == "local":
        way = ((checkpoint.ways,),)
    elif route == "p2p":
        way = ((checkpoint.remote,),)
    else:
        way = ((checkpoint.file,),)
    host = host_id() if route == "local" else f"host-{name}"
    settings = ConsumerConfig(
        model=MODEL,
        engine=name,
        host_id=host,
        file_roots=(str(options.directory),),
        routes=(route,),
        address=LOOPBACK,
    )
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            open_torch_engine(
                options.directory / name,
                spawn=TorchEngineSpec(architecture="decoder", config=options.config),
                roots=settings.file_roots,
                host_id=host,
            )
        )
        (made,) = await stack.enter_async_context(open_routes(settings, bus, (route,)))
        yield Follower(name, engine, made, checkpoint, way)


class Bench:
    """The followers of one route, and their limit."""

    def __init__(
        self, name: str, followers: Sequence[Follower], limit: str, run_limit: RunLimit
    ) -> None:
        self.limit = Series(limit, "limit")
        self.moved = Series(name, "without digest")
        self.proven = Series(name, "with digest")
        self._followers, self._run_limit = followers, run_limit
        self._epoch = 0

    async def first(self) -> None:
        """The first version, through the engine's own loader, and one to warm up."""
        for proven in (False, True):
            for follower in self._followers:
                await follower.attach(digest=False)
            await self._bring(proven=proven)

    async def run(self) -> None:
        """Everything once, in turns. What was attached anew is planned in a run that is not timed:
        a consumer attaches a layout once, not with every version."""
        self.limit.seconds.append(await anyio.to_thread.run_sync(self._run_limit))
        for series, digest in ((self.moved, False), (self.proven, True)):
            for follower in self._followers:
                await follower.attach(digest=digest)
            await self._bring(proven=True)
            series.seconds.append(await self._bring(proven=True))

    async def _bring(self, *, proven: bool) -> float:
        self._epoch += 1
        plan = plan_of(self._followers, self._epoch)
        start = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for follower in self._followers:
                tasks.start_soon(_bring, follower, plan, proven)
        return time.perf_counter() - start


async def _bring(follower: Follower, plan: RoundPlan, proven: bool) -> None:
    await follower.bring(plan, proven=proven)


async def measure(name: str, options: Options, checkpoint: Checkpoint, bus: Bus) -> list[Series]:
    """One route; its engines and its limit live no longer than this."""
    route, hosts = ROUTES[name]
    size_bytes = checkpoint.size_bytes
    async with AsyncExitStack() as stack:
        limit: str
        opening: AbstractContextManager[RunLimit]
        match route:
            case "local":
                limit, opening = "one memcpy", nullcontext(memcpy_limit(size_bytes))
            case "p2p":
                limit, opening = "one bare read", read_limit(checkpoint.remote, size_bytes)
            case _:
                limit = f"one bare broadcast to {hosts} processes"
                opening = broadcast_limit(hosts, size_bytes, options.runs + 1)
        run_limit = stack.enter_context(opening)
        slug = name.replace(" ", "-")
        followers = [
            await stack.enter_async_context(
                open_follower(f"{slug}-{number}", route, options, checkpoint, bus)
            )
            for number in range(hosts)
        ]
        bench = Bench(name, followers, limit, run_limit)
        await anyio.to_thread.run_sync(run_limit)
        await bench.first()
        for _ in range(options.runs):
            await bench.run()
    return [bench.limit, bench.moved, bench.proven]


async def measure_all(names: Sequence[str], gib: float, runs: int) -> dict[str, Any]:
    config = configuration(gib)
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="weightbus-benchmark-", dir="/dev/shm") as place:
        directory = Path(place)
        with checkpoint_of(config, directory) as checkpoint:
            layout = checkpoint.layout
            size_bytes = sum(
                DTYPE_BYTES[tensor.dtype] * int(np.prod(tensor.shape)) for tensor in layout.tensors
            )
            async with open_bus(BusSettings()) as bus:
                for name in names:
                    options = Options(config, runs, directory)
                    series = await measure(name, options, checkpoint, bus)
                    figures.append(figure_of(name, series, size_bytes))
                    print_table(figures[-1:])
    return {"bytes": size_bytes, "tensors": len(layout.tensors), "routes": figures}


def figure_of(name: str, series: Sequence[Series], size_bytes: int) -> dict[str, Any]:
    """Rates by the median of the runs; shares are medians of the ratios within a run."""
    limit, moved, proven = series
    return {
        "route": name,
        "limit": limit.name,
        **{
            f"{key}_bytes_per_s": round(size_bytes / median(one.seconds))
            for key, one in (("limit", limit), ("route", moved), ("with_digest", proven))
        },
        **{
            f"{key}_s": [round(seconds, 4) for seconds in one.seconds]
            for key, one in (("limit", limit), ("route", moved), ("with_digest", proven))
        },
        "share": round(share_of(limit, moved), 3),
        "share_with_digest": round(share_of(limit, proven), 3),
        "target": TARGETS[ROUTES[name][0]],
    }


def share_of(limit: Series, route: Series) -> float:
    return median(a / b for a, b in zip(limit.seconds, route.seconds, strict=True))


def print_table(figures: Sequence[dict[str, Any]]) -> None:
    table = Table("route", "limit", "GB/s", "route GB/s", "share", "target", "with digest")
    for figure in figures:
        table.add_row(
            figure["route"],
            figure["limit"],
            f"{figure['limit_bytes_per_s'] / 1e9:.2f}",
            f"{figure['route_bytes_per_s'] / 1e9:.2f}",
            f"{figure['share']:.0%}",
            f"{figure['target']:.0%}",
            f"{figure['share_with_digest']:.0%}",
            style=None if figure["share"] >= figure["target"] else "red",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the routes.")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--route", action="append", choices=list(ROUTES))
    parser.add_argument("--output", type=Path, default=RESULTS / "routes.json")
    arguments = parser.parse_args()
    where = machine()
    names = arguments.route or list(ROUTES)
    figures = anyio.run(measure_all, names, arguments.gib, arguments.runs)
    report = {
        "machine": where,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "command": f"python -m benchmarks.routes --gib {arguments.gib:g} --runs {arguments.runs}",
        **figures,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

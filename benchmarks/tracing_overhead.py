"""What tracing costs an update: on against off, in turns, in one run.

    python -m benchmarks.tracing_overhead [--pairs 40] [--mib 256] [--output FILE]

A bus of its own, and two torch engines in processes of their own, each with a model, a trainer and
a consumer. One of the two exports spans and metrics by OTLP to a collector, a process on this
machine, the other exports nothing; both say their stages on the bus, as they always do. In every
pair each takes one version, in an order that is drawn; at half time the two change roles, so that
none is faster by its place in memory. The figures are medians of the pairs' ratios, with 95 %
intervals of their bootstrap:

- `local`: read in place from shared memory, no buckets;
- `streamed`: by the transfer engine through staging of 16 MiB, in small buckets (`bucket_bytes`),
  each with its timings, and its span where there is tracing;
- `update`: from when the consumer heard of the version until the engine serves it;
- `whole`: from the trainer's call to that word on the bus;
- `loop`: what tracing adds to the processor time of the thread that runs trainer and consumer, from
  the call to that word, and its share of an update: the part that an update can wait for, and a
  figure that other programs disturb less;
- `buckets`: memory blocks that remain of a bucket's timing, what it takes to hand it to the thread
  that makes its span, and what making it takes that thread;
- `fastest_ratio`: of the medians of the fastest quarters, which other programs disturb least.

Metrics are sent every 5 s, twelve times as often as is usual. Needs the extras `embedded`, `torch`,
`otlp` and `p2p-cpu`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, Final

import anyio
import numpy as np
import numpy.typing as npt
import torch
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from rich.console import Console
from rich.table import Table

from benchmarks.planning import RESULTS, machine
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.endpoint import P2pOptions
from weightbus.bus.host import host_id
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.torch.engine import TorchEngine, open_torch_engine
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.service import open_consumer
from weightbus.consumers.transfer.compose import open_routes
from weightbus.consumers.transfer.timing import BUCKETS_KEPT, Timing
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.schemas.base import BucketTiming, RouteName
from weightbus.schemas.progress import StageComplete, UpdateComplete, UpdateFailed
from weightbus.tracing.attributes import BUCKET
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import StageScope, Telemetry, open_telemetry

PACKAGES: Final = ("weightbus", "torch", "opentelemetry-sdk", "mooncake-transfer-engine-non-cuda")
LOOPBACK: Final = "127.0.0.1"
TARGET: Final = 1.01
"""Of the median ratio of update times, with tracing and without."""
MIB: Final = 2**20
STAGING_BYTES: Final = 16 * MIB
DEADLINE_S: Final = 120.0
WARM_UPS: Final = 3
"""Versions of each side after every change of roles, not counted: the first is proven by the
engine's own loader."""
RESAMPLES: Final = 10_000
METRICS_EVERY_MS: Final = 5_000
SPANS_MADE: Final = 1_000
KEPT_BYTES: Final = 1024
"""Of a bucket in the count of allocations."""


@dataclass
class Side:
    """One engine with its trainer, in one role."""

    model: str
    publisher: Publisher
    bus: Bus
    tensors: Mapping[str, torch.Tensor]
    version: int

    async def update(self) -> tuple[float, float, float, list[int]]:
        """The next version: seconds of the update, of the whole, and of this thread's processor
        time, and the bytes of the buckets that it took.

        Raises:
            RuntimeError: it failed.
        """
        self.version += 1
        buckets: list[int] = []
        async with self.bus.subscribe(
            UpdateComplete, UpdateFailed, StageComplete, model=self.model
        ) as messages:
            start, cpu_start = time.perf_counter(), time.thread_time()
            await self.publisher.publish(self.tensors, self.version)
            with anyio.fail_after(DEADLINE_S):
                async for heard in messages:
                    if not isinstance(heard, Received) or heard.message.version != self.version:
                        continue
                    match heard.message:
                        case StageComplete() as stage:
                            buckets += [bucket.bytes for bucket in stage.buckets]
                        case UpdateFailed() as failed:
                            raise RuntimeError(f"{failed.cause}: {failed.reason}")
                        case UpdateComplete() as done:
                            whole_s = time.perf_counter() - start
                            cpu_s = time.thread_time() - cpu_start
                            return (done.end_ns - done.start_ns) / 1e9, whole_s, cpu_s, buckets
        raise RuntimeError("the bus has ended")


@dataclass
class Figures:
    """Of one case, pair by pair; seconds."""

    update: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    whole: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    loop: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    buckets: int = 0
    """Of one update, in all its stages."""
    bucket_bytes: int = 0


# ---------------------------------------------------------------- the collector


def run_collector() -> None:
    """Takes what comes, and decodes nothing before the end: says its URL at first, and what came
    once its stdin ends."""
    bodies: list[bytes] = []
    of_metrics: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                bodies.append(body)
            else:
                of_metrics.append(len(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps(f"http://{LOOPBACK}:{server.server_port}"), flush=True)
    sys.stdin.read()
    requests = [ExportTraceServiceRequest.FromString(body) for body in bodies]  # type: ignore[no-untyped-call]
    spans = sum(
        len(scope.spans)
        for request in requests
        for group in request.resource_spans
        for scope in group.scope_spans
    )
    sent = {"spans": spans, "span_exports": len(bodies), "span_bytes": sum(map(len, bodies))}
    print(json.dumps({**sent, "metric_exports": len(of_metrics), "metric_bytes": sum(of_metrics)}))


@contextmanager
def collector() -> Iterator[tuple[str, dict[str, int]]]:
    """Its URL, and what came to it, which is there once this is left."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.tracing_overhead", "--collector"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        came: dict[str, int] = {}
        try:
            yield json.loads(process.stdout.readline()), came
        finally:
            process.stdin.close()
            came.update(json.loads(process.stdout.readline()))


# ---------------------------------------------------------------- the two sides


def configuration(mib: int) -> dict[str, Any]:
    """A decoder of about so many MiB in BF16, with tensors of 1 to 2 MiB."""
    return {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": max(1, mib // 8),
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 1024,
        "dtype": "BF16",
    }


def tensors_of(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = build_model("decoder", dict(config)).checkpoint_tensors()
    return {
        name: torch.randn(each.shape, generator=generator).to(torch.bfloat16)
        for name, each in shapes.items()
    }


@dataclass(kw_only=True)
class Case:
    """One route, two engines."""

    route: RouteName
    bus: Bus
    engines: Sequence[TorchEngine]
    tensors: Mapping[str, torch.Tensor]
    directory: Path
    versions: list[int] = field(default_factory=lambda: [0, 0])
    """Of each engine's model, so far."""

    @asynccontextmanager
    async def sides(self, traced: int, telemetry: Telemetry) -> AsyncIterator[list[Side]]:
        """Both engines followed; that of number `traced` with tracing."""
        async with AsyncExitStack() as stack:
            sides = []
            for number, engine in enumerate(self.engines):
                told = telemetry if number == traced else Telemetry()
                sides.append(await self._open(stack, number, engine, told))
            yield sides
            self.versions = [side.version for side in sides]

    async def _open(
        self, stack: AsyncExitStack, number: int, engine: TorchEngine, telemetry: Telemetry
    ) -> Side:
        model, is_p2p = f"tracing-{self.route}-{number}", self.route == "p2p"
        config = ConsumerConfig(
            model=model,
            engine=f"e{number}",
            host_id=engine_host(self.route, number),
            file_roots=(str(self.directory),),
            routes=(self.route,),
            address=LOOPBACK,
            staging_bytes=STAGING_BYTES if is_p2p else 0,
        )
        options = PublisherOptions(
            linger_s=0.0, close_wait_s=5.0, p2p=P2pOptions(address=LOOPBACK) if is_p2p else None
        )
        routes = await stack.enter_async_context(open_routes(config, self.bus, (self.route,)))
        await stack.enter_async_context(
            open_consumer(config, bus=self.bus, engine=engine, routes=routes, telemetry=telemetry)
        )
        publisher = await stack.enter_async_context(
            open_publisher(self.bus, model, telemetry=telemetry, options=options)
        )
        return Side(model, publisher, self.bus, self.tensors, self.versions[number])


def engine_host(route: RouteName, number: int) -> str:
    """What is streamed goes to another host, as far as anyone can tell."""
    return f"host-{number}" if route == "p2p" else host_id()


async def measure_case(
    route: RouteName, bus: Bus, pairs: int, mib: int, telemetry: Telemetry
) -> Figures:
    config, figures, order = configuration(mib), Figures(), random.Random(0)
    with tempfile.TemporaryDirectory(prefix="wb-") as place:
        directory = Path(place)
        async with AsyncExitStack() as stack:
            engines = [
                await stack.enter_async_context(
                    open_torch_engine(
                        directory / f"{number}",
                        spawn=TorchEngineSpec(architecture="decoder", config=config),
                        roots=(str(directory),),
                        host_id=engine_host(route, number),
                    )
                )
                for number in range(2)
            ]
            case = Case(
                route=route,
                bus=bus,
                engines=engines,
                tensors=tensors_of(config),
                directory=directory,
            )
            for traced in range(2):
                async with case.sides(traced, telemetry) as sides:
                    await run_half(sides, traced, pairs // 2, figures, order)
    return figures


async def run_half(
    sides: Sequence[Side], traced: int, pairs: int, figures: Figures, order: random.Random
) -> None:
    for pair in range(-WARM_UPS, pairs):
        for number in order.sample(range(2), 2):
            update_s, whole_s, cpu_s, buckets = await sides[number].update()
            if pair >= 0:
                figures.loop[number == traced].append(cpu_s)
                figures.update[number == traced].append(update_s)
                figures.whole[number == traced].append(whole_s)
                figures.buckets = max(figures.buckets, len(buckets))
                figures.bucket_bytes = max((figures.bucket_bytes, *buckets))


# ---------------------------------------------------------------- buckets


def measure_buckets(telemetry: Telemetry) -> dict[str, float]:
    """What remains in memory of a bucket's timing, and what its span costs the consumer."""
    timing = Timing()
    timing.add(time.time_ns(), KEPT_BYTES)
    timed = range(BUCKETS_KEPT - 1)
    gc.collect()
    gc.disable()
    try:
        before, start = sys.getallocatedblocks(), time.perf_counter()
        for _ in timed:
            timing.add(time.time_ns(), KEPT_BYTES)
        timed_s, after = time.perf_counter() - start, sys.getallocatedblocks()
    finally:
        gc.enable()
    now_ns = time.time_ns()
    buckets = tuple(BucketTiming(now_ns + n, now_ns + n + 1, KEPT_BYTES) for n in range(SPANS_MADE))
    scope = StageScope("m", 1, "v1", "e")
    stage = telemetry.record_stage(
        lambda twin: None, scope, "fetch", start_ns=now_ns, end_ns=now_ns
    )
    start = time.thread_time()
    telemetry.record_buckets(stage, scope, 0, buckets)
    handed_s = (time.thread_time() - start) / SPANS_MADE
    start = time.thread_time()
    for number in range(SPANS_MADE):
        telemetry.record_span(
            "bucket", start_ns=now_ns, end_ns=now_ns, parent=stage, attributes={BUCKET: number}
        )
    span_s = (time.thread_time() - start) / SPANS_MADE
    return {
        "blocks_per_bucket": (after - before) / len(timed),
        "timing_us_per_bucket": round(timed_s / len(timed) * 1e6, 3),
        "handed_us_per_bucket": round(handed_s * 1e6, 3),
        "span_us_per_bucket": round(span_s * 1e6, 1),
    }


# ---------------------------------------------------------------- figures


def ratio_of(times: Mapping[bool, Sequence[float]]) -> dict[str, Any]:
    """The median of the pairs' ratios, with a 95 % interval of its bootstrap."""
    ratios = np.asarray(times[True]) / np.asarray(times[False])
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "interval": interval_of(ratios, 4),
        "fastest_ratio": round(fastest(times[True]) / fastest(times[False]), 4),
        "on_s": round(median(times[True]), 4),
        "off_s": round(median(times[False]), 4),
    }


def added_of(times: Mapping[bool, Sequence[float]], update_s: float) -> dict[str, Any]:
    """The median of the pairs' differences, and what share of an update that is."""
    added = np.asarray(times[True]) - np.asarray(times[False])
    return {
        "added_s": round(float(np.median(added)), 5),
        "interval_s": interval_of(added, 5),
        "on_s": round(median(times[True]), 5),
        "off_s": round(median(times[False]), 5),
        "share_of_update": round(float(np.median(added)) / update_s, 4),
    }


def fastest(times: Sequence[float]) -> float:
    return median(sorted(times)[: max(1, len(times) // 4)])


def interval_of(found: npt.NDArray[np.float64], digits: int) -> list[float]:
    draws = np.random.default_rng(0).choice(found, (RESAMPLES, len(found)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return [round(float(low), digits), round(float(high), digits)]


def measure(pairs: int, mib: int) -> dict[str, Any]:
    """Everything, and what came to the collector."""
    cases: list[dict[str, Any]] = []
    with collector() as (url, came), ExitStack() as stack:
        otlp = OtlpSettings(endpoint=f"{url}/v1/traces", metrics_endpoint=f"{url}/v1/metrics")
        telemetry = stack.enter_context(open_telemetry("benchmark", otlp=otlp, shutdown_s=30.0))

        async def run() -> None:
            async with open_bus(BusSettings()) as bus:
                for name, route in (("local", "local"), ("streamed", "p2p")):
                    figures = await measure_case(route, bus, pairs, mib, telemetry)
                    case: dict[str, Any] = {"case": name, "pairs": pairs // 2 * 2}
                    case["buckets"] = figures.buckets
                    case["bucket_bytes"] = figures.bucket_bytes
                    for what in ("update", "whole"):
                        times = getattr(figures, what)
                        case[what] = ratio_of(times) | {
                            "on": [round(each, 4) for each in times[True]],
                            "off": [round(each, 4) for each in times[False]],
                        }
                    case["loop"] = added_of(figures.loop, case["update"]["off_s"])
                    cases.append(case)

        anyio.run(run)
        buckets = measure_buckets(telemetry)
        stack.close()
        lost = telemetry.losses
    losses = {"spans": lost.total, "metric_exports": lost.metrics_refused}
    return {"cases": cases, "buckets": buckets, "collector": came, "lost": losses}


def print_table(figures: Mapping[str, Any]) -> None:
    table = Table("case", "what", "buckets", "off s", "on s", "ratio", "95 %", "fastest", "target")
    for case in figures["cases"]:
        for what in ("update", "whole"):
            found = case[what]
            low, high = found["interval"]
            table.add_row(
                case["case"],
                what,
                str(case["buckets"]),
                f"{found['off_s']:.4f}",
                f"{found['on_s']:.4f}",
                f"{found['ratio']:.4f}",
                f"{low:.4f} to {high:.4f}",
                f"{found['fastest_ratio']:.4f}",
                f"<= {TARGET}",
                style=None if found["ratio"] <= TARGET else "red",
            )
    console = Console()
    console.print(table)
    console.print({case["case"]: case["loop"] for case in figures["cases"]})
    console.print({key: figures[key] for key in ("buckets", "collector", "lost")})


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what tracing costs.")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULTS / "tracing_overhead.json")
    parser.add_argument("--collector", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.collector:
        run_collector()
        return
    os.environ["OTEL_METRIC_EXPORT_INTERVAL"] = str(METRICS_EVERY_MS)
    where, start = machine(), time.monotonic()
    figures = measure(given.pairs, given.mib)
    print_table(figures)
    report = {
        "machine": where,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "command": f"python -m benchmarks.tracing_overhead --pairs {given.pairs} --mib {given.mib}",
        "load_after": round(os.getloadavg()[0], 1),
        "took_s": round(time.monotonic() - start),
        "metrics_every_ms": METRICS_EVERY_MS,
        "target": TARGET,
        **figures,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

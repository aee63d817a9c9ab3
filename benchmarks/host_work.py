"""What the host does for one update of a GPU rank beside waiting for the GPU. Needs no GPU.

    python -m benchmarks.host_work [--ranks 2] [--segments 2]

Runs a rank's updates of Qwen3-30B-A3B as its worker does, with a device whose memory is the host's
and whose kernels do nothing: what is left is binding, checks, launches and digests.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks.models import layout_of, needs_of_qwen3_moe, qwen3_moe
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.planning.tiles import bind_tiles, plan_tiles
from weightbus.consumers.reload.accelerator import Accelerator
from weightbus.consumers.reload.gpu import GpuExecutor
from weightbus.consumers.reload.portions import cut_portions

RUNS = 21
UNITS = {1: 1024, 2: 1024, 4: 1024, 8: 1024}


class NoKernels:
    """Launches that do nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **named: None


class NoDevice(Accelerator):
    """Main memory, and no kernels."""

    device = torch.device("cpu")
    programs = 1056

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        yield

    def memory(self, address: int, size_bytes: int) -> torch.Tensor:
        raise AssertionError("nothing is transformed")

    def downloaded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def kernels(self) -> ModuleType:
        stand_in: Any = SimpleNamespace(gather=NoKernels(), BLOCK_UNITS=UNITS, WARPS=4)
        return cast(ModuleType, stand_in)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--segments", type=int, default=2)
    options = parser.parse_args()
    layout = layout_of(qwen3_moe(), options.segments)
    needs = [needs_of_qwen3_moe(layout, rank, options.ranks) for rank in range(options.ranks)]
    cells = plan_cells(layout, needs).cells[0]
    plan = plan_tiles(layout, needs[0])
    executor = GpuExecutor(layout, needs[0], cells, NoDevice())
    portions = cut_portions(plan, executor.portion_bytes)
    for portion in portions:
        executor.prepare(portion.plan)
    sizes = [segment.size_bytes for segment in layout.segments]
    segments = [(1 + number) << 40 for number in range(len(sizes))]
    ends = plan.parameter_ends.tolist()
    parameters = [(1 << 50) + (number << 32) for number in range(len(ends))]
    held = np.array([number for number, cell in enumerate(cells) if cell.copy >= 0])

    def update() -> float:
        start = time.perf_counter()
        for portion in portions:
            executor.update(bind_tiles(portion.plan, segments, sizes, parameters, ends), held)
        return time.perf_counter() - start

    update()
    taken = [1e3 * update() for _ in range(RUNS)]
    print(
        f"{plan.tiles.size:,} tiles, {len(cells):,} cells, {len(portions)} portions: "
        f"{median(taken):.2f} ms of the host ({min(taken):.2f} to {max(taken):.2f})"
    )


if __name__ == "__main__":
    main()

"""vLLM's own `reload_weights`, of files in shared memory, on the engine that the others update."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import anyio

from benchmarks.h200.fleet import Engines
from benchmarks.h200.ours import first_of
from benchmarks.h200.processes import BenchFailed
from benchmarks.h200.progress import say
from benchmarks.h200.report import Run, run_of
from benchmarks.vllm_h200.fleet import VllmFleet
from benchmarks.vllm_h200.load import Window

__all__ = ("RELOAD", "measure_reload")

RELOAD: Final = "vllm_reload"
RELOAD_S: Final = 120.0


async def measure_reload(
    fleet: VllmFleet,
    engines: Engines,
    folder: Path,
    version: int,
    windows: list[Window],
    size_bytes: int,
    repetitions: int,
    deadline_s: float,
    on_run: Callable[[Run], None],
) -> None:
    """A warm-up, then the repetitions; parameters are cleared before each. Never raises because of
    it: the row says why it has no figures.

    Args:
        folder: of files of `version`.
        windows: takes when requests waited.
    """
    seconds: list[float] = []
    paused: list[float] = []
    note = checked = ""

    def tell() -> None:
        said = "; ".join(filter(None, (note, checked)))
        on_run(run_of(RELOAD, seconds, size_bytes, {"paused_s": paused}, note=said))

    try:
        with anyio.move_on_after(deadline_s) as limit:
            await _reload(fleet, engines, folder, [])
            for _ in range(repetitions):
                took = await _reload(fleet, engines, folder, windows)
                await fleet.check(engines, version)
                seconds.append(took)
                paused.append((windows[-1].end_ns - windows[-1].begin_ns) / 1e9)
                checked = "every byte compared after every update"
                say(f"vLLM's own reload: {took:.4f} s")
                tell()
        if limit.cancelled_caught:
            note = f"ended after its {deadline_s:.0f} s"
    except* (BenchFailed, OSError) as failed:
        note = f"ended early: {first_of(failed)}"
    tell()
    if note:
        say(note)


async def _reload(fleet: VllmFleet, engines: Engines, folder: Path, windows: list[Window]) -> float:
    """How long vLLM took, pausing left out."""
    (engine,) = engines.setups
    await fleet.clear(engines)
    async with fleet.paused(engines, windows):
        start = time.perf_counter()
        server = fleet.server(engine)
        await server.call("bench_reload", str(folder), deadline_s=RELOAD_S)
        return time.perf_counter() - start

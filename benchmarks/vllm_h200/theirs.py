"""checkpoint-engine's update of a vLLM server, by its own worker extension.

Its parameter servers are processes of their own (`theirs_rank.py`), one for each GPU, which pin the
files in place, and remove them. What is counted is as in `benchmarks.h200.theirs`.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from msgspec import structs

from benchmarks.h200.fleet import Engines
from benchmarks.h200.report import Run
from benchmarks.h200.theirs import Theirs
from benchmarks.h200.theirs_rank import Done
from benchmarks.vllm_h200 import theirs_rank
from benchmarks.vllm_h200.files import file_of
from benchmarks.vllm_h200.fleet import VllmFleet
from benchmarks.vllm_h200.load import Window

__all__ = ("CHECKPOINT_ENGINE", "TheirsWithVllm")

CHECKPOINT_ENGINE: Final = "checkpoint_engine"


class TheirsWithVllm(Theirs):
    """See `Theirs`.

    Args:
        folder: of files of `version`.
        windows: takes when requests waited.
    """

    name = CHECKPOINT_ENGINE
    module = theirs_rank.__name__

    def __init__(
        self,
        fleet: VllmFleet,
        engines: Engines,
        folder: Path,
        version: int,
        windows: list[Window],
    ) -> None:
        super().__init__(fleet.setup, fleet.processes)
        self._fleet, self._engines, self._folder = fleet, engines, folder
        self._windows = windows
        self.version = version

    def arguments(self, rank: int, port: int) -> msgspec.Struct:
        (engine,) = self._engines.setups
        return theirs_rank.Arguments(
            setup=self.setup,
            rank=rank,
            port=port,
            file=str(file_of(self._folder, rank, self.setup.devices)),
            url=self._fleet.server(engine).url,
        )

    def run(self, size_bytes: int, note: str) -> Run:
        """With how long requests waited in the timed updates; the first is none of them."""
        found = super().run(size_bytes, note)
        timed = self._windows[1 : 1 + len(found.repetitions)]
        if not timed:
            return found
        paused_s = median((window.end_ns - window.begin_ns) / 1e9 for window in timed)
        return structs.replace(found, parts={**found.parts, "paused_s": round(paused_s, 6)})

    async def clear(self) -> None:
        await self._fleet.clear(self._engines)

    async def check(self) -> None:
        await self._fleet.check(self._engines, self.version)

    async def update(self) -> list[Done]:
        async with self._fleet.paused(self._engines, self._windows):
            return await super().update()

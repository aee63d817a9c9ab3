"""What publishing costs a trainer, on one machine: blocked time, whole time, steps, memory.

    python -m benchmarks.publish [--gib 1] [--runs 7] [--device cpu] [--slots host] [--output FILE]

A bus of its own, a trainer with `BlockingPublisher`, and no engine, but for the cases of
back-pressure: there a reader holds a lease on every version that it hears of for `READ_S`, as an
engine does that is slow. Beside it stands one memcpy of the same bytes, taken in turns with what is
measured, and after that:

- `publish`: until the version is announced, and the trainer waits for all of it;
- `start`: the same in the background: `blocked` until the tensors are copied, `announced` as above;
- `cast`: `start` of an FP32 master of the same number of elements, cast to BF16 in the copy;
- `first`: the first version of a publisher, which makes its slot;
- `step`: a training step of matrix products, alone and with a `start` in each;
- `ranks`: a version of a few bytes by several ranks: what agreeing and sealing cost;
- `policies`: the same trainer with a slow reader, by `when_busy`;
- `memory`: what lies in /dev/shm at most, beside what is stated: two slots of the part's size.

With `--device cuda` the tensors lie on a GPU. Needs the extras `embedded` and `torch`, and 4 x the
bytes in memory beside 2 x in /dev/shm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import anyio
import anyio.to_thread
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.limits import memcpy_limit
from benchmarks.planning import RESULTS, machine
from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.errors import SlotBusy, VersionSkipped
from weightbus.producers.publisher import PublisherOptions
from weightbus.producers.shards import plan_part
from weightbus.producers.slots import WhenBusy
from weightbus.producers.writers import SlotsIn
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.leases import ReaderLease
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

PACKAGES = ("weightbus", "torch", "numpy")
MODEL = "benchmark-publish"
TENSOR_BYTES: Final = 8 * 2**20
RANKS: Final = (1, 2, 4, 8)
STEPS: Final = 12
STEP_S: Final = 0.25
READ_S: Final = 1.0
SLOT_WAIT_S: Final = 30.0
LEASE_S: Final = 60.0
DEADLINE_S: Final = 300.0
POLL_S: Final = 0.002

Figure = dict[str, Any]


class Bench:
    """One trainer's tensors, and the bus it publishes on."""

    def __init__(self, settings: BusSettings, gib: float, runs: int, device: str, slots: SlotsIn):
        count = max(1, round(gib * 2**30 / TENSOR_BYTES))
        self.settings, self.runs, self.slots = settings, runs, slots
        self._device = torch.device(device)
        self.weights = self._tensors(count, torch.bfloat16)
        self.part = plan_part(self.weights)
        self._count = count
        self._models = 0

    @property
    def size_bytes(self) -> int:
        return self.part.size_bytes

    def _tensors(self, count: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        rows = TENSOR_BYTES // 2 // 2048
        return {
            f"model.layers.{n}.weight": torch.full(
                (rows, 2048), n / 256, dtype=dtype, device=self._device
            )
            for n in range(count)
        }

    @contextmanager
    def publisher(self, when_busy: WhenBusy = "wait", **more: Any) -> Iterator[BlockingPublisher]:
        """Of a model of its own."""
        self._models += 1
        options = PublisherOptions(
            slots=self.slots,
            when_busy=when_busy,
            slot_wait_s=SLOT_WAIT_S,
            linger_s=0.0,
            close_wait_s=0.0,
        )
        with BlockingPublisher(
            self.settings, f"{MODEL}-{self._models}", options=options, **more
        ) as publisher:
            yield publisher

    def copies(self) -> Figure:
        """`first`, `publish`, `start`, beside the memcpy."""
        limit = memcpy_limit(self.size_bytes)
        limit()
        columns: dict[str, list[float]] = {
            name: [] for name in ("memcpy", "publish", "start_blocked", "start_announced")
        }
        with self.publisher() as publisher:
            first_s = timed(partial(publisher.publish, self.part, 1))
            publisher.publish(self.part, 2)
            for run in range(self.runs):
                columns["memcpy"].append(limit())
                publish = partial(publisher.publish, self.part, 3 + 2 * run)
                columns["publish"].append(timed(publish))
                begin_s = time.perf_counter()
                publication = publisher.start(self.part, 4 + 2 * run)
                columns["start_blocked"].append(time.perf_counter() - begin_s)
                publication.result(DEADLINE_S)
                columns["start_announced"].append(time.perf_counter() - begin_s)
        return {
            "first_s": round(first_s, 4),
            **{f"{name}_s": rounded(seconds) for name, seconds in columns.items()},
            "publish_share_of_memcpy": share(columns["memcpy"], columns["publish"]),
            "blocked_share_of_memcpy": share(columns["memcpy"], columns["start_blocked"]),
        }

    def cast(self) -> Figure:
        """An FP32 master of the same elements: it reads twice the bytes, and writes the same."""
        master = self._tensors(self._count, torch.float32)
        part = plan_part(master, dtype=torch.bfloat16)
        blocked, announced = [], []
        with self.publisher() as publisher:
            for number in range(2 + self.runs):
                begin_s = time.perf_counter()
                publication = publisher.start(part, number)
                blocked.append(time.perf_counter() - begin_s)
                publication.result(DEADLINE_S)
                announced.append(time.perf_counter() - begin_s)
        return {
            "bytes": part.size_bytes,
            "blocked_s": rounded(blocked[2:]),
            "announced_s": rounded(announced[2:]),
        }

    def step(self) -> Figure:
        """A training step, alone and with a version in each, in turns."""
        work = matrix_work(self._device)
        alone, with_version = [], []
        with self.publisher() as publisher:
            for number in range(2 + self.runs):
                alone.append(timed(work))
                begin_s = time.perf_counter()
                publication = publisher.start(self.part, number)
                work()
                with_version.append(time.perf_counter() - begin_s)
                publication.result(DEADLINE_S)
        alone, with_version = alone[2:], with_version[2:]
        return {
            "alone_s": rounded(alone),
            "with_version_s": rounded(with_version),
            "overhead_s": round(median(with_version) - median(alone), 4),
        }

    def policies(self) -> list[Figure]:
        """A step of `STEP_S` and a version in each, while a reader takes `READ_S` for each."""
        return [self._policy(policy) for policy in ("wait", "skip", "fail")]

    def _policy(self, when_busy: WhenBusy) -> Figure:
        blocked: list[float] = []
        announced = skipped = failed = 0
        with (
            self.publisher(when_busy) as publisher,
            slow_reader(publisher.url, f"{MODEL}-{self._models}"),
        ):
            begin_s = time.perf_counter()
            for number in range(STEPS):
                publication = None
                start_s = time.perf_counter()
                try:
                    publication = publisher.start(self.part, number)
                except VersionSkipped:
                    skipped += 1
                except SlotBusy:
                    failed += 1
                blocked.append(time.perf_counter() - start_s)
                time.sleep(STEP_S)
                if publication is not None:
                    publication.result(DEADLINE_S)
                    announced += 1
            seconds = time.perf_counter() - begin_s
        return {
            "when_busy": when_busy,
            "steps": STEPS,
            "seconds": round(seconds, 3),
            "announced": announced,
            "skipped": skipped,
            "failed": failed,
            "blocked_median_s": round(median(blocked), 4),
            "blocked_most_s": round(max(blocked), 4),
        }

    def ranks(self) -> list[Figure]:
        """A tiny version: all that is left is agreement."""
        return [self._ranks(count) for count in RANKS]

    def _ranks(self, count: int) -> Figure:
        part = plan_part({"w": torch.zeros(64)})
        seconds = []
        self._models += 1
        model = f"{MODEL}-{self._models}"
        options = PublisherOptions(linger_s=0.0, close_wait_s=0.0)
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            publishers = [
                stack.enter_context(
                    BlockingPublisher(
                        self.settings, model, rank=rank, world_size=count, options=options
                    )
                )
                for rank in range(count)
            ]
            for number in range(2 + 2 * self.runs):
                begin_s = time.perf_counter()
                futures = [pool.submit(each.publish, part, number) for each in publishers]
                for future in futures:
                    future.result(DEADLINE_S)
                seconds.append(time.perf_counter() - begin_s)
        return {"ranks": count, "seconds": rounded(seconds[2:])}

    def memory(self) -> Figure:
        """The most that lies in /dev/shm while versions are written, and after the end."""
        with self.publisher() as publisher:
            prefix = f"weightbus-{MODEL}-{self._models}."
            with watching(lambda: in_shared_memory(prefix)) as sizes:
                for number in range(4):
                    publisher.publish(self.part, number)
            steady_bytes = in_shared_memory(prefix)
        stated_bytes = 2 * (SHM_HEADER_BYTES + self.part.layout.segments[0].size_bytes)
        return {
            "part_bytes": self.size_bytes,
            "stated_bytes": stated_bytes,
            "most_bytes": max(sizes),
            "steady_bytes": steady_bytes,
            "after_the_end_bytes": in_shared_memory(prefix),
        }


def timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def matrix_work(device: torch.device) -> Callable[[], None]:
    """About half a second of matrix products on two cores."""
    size, products = (1536, 8) if device.type == "cpu" else (8192, 100)
    one = torch.randn(size, size, device=device)

    def work() -> None:
        result = one
        for _ in range(products):
            result = torch.tanh(one @ result)
        float(result[0, 0])  # waits for a GPU

    return work


def in_shared_memory(prefix: str) -> int:
    """Bytes of blocks of that name, as they are allocated."""
    total = 0
    for path in Path("/dev/shm").glob(f"{prefix}*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watching(look: Callable[[], int]) -> Iterator[list[int]]:
    """What is seen every `POLL_S`."""
    seen, ended = [look()], threading.Event()

    def run() -> None:
        while not ended.wait(POLL_S):
            seen.append(look())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


@contextmanager
def slow_reader(url: str, model: str) -> Iterator[None]:
    """Reads the newest version that it knows of, each for `READ_S`, as an engine does."""
    ready, ended = threading.Event(), threading.Event()

    async def run() -> None:
        async with (
            open_bus(BusSettings(url=url)) as bus,
            bus.subscribe(CheckpointReady, model=model) as messages,
            anyio.create_task_group() as tasks,
        ):
            newest, read = -1, -1

            async def listen() -> None:
                nonlocal newest
                async for heard in messages:
                    message = getattr(heard, "message", None)
                    if isinstance(message, CheckpointReady):
                        newest = max(newest, message.version)

            tasks.start_soon(listen)
            ready.set()
            while not ended.is_set():
                await anyio.sleep(POLL_S)
                if newest == read:
                    continue
                read = newest
                lease = ReaderLease(
                    model=model, version=read, engine="slow", taken_ns=time.time_ns()
                )
                await bus.reader_leases.take(lease, LEASE_S)
                await anyio.sleep(READ_S)
                await bus.reader_leases.release(lease)
            tasks.cancel_scope.cancel()

    thread = threading.Thread(target=anyio.run, args=(run,))
    thread.start()
    try:
        if not ready.wait(DEADLINE_S):
            raise SystemExit("the slow reader did not begin")
        yield
    finally:
        ended.set()
        thread.join()


def rounded(seconds: list[float]) -> list[float]:
    return [round(each, 4) for each in seconds]


def share(limit: list[float], of: list[float]) -> float:
    """Median of the ratios within a run."""
    return round(median(a / b for a, b in zip(limit, of, strict=True)), 3)


def measure(bench: Bench) -> Figure:
    copies = bench.copies()
    return {
        "bytes": bench.size_bytes,
        "tensors": len(bench.weights),
        "copies": copies,
        "cast": bench.cast(),
        "step": bench.step(),
        "ranks": bench.ranks(),
        "policies": bench.policies(),
        "memory": bench.memory(),
    }


def print_tables(figures: Figure) -> None:
    console, copies, memory = Console(), figures["copies"], figures["memory"]
    table = Table("what", "s", "GB/s", title=f"{figures['bytes'] / 1e9:.2f} GB in host memory")
    rows = {
        "memcpy": copies["memcpy_s"],
        "publish: announced": copies["publish_s"],
        "start: blocked": copies["start_blocked_s"],
        "start: announced": copies["start_announced_s"],
        "FP32 -> BF16: blocked": figures["cast"]["blocked_s"],
        "FP32 -> BF16: announced": figures["cast"]["announced_s"],
        "first version": [copies["first_s"]],
    }
    for name, seconds in rows.items():
        each = median(seconds)
        table.add_row(name, f"{each:.3f}", f"{figures['bytes'] / each / 1e9:.2f}")
    console.print(table)
    step = figures["step"]
    console.print(
        f"a step: {median(step['alone_s']):.3f} s alone, {median(step['with_version_s']):.3f} s "
        f"with a version: {step['overhead_s']:.3f} s more"
    )
    for each in figures["ranks"]:
        console.print(f"{each['ranks']} ranks agree in {median(each['seconds']) * 1e3:.1f} ms")
    for each in figures["policies"]:
        console.print(
            f"{each['when_busy']}: {each['seconds']:.2f} s for {each['steps']} steps; "
            f"{each['announced']} announced, {each['skipped']} skipped, {each['failed']} failed; "
            f"blocked {each['blocked_median_s']:.3f} s, at most {each['blocked_most_s']:.3f} s"
        )
    console.print(
        f"slots: {memory['most_bytes']:,} bytes at most, {memory['stated_bytes']:,} stated; "
        f"{memory['after_the_end_bytes']:,} after the end"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure publishing.")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slots", choices=("host", "device", "both"), default="host")
    parser.add_argument("--output", type=Path, default=RESULTS / "publish.json")
    given = parser.parse_args()
    where = machine()
    if given.device != "cpu":
        where["gpu"] = torch.cuda.get_device_name()

    async def run() -> Figure:
        async with open_bus(BusSettings()) as bus:
            settings = BusSettings(url=bus.url)
            bench = Bench(settings, given.gib, given.runs, given.device, given.slots)
            return await anyio.to_thread.run_sync(measure, bench)

    figures = anyio.run(run)
    print_tables(figures)
    command = f"python -m benchmarks.publish --gib {given.gib:g} --runs {given.runs}"
    if given.device != "cpu":
        command += f" --device {given.device} --slots {given.slots}"
    report = {
        "machine": where,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "command": command,
        "load_after": round(os.getloadavg()[0], 1),
        **figures,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

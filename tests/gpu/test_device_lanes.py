"""Device lanes as they are: slots in memory of GPUs, read by other processes over CUDA IPC, and
broadcast by NCCL. A host is some processes with a GPU each; a process reads every byte of every
lane by copies from the addresses that it is given."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import numpy as np
import pytest

from tests.unit.transfer.device_fleet import Fleet, Shape, Worker, open_hosts
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.consumers.transfer.groups import open_meeting
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import encode_layout
from weightbus.schemas.worker import Stream

pytestmark = pytest.mark.timeout(300)

ROOT: Final = Path(__file__).resolve().parents[2]
MIB: Final = 2**20
START_S: Final = 120.0
NEVER: Final = -1


class Ended(Exception):
    """A process ended while it was asked."""


class ProcessWorker(Worker):
    """A worker in a process of its own, as `Fleet` asks it."""

    def __init__(self, device: int, number: int) -> None:
        self.device_number, self.number = device, number
        self.failure: Exception | None = None
        self.die_at = NEVER
        self.answer: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.lane_worker", str(self.device_number)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def prepare(self, feed: Stream, layout: Layout) -> None:
        answer = self._ask("prepare", feed, layout, START_S)
        assert "error" not in answer, answer

    def run(self, feed: Stream, layout: Layout, deadline_s: float = START_S) -> None:
        self.failure, self.answer = None, {}
        try:
            self.answer = self._ask("run", feed, layout, deadline_s)
        except Ended as error:
            self.failure = error
        else:
            if "error" in self.answer:
                self.failure = RuntimeError(f"{self.answer['error']}: {self.answer['reason']}")

    def wrong(self, plan: BucketPlan, parts: Sequence[bytearray]) -> list[object]:
        expected = [_hash_runs(plan, number, part) for number, part in enumerate(parts)]
        found = self.answer["parts"]
        assert len(found) == len(expected)
        return [n for n, digest in enumerate(expected) if found[n] != digest]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._say({"do": "close"})
        try:
            self._process.wait(START_S)
        finally:
            self._process.kill()
            self._process.wait()

    def _ask(self, do: str, feed: Stream, layout: Layout, deadline_s: float) -> dict[str, Any]:
        self._say(
            {
                "do": do,
                "feed": msgspec.msgpack.encode(feed).hex(),
                "layout": encode_layout(layout).hex(),
                "deadline_s": deadline_s,
                "die_at": self.die_at,
            }
        )
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise Ended(f"worker {self.number} on device {self.device_number} has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _say(self, asked: dict[str, object]) -> None:
        pipe = _pipe(self._process.stdin)
        pipe.write(json.dumps(asked) + "\n")
        pipe.flush()


def _hash_runs(plan: BucketPlan, number: int, part: bytearray) -> str:
    """Of what is brought of a part; what lies between the runs is nobody's."""
    found = hashlib.sha256()
    for run in plan.runs_of(number):
        begin = int(run["staged"])
        found.update(part[begin : begin + int(run["size_bytes"])])
    return found.hexdigest()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def layout_of(*sizes_bytes: int) -> Layout:
    return Layout(
        tensors=tuple(TensorSpec(f"t{n}", "U8", (size,)) for n, size in enumerate(sizes_bytes)),
        shards=tuple(ShardSpec(n, (0,), (size,), n, 0) for n, size in enumerate(sizes_bytes)),
        segments=tuple(map(SegmentSpec, sizes_bytes)),
    )


LAYOUT: Final = layout_of(48 * MIB + 1, 7, 17 * MIB + 4099)


@contextmanager
def open_workers(shape: Shape) -> Iterator[Fleet]:
    """Worker `n` of host `h` has GPU `h * workers + n`."""

    def make(host: int, number: int) -> ProcessWorker:
        return ProcessWorker(host * shape.workers + number, number)

    with open_meeting("127.0.0.1") as meeting, open_hosts(LAYOUT, shape, make) as fleet:
        fleet.rendezvous = meeting.rendezvous
        yield fleet


def write(fleet: Fleet, seed: int) -> None:
    content = np.random.default_rng(seed)
    fleet.write([content.bytes(segment.size_bytes) for segment in LAYOUT.segments])


def failures(fleet: Fleet) -> list[str]:
    return [str(worker.failure) for worker in fleet.workers]


SHAPES: Final = [
    Shape(workers=1, lanes=2, slots=3, bucket_bytes=4 * MIB),
    Shape(workers=2, lanes=2, slots=2, bucket_bytes=4 * MIB),
    Shape(workers=2, lanes=3, slots=1, bucket_bytes=4 * MIB, staged=frozenset({0})),
    Shape(hosts=2, workers=1, lanes=1, slots=3, bucket_bytes=4 * MIB),
    Shape(hosts=2, workers=1, lanes=3, slots=2, bucket_bytes=4 * MIB, staged=frozenset({2})),
    Shape(workers=4, lanes=4, slots=2, bucket_bytes=4 * MIB),
    Shape(hosts=2, workers=2, lanes=2, slots=3, bucket_bytes=4 * MIB),
    Shape(hosts=4, workers=1, lanes=2, slots=2, bucket_bytes=4 * MIB),
]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_every_process_reads_every_byte_version_after_version(
    shape: Shape, gpus: Callable[[int], None]
) -> None:
    gpus(shape.hosts * shape.workers)
    with open_workers(shape) as fleet:
        for version in range(4):
            write(fleet, version)
            turn = fleet.begin()
            if version % 2:
                fleet.prepare(turn)
            fleet.transfer(turn, START_S)
            fleet.check()
            copied = sum(worker.answer["bytes"] for worker in fleet.workers)  # type: ignore[attr-defined]
            read = sum(
                int(run["size_bytes"])
                for run in fleet.plan.runs
                if int(run["segment"]) not in shape.staged
            )
            assert copied == read, "every byte once, of all hosts together"


@pytest.mark.parametrize(("hosts", "workers"), [(1, 2), (2, 1)])
def test_others_fail_and_go_on_when_a_process_is_killed(
    hosts: int, workers: int, gpus: Callable[[int], None]
) -> None:
    """Also one that waits in a broadcast for the member that is gone."""
    gpus(2)
    shape = Shape(hosts=hosts, workers=workers, lanes=2, slots=2, bucket_bytes=4 * MIB)
    with open_workers(shape) as fleet:
        write(fleet, 0)
        fleet.transfer(deadline_s=START_S)
        fleet.check()
        lost = fleet.workers[1]
        assert isinstance(lost, ProcessWorker)
        lost.die_at = 3
        write(fleet, 1)
        fleet.transfer(deadline_s=START_S)
        assert "has ended" in failures(fleet)[1]
        assert failures(fleet)[0].startswith(("SegmentUnavailable", "PeerLost"))
        lost.die_at = NEVER
        lost.start()
        for version in (2, 3):
            write(fleet, version)
            fleet.transfer(deadline_s=START_S)
            fleet.check()


def test_version_that_is_overwritten_is_taken_by_nobody(gpus: Callable[[int], None]) -> None:
    gpus(2)
    with open_workers(Shape(workers=2, lanes=2, slots=2, bucket_bytes=4 * MIB)) as fleet:
        write(fleet, 0)
        (host,) = fleet.hosts
        stale = list(host.sources)
        write(fleet, 1)
        host.sources = stale
        fleet.transfer(deadline_s=START_S)
        assert all(failure != "None" for failure in failures(fleet))
        assert any(failure.startswith("TornRead") for failure in failures(fleet))
        write(fleet, 2)
        fleet.transfer(deadline_s=START_S)
        fleet.check()

"""Device lanes: every byte comes to every worker, whoever fills, however slow, on one host or two;
and whatever fails, nobody keeps wrong bytes, nor anything on a device."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from tests.unit.planning.worlds import make_world
from tests.unit.transfer.device_fleet import Fleet, Shape, open_fleet, wait_until
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec


def random_weights(layout: Layout, seed: int) -> list[bytes]:
    content = np.random.default_rng(seed)
    return [content.bytes(segment.size_bytes) for segment in layout.segments]


def flat_layout(*sizes_bytes: int) -> Layout:
    """A tensor for every segment."""
    return Layout(
        tensors=tuple(TensorSpec(f"t{n}", "U8", (size,)) for n, size in enumerate(sizes_bytes)),
        shards=tuple(ShardSpec(n, (0,), (size,), n, 0) for n, size in enumerate(sizes_bytes)),
        segments=tuple(map(SegmentSpec, sizes_bytes)),
    )


def run(fleet: Fleet, seed: int) -> None:
    fleet.write(random_weights(fleet.layout, seed))
    fleet.transfer()
    fleet.check()


@pytest.mark.parametrize("seed", range(24))
def test_every_worker_reads_every_byte_when_layouts_are_random(seed: int) -> None:
    source = random.Random(seed)
    layout = make_world(seed).layout
    if not sum(segment.size_bytes for segment in layout.segments):
        layout = flat_layout(1)
    workers = source.choice([1, 2, 3])
    shape = Shape(
        hosts=1 + seed % 2,
        workers=workers,
        lanes=source.randint(1, 4),
        slots=source.randint(1, 3),
        bucket_bytes=1024 + 8 * source.randrange(64),
        staged=frozenset(n for n in range(len(layout.segments)) if source.random() < 0.4),
        slowly_s=source.choice([0.0, 1e-3]),
    )
    with open_fleet(layout, shape) as fleet:
        for version in range(3):
            run(fleet, 100 * seed + version)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(workers=1, lanes=3, slots=1),
        Shape(hosts=2, workers=2, lanes=2, slots=3, slowly_s=1e-3),
        Shape(hosts=2, workers=1, lanes=3, slots=2, staged=frozenset({1})),
        Shape(hosts=3, workers=2, lanes=4, slots=2, slowly_s=1e-3),
        Shape(workers=4, lanes=4, slots=2, staged=frozenset({0, 1})),
    ],
    ids=repr,
)
def test_many_buckets_come_right_version_after_version(shape: Shape) -> None:
    with open_fleet(flat_layout(60_001, 20_003), shape) as fleet:
        assert fleet.plan.buckets > 3 * shape.slots
        for version in range(3):
            run(fleet, version)
        allocated = [worker.cuda.calls["allocate"] for worker in fleet.workers]
        opened = [worker.cuda.calls["open_handle"] for worker in fleet.workers]
        for _ in range(2):
            fleet.prepare(turn := fleet.begin())
            fleet.write(random_weights(fleet.layout, 77))
            fleet.transfer(turn)
            fleet.check()
        assert [worker.cuda.calls["allocate"] for worker in fleet.workers] == allocated
        assert [worker.cuda.calls["open_handle"] for worker in fleet.workers] == opened

"""Engines on GPUs follow a trainer through the real bus, and hold what engines on CPUs hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from safetensors.torch import save_file

from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.weights import weights_of
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join

LONG_S = 60.0


@pytest.mark.anyio
@pytest.mark.parametrize("ranks", [1, 2])
async def test_engine_holds_each_version_bit_for_bit_when_it_comes_by_shared_memory(
    gpu_fleet: Fleet, gpus: Callable[[int], None], ranks: int
) -> None:
    """`completes` compares the ranks' parameters with a model that a CPU has loaded, by SHA-256."""
    gpus(ranks)
    async with gpu_fleet.follow(f"g{ranks}", ranks=ranks) as g, gpu_fleet.publisher() as trainer:
        for _ in range(4):
            version = (await trainer.publish()).version
            await g.completes(version)
            (join,) = gpu_fleet.log.said(Join, version=version)
            devices = [offer.device for offer in join.ranks]
            assert devices == [f"cuda:{rank}" for rank in range(ranks)]
        held = await g.engine.inspect(None, LONG_S)
        assert all(rank.proven for rank in held), "no plan was proven: every update was a reload"
    assert gpu_fleet.log.said(UpdateFailed) == []


@pytest.mark.anyio
async def test_engine_holds_each_version_bit_for_bit_when_it_lies_in_files(
    gpu_fleet: Fleet,
) -> None:
    """What a step fetches is registered with the GPU while it is read."""
    async with gpu_fleet.follow("g1") as g, gpu_fleet.publisher() as trainer:
        for _ in range(3):
            version = gpu_fleet.next_version()
            path = gpu_fleet.directory / f"{version}.safetensors"
            save_file(weights_of(gpu_fleet.model, version), path)
            await trainer.publisher.publish_files([str(path)], version)
            done = await gpu_fleet.log.wait(UpdateComplete, engine="g1", version=version)
            assert done.verified in ("verified", "not_offered")
            await g.serves(version)
    assert gpu_fleet.log.said(UpdateFailed) == []


def test_worker_whose_device_is_lost_says_so_and_ends_in_order() -> None:
    """In a process of its own: a device that is lost is lost to all of a process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.lost_device"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stdout.splitlines() if line[1:2] == ":"]  # kernels say more
    assert said == [
        "1: Applied",
        "2: DeviceLost, touched",
        "3: DeviceLost, touched",
    ]
    assert "DeviceLost: device cuda:0 is lost to this process: CUDA error" in done.stderr

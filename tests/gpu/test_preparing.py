"""What a GPU's worker does before an engine is paused, and what it takes of its GPU."""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest
import torch

from benchmarks.models import layout_of, needs_of_qwen3_moe, qwen3_moe
from tests.gpu.test_cuda import ROOT, ask, lines, other_process, some_bytes
from tests.unit.reload.models import ModuleHost
from tests.unit.reload.test_worker import Client, Fused, load_fused, make_tensors
from tests.unit.reload.test_worker_preparing import prepare
from tests.unit.transfer.publishing import cut_layout, open_trainer
from weightbus.bus.cuda import CudaRuntime, open_cuda
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.planning.tiles import plan_tiles
from weightbus.consumers.reload.accelerator import CudaAccelerator
from weightbus.consumers.reload.gpu import GpuExecutor
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.consumers.transfer.gpu import Gpu
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, pack_shm_header
from weightbus.schemas.worker import InPlace

DEVICE: Final = "cuda:0"
MIB: Final = 2**20
SIZE: Final = 5 * MIB + 4096
SLOT_BYTES: Final = 8 * 2**30
EXTRA_BYTES: Final = 16 * MIB
"""Of a worker's GPU, for the tables of a plan and scratch."""


class OnGpu(ModuleHost):
    """Its parameters lie on a GPU."""

    def __init__(self) -> None:
        super().__init__(lambda: Fused().to(DEVICE), load_fused)

    @property
    def device(self) -> str:
        return DEVICE

    def scratch_model(self) -> torch.nn.Module:
        with torch.device("meta"):
            return Fused()

    def synchronize(self) -> None:
        torch.cuda.synchronize(DEVICE)


class CountingCuda:
    """The driver, and how often memory is registered."""

    def __init__(self) -> None:
        self.registered = 0
        self._cuda = open_cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)

    def register(self, *arguments: Any, **named: Any) -> None:
        self.registered += 1
        self._cuda.register(*arguments, **named)


def free_bytes(cuda: CudaRuntime) -> int:
    gc.collect()
    torch.cuda.synchronize()
    return cuda.free_bytes(0)


def test_apply_registers_nothing_when_it_was_prepared(tmp_path: Path) -> None:
    cuda = CountingCuda()
    with open_trainer(cut_layout(make_tensors(0), 3), "memory", tmp_path) as trainer:
        worker = ReloadWorker(OnGpu(), 0, 1, lambda: cast(CudaRuntime, cuda))
        client = Client(worker, trainer)
        client.attach()
        for version in (1, 2, 3):
            tensors = make_tensors(version)
            sources = trainer.publish(tensors, version)
            assert prepare(client, InPlace(sources=sources)).reason == ""
            assert cuda.registered == len(sources)
            client.verified(worker.handle(client.request(sources, version)), tensors, version)
            assert cuda.registered == len(sources)
        worker.close()


@pytest.mark.usefixtures("whole_gpu")
def test_large_tables_take_no_more_than_the_drivers_granularity() -> None:
    cuda, accelerator = open_cuda(), CudaAccelerator(torch.device(DEVICE))
    accelerator.uploaded(np.zeros(1, dtype=np.int64))
    before, reserved = free_bytes(cuda), torch.cuda.memory_reserved(0)
    table = accelerator.uploaded(np.arange(3 * MIB // 8))
    scratch = accelerator.allocated(4 * MIB)
    assert table.device == scratch.device == torch.device(DEVICE)
    assert torch.equal(table.cpu(), torch.arange(3 * MIB // 8))
    assert torch.cuda.memory_reserved(0) == reserved
    assert before - free_bytes(cuda) <= 8 * MIB
    del table, scratch
    assert free_bytes(cuda) >= before


@pytest.mark.usefixtures("whole_gpu")
def test_plan_of_a_large_model_takes_16_mib_at_most() -> None:
    """Qwen3-30B-A3B on two GPUs: 240,000 tiles. No parameter need be there to prepare it."""
    cuda, accelerator = open_cuda(), CudaAccelerator(torch.device(DEVICE))
    executors = []
    for layers in (1, 48):  # the first compiles and loads the kernels
        before = free_bytes(cuda)
        layout = layout_of(qwen3_moe(layers), 2)
        needs = needs_of_qwen3_moe(layout, 0, 2, layers)
        (cells,) = plan_cells(layout, [needs]).cells
        plan = plan_tiles(layout, needs)
        executors.append((plan, GpuExecutor(layout, needs, cells, accelerator)))
        executors[-1][1].prepare(plan)
        taken = before - free_bytes(cuda)
    assert taken <= EXTRA_BYTES, f"{taken / MIB:.1f} MiB for {plan.tiles.size} tiles"


def test_kernels_go_on_while_memory_is_registered() -> None:
    """As when an engine serves while its worker prepares a new slot."""
    gpu = Gpu(0, open_cuda)
    memory = mmap.mmap(-1, SLOT_BYTES)
    whole = np.frombuffer(memory, dtype=np.uint8)
    whole[::4096] = 1
    address, taken = int(whole.ctypes.data), []

    def register() -> None:
        start = time.monotonic()
        gpu.register("a slot", address, SLOT_BYTES, read_only=False)
        taken.append(time.monotonic() - start)

    served = torch.zeros(1024, device=DEVICE)
    torch.cuda.synchronize()
    thread, longest_s = threading.Thread(target=register), 0.0
    thread.start()
    try:
        while thread.is_alive():
            start = time.monotonic()
            served.add_(1)
            torch.cuda.current_stream().synchronize()
            longest_s = max(longest_s, time.monotonic() - start)
    finally:
        thread.join()
        gpu.unregister("a slot", address, memory)
        del whole
    assert longest_s < taken[0] / 2, f"one step of {longest_s:.3f} s in {taken[0]:.3f} s"


@contextmanager
def publisher(data: bytes) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Another process with a whole version on the GPU, and its handle."""
    content = pack_shm_header(len(data), 2).ljust(SHM_HEADER_BYTES, b"\0") + data
    size_bytes = -(-len(content) // (2 * MIB)) * 2 * MIB
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT), *filter(None, sys.path)])
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.holder", "0", str(size_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(content.ljust(size_bytes, b"\0"))
            process.stdin.flush()
            yield process, process.stdout.readline().decode().strip()
        finally:
            process.kill()


def test_reader_lives_when_the_publisher_is_killed_while_its_memory_is_open() -> None:
    """Whether it can still read there is the driver's to say; it must not be lost for that."""
    data, uuid = some_bytes(SIZE, seed=3), open_cuda().device_uuid(0)
    with (
        publisher(data) as (owner, handle),
        other_process("read", "0", uuid, handle, "2", str(SIZE)) as reader,
    ):
        *_, by_kernel, by_copies = lines(reader, 5)
        assert by_kernel == by_copies == hashlib.sha256(data).hexdigest()
        owner.kill()
        owner.wait(60)
        answer = ask(reader)
        assert answer.partition(":")[0] in ("whole", "SegmentUnavailable", "TornRead"), answer
        assert reader.stdin is not None
        reader.stdin.close()
        (refused,) = lines(reader, 1)
        assert refused.startswith("CUDA: cuIpcOpenMemHandle_v2"), "the device does as before"
        assert reader.wait(60) == 0

"""The executor for GPUs as compiled: bytes and digests are the CPU's, wherever the source is."""

from __future__ import annotations

import importlib
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch

from tests.unit.planning.worlds import UNWRITTEN, Bytes, make_world, memory_bytes
from tests.unit.reload.test_cpu import address_of, cells_of, one_copy
from tests.unit.reload.test_gpu import cut_cells
from weightbus.bus.cuda import open_cuda
from weightbus.bus.digest import digest_tensor
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan, bind_tiles, plan_tiles
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.executor import Executor, make_executor
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec, UnaryOp
from weightbus.schemas.worker import Cell

ROOT: Final = Path(__file__).resolve().parents[2]
DEVICE: Final = "cuda:0"
PADDING: Final = 8

Place = Callable[[Bytes, int], int]
"""Puts bytes where `DEVICE` can read them, so many bytes after a multiple of 8: the address."""


@pytest.fixture
def holding() -> Iterator[ExitStack]:
    """What is held until the test ends."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["registered", "pinned", "local", "other_process", "other_gpu"])
def place(request: pytest.FixtureRequest, holding: ExitStack, gpus: Callable[[int], None]) -> Place:
    if request.param == "other_gpu":
        gpus(2)
    put: dict[str, Place] = {
        "registered": lambda data, residue: registered(holding, data, residue),
        "pinned": lambda data, residue: copied(holding, data, residue, "pinned"),
        "local": lambda data, residue: copied(holding, data, residue, DEVICE),
        "other_process": lambda data, residue: held_elsewhere(holding, data, residue, 0),
        "other_gpu": lambda data, residue: held_elsewhere(holding, data, residue, 1),
    }
    return put[request.param]


def registered(holding: ExitStack, data: Bytes, residue: int) -> int:
    """Mapped memory, as a segment in shared memory is."""
    mapping = mmap.mmap(-1, max(1, data.size + residue))
    memory = np.frombuffer(mapping, dtype=np.uint8)
    memory[residue : residue + data.size] = data
    address, cuda = address_of(memory), open_cuda()
    holding.callback(len, mapping)  # holds it
    cuda.register(address, len(mapping), read_only=False)
    holding.callback(cuda.unregister, address)
    return address + residue


def copied(holding: ExitStack, data: Bytes, residue: int, where: str) -> int:
    size = data.size + residue + 1
    if where == "pinned":
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    else:
        memory = torch.empty(size, dtype=torch.uint8, device=where)
    memory[residue : residue + data.size] = torch.from_numpy(data)
    torch.cuda.synchronize()
    holding.callback(memory.numel)  # holds it
    return memory.data_ptr() + residue


def held_elsewhere(holding: ExitStack, data: Bytes, residue: int, device: int) -> int:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT), *filter(None, sys.path)])
    }
    size = data.size + residue + 1
    holder = holding.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.holder", str(device), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
        )
    )
    holding.callback(holder.kill)
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(bytes(residue) + data.tobytes() + b"\0")
    holder.stdin.flush()
    cuda = open_cuda()
    address = cuda.open_handle(0, bytes.fromhex(holder.stdout.readline().decode().strip()))
    holding.callback(cuda.close_handle, 0, address)
    return address + residue


class Parameters:
    """The parameters of some needs on the GPU, each so many bytes after a multiple of 8."""

    def __init__(self, needs: Needs, residues: Sequence[int]) -> None:
        self.sizes = [memory_bytes(one) for one in needs.parameters]
        self._residues = residues
        self._tensors = [
            torch.full((size + PADDING,), UNWRITTEN, dtype=torch.uint8, device=DEVICE)
            for size in self.sizes
        ]
        self.addresses = [
            tensor.data_ptr() + residue
            for tensor, residue in zip(self._tensors, residues, strict=True)
        ]

    def flip(self, number: int, place: int) -> None:
        """A bit of one."""
        self._tensors[number][self._residues[number] + place] ^= 16
        torch.cuda.synchronize()

    def bytes(self) -> list[Bytes]:
        """What they hold; nothing beside them may have been touched."""
        found = []
        for tensor, size, residue in zip(self._tensors, self.sizes, self._residues, strict=True):
            whole = tensor.cpu().numpy()
            assert (whole[:residue] == UNWRITTEN).all()
            assert (whole[residue + size :] == UNWRITTEN).all()
            found.append(whole[residue : residue + size])
        return found


def on_host(plan: TilePlan, segments: Sequence[Bytes], memories: Sequence[Bytes]) -> BoundTiles:
    return bind_tiles(
        plan,
        [address_of(one) for one in segments],
        [one.size for one in segments],
        [address_of(one) for one in memories],
        [one.size for one in memories],
    )


def check(
    layout: Layout,
    needs: Needs,
    cells: Sequence[Cell],
    segments: Sequence[Bytes],
    addresses: Sequence[int],
    residues: Sequence[int],
) -> tuple[Executor, BoundTiles, Parameters]:
    """Move, digest, compare and read back on both; the GPU's executor, for more."""
    plan = plan_tiles(layout, needs)
    memories = [np.full(memory_bytes(one), UNWRITTEN, np.uint8) for one in needs.parameters]
    cpu = CpuExecutor(layout, needs, cells)
    is_same = cpu.changed_parameter(on_host(plan, segments, memories)) is None
    expected = cpu.update(on_host(plan, segments, memories), range(len(cells)))
    back = cpu.read_back(on_host(plan, segments, memories))
    parameters = Parameters(needs, residues)
    bound = bind_tiles(
        plan, addresses, [one.size for one in segments], parameters.addresses, parameters.sizes
    )
    gpu = make_executor(DEVICE, layout, needs, cells)
    gpu.prepare(plan)
    before = gpu.changed_parameter(bound)
    assert all((one == UNWRITTEN).all() for one in parameters.bytes()), "it only compares"
    digests = gpu.update(bound, range(len(cells)))
    assert [one.tobytes() for one in parameters.bytes()] == [one.tobytes() for one in memories]
    assert digests.tolist() == expected.tolist()
    assert (before is None) == is_same
    assert gpu.changed_parameter(bound) is None
    found, unreadable = gpu.read_back(bound)
    assert (found.tolist(), unreadable) == (back[0].tolist(), back[1])
    return gpu, bound, parameters


@pytest.mark.parametrize("seed", range(20))
def test_random_worlds_are_the_cpus(seed: int, place: Place) -> None:
    world, rng = make_world(seed, ranks=1), random.Random(seed)
    (needs,) = world.needs
    cells = cut_cells(needs, world.layout, rng)
    addresses = [place(one, rng.choice([0, 0, 1, 2, 4, 6])) for one in world.segments]
    # torch transforms elements that lie where elements may lie
    transforms = {copy.parameter for copy in needs.copies if copy.transform >= 0}
    filled = {fill.parameter for fill in needs.fills}
    aligned = transforms | filled
    residues = [
        0 if n in aligned else rng.choice([0, 1, 2, 4]) for n in range(len(needs.parameters))
    ]
    check(world.layout, needs, cells, world.segments, addresses, residues)


@pytest.mark.parametrize("residue", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype_odd_size_and_alignment_is_the_cpus(
    dtype: str, residue: int, place: Place
) -> None:
    item, (rows, cols) = DTYPE_BYTES[dtype], (211, 1037)
    count = rows * cols
    layout = Layout(
        (TensorSpec("t", dtype, (rows, cols)), TensorSpec("s", dtype, ())),
        (ShardSpec(0, (0, 0), (rows, cols), 0, item), ShardSpec(1, (), (), 0, 0)),
        (SegmentSpec(item * (count + 1)),),
    )
    whole = ParameterSpec("", dtype, (count,), (1,))
    needs = Needs(
        (whole, whole, whole, whole, ParameterSpec("", dtype, (), ())),
        (
            Copy(0, (0, 0), (rows, cols), 0, 0, (cols, 1)),
            Copy(0, (0, 0), (rows, cols), 1, 0, (1, rows)),
            Copy(0, (0, 0), (rows, cols), 2, count - 1, (-cols, -1)),
            Copy(0, (0, 519), (rows, 1), 3, 5, (1, 1)),
            Copy(0, (3, 300), (200, 333), 3, 300, (333, 1)),
            Copy(1, (), (), 4, 0, ()),
        ),
    )
    data = np.random.default_rng(5).integers(0, 256, item * (count + 1), dtype=np.uint8)
    cells = [
        Cell(0, (0, 0), (rows, 519), 0),
        Cell(0, (0, 519), (rows, 518), 0),
        *(cell for cell in cells_of(needs) if cell.copy > 0),
    ]
    check(layout, needs, cells, [data], [place(data, residue)], [residue, 0, residue, 2, 1])


@pytest.mark.parametrize(
    ("dtype", "ops"),
    [
        ("F32", (("cast", "BF16"),)),
        ("F32", (("cast", "F16"),)),
        ("F64", (("cast", "F32"),)),
        ("F16", (("cast", "F32"),)),
        ("BF16", (("cast", "F8_E4M3"),)),
        ("F8_E5M2", (("cast", "BF16"),)),
        ("BF16", (("cast", "F32"), ("exp", ""), ("neg", ""))),
        ("F32", (("neg", ""),)),
    ],
)
def test_transform_of_several_blocks_is_the_cpus(
    dtype: str, ops: tuple[tuple[UnaryOp, str], ...], place: Place
) -> None:
    """Of numbers: the bits of a NaN that was cast depend on the device."""
    targets = [name for op, name in ops if op == "cast"]
    shape = (1031, 2053)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 8
    source = numbers.to(getattr(torch, TORCH[dtype])).contiguous().view(-1).view(torch.uint8)
    layout, needs, data = one_copy(
        dtype, shape, targets[-1] if targets else dtype, (1, shape[0]), *ops, data=source.numpy()
    )
    check(layout, needs, cells_of(needs), [data], [place(data, 0)], [0])


TORCH: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
}


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_fill_is_the_cpus(dtype: str) -> None:
    parameter = ParameterSpec("p", dtype, (60, 50), (50, 1))
    needs = Needs(
        (parameter,), (), (Fill(0, 70, (40, 20), (50, 2), 1.0), Fill(0, 2999, (9,), (-1,), 1.0))
    )
    check(Layout((), (), ()), needs, (), (), (), [0])


def test_large_copy_is_whole_and_one_flipped_bit_is_seen(place: Place) -> None:
    shape = (4099, 2051)
    data = np.random.default_rng(9).integers(0, 256, 2 * 4099 * 2051, dtype=np.uint8)
    layout, needs, _ = one_copy("BF16", shape, "BF16", (2051, 1), data=data)
    gpu, bound, parameters = check(layout, needs, cells_of(needs), [data], [place(data, 0)], [0])
    assert gpu.digest_cells(bound).tolist() == [digest_tensor(data)]
    parameters.flip(0, 12_345_678)
    assert gpu.digest_cells(bound).tolist() != [digest_tensor(data)]
    assert gpu.changed_parameter(bound) == 0


def test_kernel_that_cannot_be_built_is_an_error_of_ours_and_the_gpu_goes_on(
    holding: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, needs, data = one_copy("F32", (1000,), "F32", (1,))
    plan, parameters = plan_tiles(layout, needs), Parameters(needs, [0])
    gpu = make_executor(DEVICE, layout, needs, cells_of(needs))
    address = copied(holding, data, 0, "pinned")
    bound = bind_tiles(plan, [address], [4000], parameters.addresses, parameters.sizes)
    kernels = importlib.import_module("weightbus.consumers.reload.kernels")
    with monkeypatch.context() as patch:
        patch.setitem(kernels.BLOCK_UNITS, 8, 1000)  # not a power of two
        with pytest.raises(CudaFailed, match=r"moving a plan \(cuda:0\) failed"):
            gpu.update(bound, [0])
    assert (parameters.bytes()[0] == UNWRITTEN).all()
    assert gpu.update(bound, [0]).tolist() == [digest_tensor(data)]

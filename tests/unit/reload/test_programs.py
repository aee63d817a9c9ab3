"""What is compiled for a GPU, and when: once, and before an engine is paused.

The kernel is interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.unit.planning.worlds import Bytes
from tests.unit.reload.interpreted import HostAccelerator, interpreting
from tests.unit.reload.test_cpu import address_of, bind, new_memories
from weightbus.bus.digest import digest_tensor
from weightbus.consumers.planning.pieces import chosen_pieces
from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import plan_tiles
from weightbus.consumers.reload.gpu import GpuExecutor
from weightbus.consumers.reload.table import READ
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Needs, ParameterSpec
from weightbus.schemas.worker import Cell


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreting():
        yield


def odd_copy(data: Bytes, residue: int) -> Bytes:
    """The same bytes, `residue` bytes after a multiple of 8."""
    raw = np.zeros(data.size + 16, dtype=np.uint8)
    begin = (residue - address_of(raw)) % 8
    memory = raw[begin : begin + data.size]
    memory[:] = data
    return memory


class WatchedAccelerator(HostAccelerator):
    """Counts what is uploaded, and notes which kernels are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0
        self.launched: set[tuple[int, int, bool]] = set()
        """Width, mode and whether it digests: what a kernel is compiled for."""

    def uploaded(self, integers: Integers) -> torch.Tensor:
        self.uploads += 1
        return super().uploaded(integers)

    def kernels(self) -> ModuleType:
        kernels = super().kernels()
        accelerator = self

        class Gather:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launch(*arguments: Any, **chosen: Any) -> None:
                    accelerator.launched.add((chosen["width"], chosen["mode"], chosen["digest"]))
                    kernels.gather[grid](*arguments, **chosen)

                return launch

        watched: Any = SimpleNamespace(**vars(kernels) | {"gather": Gather()})
        return cast(ModuleType, watched)


def a_copy_in_two_parts() -> tuple[Layout, Needs, list[Cell], list[Bytes]]:
    """A cell over two copies' segments; and bytes of another width that no copy holds."""
    tensors = (TensorSpec("t", "F64", (20, 4)), TensorSpec("u", "U8", (33,)))
    shards = (
        ShardSpec(0, (0, 0), (10, 4), 0, 0),
        ShardSpec(0, (10, 0), (10, 4), 1, 0),
        ShardSpec(1, (0,), (33,), 1, 320),
    )
    layout = Layout(tensors, shards, (SegmentSpec(320), SegmentSpec(353)))
    copy = Copy(0, (0, 0), (20, 4), 0, 0, (4, 1), -1)
    needs = Needs((ParameterSpec("p", "F64", (20, 4), (4, 1)),), (copy,), ())
    cells = [Cell(0, (0, 0), (20, 4), 0), Cell(1, (0,), (33,), -1)]
    rng = np.random.default_rng(4)
    return layout, needs, cells, [rng.integers(0, 256, n, dtype=np.uint8) for n in (320, 353)]


def test_only_addresses_are_uploaded_when_cells_are_digested_again() -> None:
    """Also of cells that a step does not hold whole, and of those that no copy holds."""
    layout, needs, cells, data = a_copy_in_two_parts()
    accelerator = WatchedAccelerator()
    executor = GpuExecutor(layout, needs, cells, accelerator)
    plan = plan_tiles(layout, needs)
    second = replace(
        plan,
        pieces=chosen_pieces(plan.pieces, plan.pieces.segment == 1),
        tiles=plan.tiles[plan.tiles["segment"] == 1],
    )
    (memory,) = new_memories(needs)
    whole = bind(layout, needs, data, [memory])
    executor.move(whole)
    uploads = []
    for version in range(4):
        data[1][version] ^= 1
        if version == 3:  # elsewhere, and aligned in another way
            data[1] = odd_copy(data[1], 2)
        bound = replace(bind(layout, needs, data, [memory]), plan=second)
        before = accelerator.uploads
        digests = executor.update(bound, [0, 1]).tolist()
        uploads.append(accelerator.uploads - before)
        everything = np.concatenate([data[0], data[1][:320]])
        assert digests == [digest_tensor(everything), digest_tensor(data[1][320:])]
    assert uploads == [9, 3, 3, 9]  # three programs: two tables and the addresses of each


def test_every_kernel_that_an_update_launches_has_been_compiled_before() -> None:
    layout, needs, cells, data = a_copy_in_two_parts()
    accelerator = WatchedAccelerator()
    executor = GpuExecutor(layout, needs, cells, accelerator)
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, data, [memory])
    executor.prepare(bound.plan)
    prepared = set(accelerator.launched)
    accelerator.launched.clear()
    executor.update(bound, [0, 1])
    executor.digest_cells(bound)
    executor.changed_parameter(bound)
    executor.read_back(bound)
    assert accelerator.launched <= prepared
    assert len({width for width, mode, _ in accelerator.launched if mode == READ}) == 2

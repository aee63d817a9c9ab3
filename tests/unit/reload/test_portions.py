"""Portions: what they hold together, and that moving them one by one moves everything."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.reload.models import Bag, ModuleHost, random_tensor, replay, same_bits
from tests.unit.transfer.publishing import HOST, Kind, cut_layout, open_trainer
from weightbus.consumers.planning.tiles import bind_tiles, plan_tiles
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.portions import cut_portions, part_of_plan
from weightbus.consumers.reload.staging import StagedSources
from weightbus.consumers.reload.tracer import trace_needs
from weightbus.consumers.transfer.segments import SegmentCache


def load(model: Any, weights: Weights) -> None:
    """Rows to `a`, columns to `b`, a cast to `c`, and a constant behind them all."""
    for name, weight in weights:
        number = int(name)
        model.a.data[10 * number : 10 * number + 10].copy_(weight)
        model.b.data[:, 10 * number : 10 * number + 10].copy_(weight.t())
        model.c.data[number].copy_(weight[0].to(torch.float64))
    model.a.data[80:].fill_(1.5)
    model.d.data.fill_(2.5)


def build() -> Bag:
    bag = Bag(a=(90, 7), b=(7, 80), d=(3,))
    bag.register_buffer("c", torch.zeros(8, 7, dtype=torch.float64))
    return bag


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("portion_bytes", [1, 300, 1_000, 10**9])
def test_all_is_moved_once_whatever_the_size_of_portions(
    portion_bytes: int, kind: Kind, tmp_path: Path
) -> None:
    tensors = {str(number): random_tensor((10, 7), torch.float32, number) for number in range(8)}
    tensors = {name: tensor.nan_to_num() for name, tensor in tensors.items()}
    layout = cut_layout(tensors, segments=3, seed=5)
    needs = trace_needs(ModuleHost(build, load), layout).needs
    plan = plan_tiles(layout, needs)
    portions = cut_portions(plan, portion_bytes)
    copies = [set(portion.plan.pieces.copy.tolist()) for portion in portions]
    assert sum(map(len, copies)) == len(set.union(*copies)) == len(needs.copies)
    assert [len(portion.plan.needs.fills) > 0 for portion in portions] == [True] + [False] * (
        len(portions) - 1
    )
    assert sum(portion.plan.tiles.size for portion in portions) == plan.tiles.size
    assert sum(portion.plan.source_bytes for portion in portions) == plan.source_bytes
    memory = [torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in needs.parameters]
    addresses = [tensor.data_ptr() for tensor in memory]
    sizes = [tensor.nbytes for tensor in memory]
    executor = CpuExecutor(layout, needs, ())
    cache = SegmentCache(HOST, [str(tmp_path)])
    with open_trainer(layout, kind, tmp_path) as trainer:
        sources = trainer.publish(tensors, 1)
        wanted_sizes = [spec.size_bytes for spec in layout.segments]
        with cache.open_all(sources, wanted_sizes) as segments, StagedSources(segments) as staged:
            moved = 0
            for portion in portions:
                with staged.fetched(portion.ranges) as fetched_bytes:
                    assert (fetched_bytes > 0) == (kind == "files")
                    bound = bind_tiles(
                        portion.plan, staged.addresses, staged.sizes_bytes, addresses, sizes
                    )
                    moved += executor.move(bound)
        cache.close()
    assert moved == plan.source_bytes
    made = replay(needs, list(tensors.values()))
    for spec, found in zip(needs.parameters, memory, strict=True):
        assert same_bits(found, made[spec.name]), spec.name


def test_ranges_are_few_and_hold_every_piece() -> None:
    source = random.Random(3)
    tensors = {str(number): torch.zeros(10, 7) for number in range(8)}
    layout = cut_layout(tensors, segments=2, seed=source.randrange(99))
    plan = plan_tiles(layout, trace_needs(ModuleHost(build, load), layout).needs)
    (portion,) = cut_portions(plan)
    assert [number for number, _, _ in portion.ranges] == [0, 1]
    for number, start, end in portion.ranges:
        assert 0 <= start < end <= layout.segments[number].size_bytes


def test_part_of_a_plan_reaches_into_its_own_parameters_only() -> None:
    tensors = {str(number): torch.zeros(10, 7) for number in range(8)}
    layout = cut_layout(tensors, segments=2)
    plan = plan_tiles(layout, trace_needs(ModuleHost(build, load), layout).needs)
    names = [spec.name for spec in plan.needs.parameters]
    part = part_of_plan(plan, [names.index("a")])
    assert [bool(end) for end in part.parameter_ends] == [name == "a" for name in names]
    assert [fill.value for fill in part.needs.fills] == [1.5]
    nothing = part_of_plan(plan, [])
    assert (nothing.tiles.size, nothing.source_bytes, nothing.needs.fills) == (0, 0, ())
    assert not cut_portions(nothing)[0].ranges

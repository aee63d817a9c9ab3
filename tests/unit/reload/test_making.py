"""Making parameters beside the live ones: how often a plan is bound for many of them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.unit.reload.models import Bag, ModuleHost, layout_of, load_by_name, random_tensor
from tests.unit.transfer.publishing import HOST, open_trainer
from weightbus.consumers.planning.tiles import BoundTiles, plan_tiles
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.making import made_parameters
from weightbus.consumers.reload.staging import StagedSources
from weightbus.consumers.reload.tracer import trace_needs
from weightbus.consumers.transfer.segments import SegmentCache

PARAMETERS = 5000


class CountingExecutor(CpuExecutor):
    """Counts the plans that it ran."""

    moves = 0

    def move(self, bound: BoundTiles) -> int:
        self.moves += 1
        return super().move(bound)


def test_plan_is_bound_once_when_thousands_of_small_parameters_are_made(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(PARAMETERS)]
    values = random_tensor((PARAMETERS, 3), torch.float32, 1)
    tensors = dict(zip(names, values, strict=True))
    host = ModuleHost(lambda: Bag(torch.float32, **dict.fromkeys(names, (3,))), load_by_name)
    whole = layout_of({"all": values})
    # One file, of which every tensor is a part.
    parts = layout_of(tensors)
    shards = tuple(
        type(shard)(shard.tensor, shard.starts, shard.sizes, 0, 12 * number)
        for number, shard in enumerate(parts.shards)
    )
    layout = type(parts)(parts.tensors, shards, whole.segments)
    trace = trace_needs(host, layout)
    plan = plan_tiles(layout, trace.needs)
    executor = CountingExecutor(layout, trace.needs, ())
    with open_trainer(layout, "files", tmp_path) as trainer:
        sources = trainer.publish(tensors, 1)
        cache = SegmentCache(HOST, trainer.roots)
        with cache.open_all(sources, [values.nbytes]) as opened, StagedSources(opened) as staged:
            deadline = Deadline("reload", 600.0)
            made = dict(made_parameters(plan, range(PARAMETERS), staged, executor.move, deadline))
    assert executor.moves == 1
    for number, spec in enumerate(trace.needs.parameters):
        assert torch.equal(made[number].view(torch.int32), tensors[spec.name].view(torch.int32))

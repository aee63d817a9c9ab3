"""How an update is split into steps, each of which is digested before the next begins."""

from __future__ import annotations

import pytest
import torch

from tests.unit.reload.models import Bag, ModuleHost, layout_of, load_by_name, random_tensor
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.planning.tiles import bind_tiles, plan_tiles
from weightbus.consumers.reload import split as split_module
from weightbus.consumers.reload.memory import state_tensors
from weightbus.consumers.reload.proof import Proof, memory_of
from weightbus.consumers.reload.split import split_update
from weightbus.consumers.reload.tracer import trace_needs

SHAPES = {"a": (8, 4), "b": (16,), "c": (3, 5), "d": (7,)}


@pytest.mark.parametrize(
    ("portion_bytes", "steps", "is_fetched"),
    [(1, 4, False), (1, 4, True), (200, 2, False), (2**20, 1, False), (2**20, 2, True)],
)
def test_every_cell_is_digested_once_and_with_its_copy_when_a_plan_is_cut(
    portion_bytes: int, steps: int, is_fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched first is cut finer, if the executor likes long steps."""
    monkeypatch.setattr(split_module, "PORTION_BYTES", 200)
    tensors = {
        name: random_tensor(shape, torch.float32, seed)
        for seed, (name, shape) in enumerate(SHAPES.items())
    }
    host = ModuleHost(lambda: Bag(torch.float32, **SHAPES), load_by_name)
    layout = layout_of(tensors)
    trace = trace_needs(host, layout)
    (cells,) = plan_cells(layout, [trace.needs]).cells
    everything = frozenset(range(len(SHAPES)))
    nothing: frozenset[int] = frozenset()
    proof = Proof(
        memory=memory_of(host.live),
        direct=everything,
        undecided=nothing,
        processed=nothing,
        modules=frozenset(),
        reasons=(),
    )
    plan = plan_tiles(layout, trace.needs)
    split = split_update(layout, plan, proof, cells, portion_bytes)
    chosen = split.fetched_steps if is_fetched else split.steps
    assert len(chosen) == steps
    sources = [tensor.data_ptr() for tensor in tensors.values()]
    sizes = [tensor.nbytes for tensor in tensors.values()]
    live = {item.name: item.tensor for item in state_tensors(host.live)}
    targets = [live[spec.name] for spec in trace.needs.parameters]
    memory = [t.data_ptr() for t in targets], [t.nbytes for t in targets]
    found: dict[int, int] = {}
    for portion, digested in chosen:
        copies = set(portion.plan.pieces.copy.tolist())
        assert {cells[split.moved_cells[cell]].copy for cell in digested} == copies
        bound = bind_tiles(portion.plan, sources, sizes, *memory)
        split.executor.move(bound)
        sums = split.executor.digest_cells(bound, digested).tolist()
        assert not found.keys() & set(digested)
        found.update(zip(digested, sums, strict=True))
    whole = split.executor.digest_cells(bind_tiles(split.plan, sources, sizes, *memory))
    assert [found[cell] for cell in range(len(split.moved_cells))] == whole.tolist()

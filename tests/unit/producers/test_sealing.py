"""Parts of several ranks -> one checkpoint: any cut adds up, and no fault goes through."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from weightbus.bus.digest import digest_tensor
from weightbus.producers.digesting import ThreadDigester
from weightbus.producers.digests import Sums
from weightbus.producers.errors import TensorInvalid
from weightbus.producers.sealing import add_digests, plan_seal, seal_placement
from weightbus.producers.shards import Part, Shard, plan_part
from weightbus.producers.writing import write_part
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout, SegmentSpec
from weightbus.schemas.placement import FileSegment


def _write(part: Part) -> tuple[bytes, Sums]:
    data = bytearray(part.layout.segments[0].size_bytes)
    digester = ThreadDigester(part.layout, memoryview(data), 1)
    digests = write_part(part, memoryview(data), digester, lambda: None)
    return bytes(data), digests


def _read(layout: Layout, segments: list[bytes]) -> dict[str, torch.Tensor]:
    """Every tensor of a layout of F32, put together from the segments."""
    tensors = {spec.name: torch.full(spec.shape, float("nan")) for spec in layout.tensors}
    for shard in layout.shards:
        raw = segments[shard.segment]
        count = int(np.prod(shard.sizes))
        values = torch.frombuffer(
            bytearray(raw), dtype=torch.float32, count=count, offset=shard.offset_bytes
        )
        ends = map(int.__add__, shard.starts, shard.sizes)
        box = tuple(map(slice, shard.starts, ends))
        tensors[layout.tensors[shard.tensor].name][box] = values.reshape(shard.sizes)
    return tensors


@pytest.mark.parametrize("seed", range(20))
def test_parts_add_up_when_tensors_are_cut_at_random(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    ranks = chance.randint(1, 4)
    whole = {
        f"t{n}": torch.randn([chance.randint(1, 6) for _ in range(chance.randint(0, 3))])
        for n in range(8)
    }
    held: list[list[Shard]] = [[] for _ in range(ranks)]
    for name, tensor in whole.items():
        shape = tuple(tensor.shape)
        cut = chance.randint(0, shape[0]) if shape else 0
        if not shape or cut in (0, shape[0]):
            for rank in chance.sample(range(ranks), chance.randint(1, ranks)):
                held[rank].append(Shard(name, tensor))
            continue
        zeros = (0,) * (len(shape) - 1)
        held[chance.randrange(ranks)].append(Shard(name, tensor[:cut], shape, (0, *zeros)))
        held[chance.randrange(ranks)].append(Shard(name, tensor[cut:], shape, (cut, *zeros)))
    parts = [plan_part(shards) for shards in held]
    written = [_write(part) for part in parts]
    plan = plan_seal([part.layout for part in parts])
    found = _read(plan.layout, [written[rank][0] for rank, _ in plan.segments])
    digests = add_digests(plan, [digests for _, digests in written])
    assert set(found) == set(whole)
    for number, spec in enumerate(plan.layout.tensors):
        tensor = whole[spec.name]
        assert torch.equal(found[spec.name], tensor)
        raw = np.frombuffer(tensor.contiguous().numpy().tobytes(), dtype=np.uint8)
        assert digests[number] == digest_tensor(raw), f"seed {seed}: {spec.name}"


def test_seal_takes_replicas_once_when_all_ranks_hold_the_same() -> None:
    part = plan_part({"w": torch.ones(3), "b": torch.ones(2)})
    plan = plan_seal([part.layout] * 3)
    assert plan.segments == ((0, 0),)
    assert len(plan.layout.shards) == 2
    ways = [((FileSegment(path=f"/{rank}"),),) for rank in range(3)]
    assert seal_placement(plan, ways) == ways[0]


def test_seal_keeps_a_segment_when_no_rank_holds_a_byte() -> None:
    plan = plan_seal([plan_part({"e": torch.zeros(0)}).layout] * 2)
    assert plan.segments == ((0, 0),)
    assert add_digests(plan, [np.zeros(0, np.uint64)] * 2).tolist() == [0]


def test_seal_refuses_when_replicas_differ() -> None:
    parts = [plan_part({"b": torch.ones(2), "w": torch.full((3,), n)}) for n in (1.0, 2.0)]
    plan = plan_seal([part.layout for part in parts])
    with pytest.raises(TensorInvalid, match=r"tensor w is held by several ranks.*rank 1"):
        add_digests(plan, [_write(part)[1] for part in parts])


def test_seal_refuses_when_ranks_disagree_on_a_tensor() -> None:
    parts = [plan_part({"w": torch.ones(2)}), plan_part({"w": torch.ones(3)})]
    with pytest.raises(TensorInvalid, match=r"w is F32 \(3,\) on rank 1: is F32 \(2,\)"):
        plan_seal([part.layout for part in parts])


def test_seal_refuses_when_a_rank_gives_a_box_twice() -> None:
    other = plan_part({"a": torch.ones(1), "w": torch.ones(2)})
    twice = plan_part([Shard("w", torch.ones(2)), Shard("w", torch.zeros(2))])
    with pytest.raises(TensorInvalid, match="w is on rank 1: must not be given twice"):
        plan_seal([other.layout, twice.layout])


def test_seal_refuses_when_elements_are_missing() -> None:
    part = plan_part([Shard("w", torch.ones(2), (5,), (0,))])
    with pytest.raises(MessageInvalid, match="every element"):
        plan_seal([part.layout])


def test_seal_refuses_when_boxes_of_ranks_overlap() -> None:
    parts = [
        plan_part([Shard("w", torch.ones(3), (5,), (0,))]),
        plan_part([Shard("w", torch.ones(3), (5,), (2,))]),
    ]
    with pytest.raises(MessageInvalid, match="overlaps"):
        plan_seal([part.layout for part in parts])


def test_seal_is_refused_when_no_rank_has_a_tensor() -> None:
    nothing = Layout((), (), (SegmentSpec(size_bytes=256),))
    with pytest.raises(TensorInvalid, match="at least one tensor"):
        plan_seal([nothing, nothing])

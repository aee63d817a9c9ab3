"""What a rank holds, as a layout: order, alignment, boxes of DTensors, and everything refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from weightbus.producers.errors import TensorInvalid
from weightbus.producers.shards import ALIGNMENT_BYTES, Shard, plan_part
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import check_layout, decode_layout, encode_layout


def test_plan_keeps_order_and_aligns_when_given_a_state_dict() -> None:
    part = plan_part({"z": torch.zeros(3, 5), "a": torch.tensor(1.0), "e": torch.zeros(0, 4)})
    assert part.layout.tensors == (
        TensorSpec("z", "F32", (3, 5)),
        TensorSpec("a", "F32", ()),
        TensorSpec("e", "F32", (0, 4)),
    )
    assert part.layout.shards == (
        ShardSpec(0, (0, 0), (3, 5), 0, 0),
        ShardSpec(1, (), (), 0, ALIGNMENT_BYTES),
    )
    assert part.layout.segments[0].size_bytes == 2 * ALIGNMENT_BYTES
    check_layout(part.layout)


def test_plan_has_a_segment_when_there_is_no_byte() -> None:
    part = plan_part({})
    assert part.layout.shards == ()
    assert part.layout.segments[0].size_bytes == ALIGNMENT_BYTES


def test_plan_knows_every_dtype_of_safetensors() -> None:
    names = {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
    assert set(names) == set(DTYPE_BYTES)
    part = plan_part({name: torch.zeros(2, dtype=dtype) for name, dtype in names.items()})
    assert [spec.dtype for spec in part.layout.tensors] == [
        spec.name for spec in part.layout.tensors
    ]


def test_plan_publishes_both_names_when_tensors_are_tied() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 2))
    part = plan_part({"embed": weight, "head": weight})
    assert [shard.tensor for shard in part.layout.shards] == [0, 1]
    assert part.layout.shards[0].offset_bytes != part.layout.shards[1].offset_bytes
    check_layout(part.layout)


def test_plan_gathers_boxes_when_shards_share_a_name() -> None:
    rows = (
        Shard("w", torch.zeros(2, 4), (5, 4), (0, 0)),
        Shard("b", torch.zeros(4)),
        Shard("w", torch.zeros(3, 4), (5, 4), (2, 0)),
    )
    part = plan_part(iter(rows))
    assert [spec.name for spec in part.layout.tensors] == ["w", "b"]
    assert [(s.tensor, s.starts, s.sizes) for s in part.layout.shards] == [
        (0, (0, 0), (2, 4)),
        (1, (0,), (4,)),
        (0, (2, 0), (3, 4)),
    ]
    check_layout(part.layout)


def test_plan_takes_numpy_integers_when_they_name_a_box() -> None:
    box = Shard("w", torch.zeros(2), tuple(np.array([4])), tuple(np.array([2])))
    assert decode_layout(encode_layout(plan_part([box]).layout), partial=True).shards[0].starts == (
        2,
    )


@pytest.mark.parametrize(
    ("tensors", "named", "limit"),
    [
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "w is torch.complex128", "BF16"),
        ({"w": torch.zeros(2, device="meta")}, "meta", "must have data"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "sparse", "dense"),
        ({"w": torch.zeros((1,) * 9)}, "9-dimensional", "at most 8"),
        ({"w": 3}, "w is of type int", "torch.Tensor"),
        ({"w": np.zeros(3)}, "ndarray", "torch.Tensor"),
        ({7: torch.zeros(1)}, "7 is named by a value of type int", "str"),
        ({"": torch.zeros(1)}, "a name of 0 characters", "1 to 512"),
        ({"n" * 513: torch.zeros(1)}, "a name of 513 characters", "1 to 512"),
        ([torch.zeros(1)], "number 0 is of type Tensor", "must be a Shard"),
        ([Shard("w", torch.zeros(2), (2, 2), (0, 0))], "box of sizes (2,)", "dimensions"),
        ([Shard("w", torch.zeros(2), (3,), (2,))], "(2,) at (2,) of shape (3,)", "inside"),
        ([Shard("w", torch.zeros(2), (3,), (-1,))], "at (-1,)", "inside"),
        ([Shard("w", torch.zeros(2), (4,)), Shard("w", torch.zeros(2), (5,))], "F32 (5,)", "(4,)"),
        (
            [Shard("w", torch.zeros(2)), Shard("w", torch.zeros(2, dtype=torch.int8))],
            "w is I8 (2,)",
            "F32 (2,)",
        ),
    ],
)
def test_plan_names_tensor_value_and_limit_when_it_is_refused(
    tensors: Any, named: str, limit: str
) -> None:
    with pytest.raises(TensorInvalid) as refused:
        plan_part(tensors)
    assert named in str(refused.value)
    assert limit in str(refused.value)


@pytest.fixture
def fake_ranks() -> Iterator[Any]:
    """Turns this process into rank r of n, with a backend that communicates with nobody."""

    def become(rank: int, ways: tuple[int, ...]) -> DeviceMesh:
        if dist.is_initialized():
            dist.destroy_process_group()
        count = int(np.prod(ways))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
        return DeviceMesh("cpu", torch.arange(count).reshape(ways))

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "ways", "placements"),
    [
        ((8, 3), (4,), (ShardPlacement(0),)),
        ((7, 3), (4,), (ShardPlacement(0),)),
        ((5, 3), (4,), (ShardPlacement(0),)),
        ((2, 9), (4,), (ShardPlacement(1),)),
        ((6, 6), (2, 2), (Replicate(), ShardPlacement(1))),
        ((6, 6), (2, 3), (ShardPlacement(0), ShardPlacement(1))),
        ((8, 2), (2, 2), (ShardPlacement(0), ShardPlacement(0))),
        ((8, 2), (2, 2), (_StridedShard(0, split_factor=2), ShardPlacement(0))),
        ((4,), (2, 2), (Replicate(), Replicate())),
        ((), (2,), (Replicate(),)),
    ],
    ids=str,
)
def test_dtensor_boxes_hold_every_element_once_when_all_ranks_are_taken(
    fake_ranks: Any,
    shape: tuple[int, ...],
    ways: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> None:
    whole = torch.arange(float(np.prod(shape, dtype=int))).reshape(shape)
    found = torch.full(shape, -1.0)
    for rank in range(int(np.prod(ways))):
        mesh = fake_ranks(rank, ways)
        local = _local_of(whole, mesh, placements)
        tensor = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        part = plan_part({"w": tensor})
        assert part.layout.tensors == (TensorSpec("w", "F32", shape),)
        for shard, source in zip(part.layout.shards, part.sources, strict=True):
            box = tuple(
                slice(start, start + size)
                for start, size in zip(shard.starts, shard.sizes, strict=True)
            )
            assert bool((found[box] == -1).all()), f"rank {rank} holds elements of another"
            found[box] = source
    assert torch.equal(found, whole)


def _local_of(
    whole: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> torch.Tensor:
    """What torch itself gives this rank of a whole tensor."""
    local = whole
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for where, ways, placement in zip(coordinate, mesh.shape, placements, strict=True):
        if isinstance(placement, ShardPlacement | _StridedShard):
            pieces, _ = placement._split_tensor(local, ways, with_padding=False, contiguous=True)
            local = pieces[where]
    return local


def test_dtensor_is_refused_when_partial(fake_ranks: Any) -> None:
    mesh = fake_ranks(0, (2,))
    tensor = DTensor.from_local(torch.zeros(2), mesh, (Partial(),), run_check=False)
    with pytest.raises(TensorInvalid, match="must be Shard or Replicate"):
        plan_part({"w": tensor})


def test_dtensor_is_refused_when_rows_of_a_rank_are_not_one_box(fake_ranks: Any) -> None:
    mesh = fake_ranks(0, (2, 2))
    placements = (ShardPlacement(0), _StridedShard(0, split_factor=2))
    tensor = DTensor.from_local(
        torch.zeros(2, 1),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size((8, 1)),
        stride=(1, 1),
    )
    with pytest.raises(TensorInvalid, match="must be one box on every rank"):
        plan_part({"w": tensor})


def test_dtensor_is_refused_when_wrapped_in_a_shard(fake_ranks: Any) -> None:
    mesh = fake_ranks(0, (2,))
    tensor = DTensor.from_local(torch.zeros(2), mesh, (ShardPlacement(0),), run_check=False)
    with pytest.raises(TensorInvalid, match="must be a local tensor"):
        plan_part([Shard("w", tensor)])


def test_part_holds_the_old_memory_when_a_parameter_has_got_another() -> None:
    """As its docstring warns: values changed in place are seen, new memory is not."""
    model = torch.nn.Linear(2, 2)
    part = plan_part(model.state_dict())
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert torch.equal(part.sources[0], model.weight)
    model.weight.data = torch.full((2, 2), 2.0)
    assert not torch.equal(part.sources[0], model.weight)
    assert torch.equal(plan_part(model.state_dict()).sources[0], model.weight)

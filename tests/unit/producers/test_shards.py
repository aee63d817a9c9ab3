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


def test_plan_names_what_is_published_when_a_dtype_is_given() -> None:
    source = {
        "single": torch.zeros(3),
        "double": torch.zeros(3, dtype=torch.float64),
        "half": torch.zeros(3, dtype=torch.float16),
        "brain": torch.zeros(3, dtype=torch.bfloat16),
        "eight": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "whole": torch.zeros(3, dtype=torch.int64),
        "truth": torch.zeros(3, dtype=torch.bool),
        "complex": torch.zeros(3, dtype=torch.complex64),
    }
    part = plan_part(source, dtype=torch.bfloat16)
    dtypes = [spec.dtype for spec in part.layout.tensors]
    assert dtypes == ["BF16"] * 4 + ["F8_E4M3", "I64", "BOOL", "C64"]
    assert part.size_bytes == 4 * 6 + 3 + 24 + 3 + 24
    assert [each.dtype for each in part.sources] == [each.dtype for each in source.values()]
    check_layout(part.layout)
    large = plan_part({"a": torch.zeros(100), "b": torch.zeros(1)}, dtype=torch.float64)
    assert [shard.offset_bytes for shard in large.layout.shards] == [0, 1024]


def test_plan_asks_for_each_name_when_the_dtype_is_a_function() -> None:
    def cast(name: str) -> torch.dtype | None:
        wanted = {"a": torch.bfloat16, "b": torch.float64, "ints": torch.float32}
        return {**wanted, "steps": torch.int64}.get(name)

    tensors = {name: torch.zeros(2) for name in ("a", "b", "c")}
    tensors["ints"] = torch.zeros(2, dtype=torch.int8)
    tensors["steps"] = torch.zeros(2, dtype=torch.int64)
    part = plan_part(tensors, dtype=cast)
    assert [spec.dtype for spec in part.layout.tensors] == ["BF16", "F64", "F32", "I8", "I64"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_plan_names_dtypes_when_it_cannot_cast_to_one(dtype: torch.dtype) -> None:
    with pytest.raises(
        TensorInvalid, match=rf"w is to be cast to {dtype}: must be one of torch.bfloat16, torch"
    ):
        plan_part({"w": torch.zeros(2)}, dtype=dtype)


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


@pytest.mark.parametrize("ways", [(4, 2), (2, 4), (3, 2), (2, 3)], ids=str)
def test_dtensor_boxes_are_those_of_fsdp_when_it_cuts_uneven_tensor_parallel_rows(
    fake_ranks: Any, ways: tuple[int, int]
) -> None:
    """FSDP2 cuts what tensor parallelism has left of the rows, though its mesh comes first."""
    data_parallel, tensor_parallel = ways
    placements = (_StridedShard(0, split_factor=tensor_parallel), ShardPlacement(0))
    for rank in range(data_parallel * tensor_parallel):
        mesh = fake_ranks(rank, ways)
        first, second = mesh.get_coordinate()
        for rows in range(1, 20):
            whole = torch.arange(2.0 * rows).reshape(rows, 2)
            piece = _torch_chunk(_torch_chunk(whole, second, tensor_parallel), first, data_parallel)
            tensor = DTensor.from_local(
                piece, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
            )
            part = plan_part({"w": tensor})
            assert [tuple(each.shape) for each in part.sources] == [(len(piece), 2)] * bool(
                len(piece)
            )
            for shard, source in zip(part.layout.shards, part.sources, strict=True):
                (row, _), (count, _) = shard.starts, shard.sizes
                assert torch.equal(source, whole[row : row + count]), (rows, rank)


def _torch_chunk(tensor: torch.Tensor, number: int, count: int) -> torch.Tensor:
    chunks = tensor.chunk(count)
    return chunks[number] if number < len(chunks) else tensor[:0]


def test_dtensor_is_refused_when_it_holds_rows_that_it_should_not(fake_ranks: Any) -> None:
    """Also where none are expected: nobody would publish them."""
    mesh = fake_ranks(3, (4,))
    for rows in (1, 2):
        tensor = DTensor.from_local(
            torch.zeros(rows, 2),
            mesh,
            (ShardPlacement(0),),
            run_check=False,
            shape=torch.Size((3, 2)),
            stride=(2, 1),
        )
        with pytest.raises(
            TensorInvalid, match=rf"\({rows}, 2\) of \(3, 2\) here: must be one box"
        ):
            plan_part({"w": tensor})


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


def test_module_is_refused_with_the_way_to_plan_it() -> None:
    with pytest.raises(TensorInvalid, match="plan_module makes one of a module"):
        plan_part(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_cast_to_no_dtype_is_refused() -> None:
    with pytest.raises(TensorInvalid, match=r"to be cast to 'bf16': must be a torch\.dtype"):
        plan_part({"w": torch.zeros(2)}, dtype="bf16")  # type: ignore[arg-type]

"""Random checkpoints, cut into shards, and engines that need parts of them; all from one seed.

`expected_parameters` says what every parameter must hold afterwards, element by element, from the
needs alone: it knows nothing of shards, pieces or tiles.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import check_layout
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec, Transform
from weightbus.schemas.needs_codec import check_needs

__all__ = (
    "UNWRITTEN",
    "Box",
    "Bytes",
    "World",
    "box_of",
    "expected_parameters",
    "make_world",
    "memory_bytes",
)

Bytes = npt.NDArray[np.uint8]
Box = list[tuple[int, int]]
"""(start, end) of every dimension."""

UNWRITTEN = 0xA5
"""What every byte of a parameter holds before an update."""


@dataclass(frozen=True, eq=False)
class World:
    """A layout, the bytes of its segments and tensors, and what every rank needs."""

    layout: Layout
    segments: list[Bytes]
    tensors: list[Bytes]
    """The bytes of every whole tensor."""
    needs: list[Needs]


def cut(shape: tuple[int, ...], rng: random.Random, times: int) -> list[Box]:
    """Boxes that tile a shape: cut in two at random places, up to `times`."""
    boxes: list[Box] = [[(0, extent) for extent in shape]]
    for _ in range(times):
        box = boxes.pop(rng.randrange(len(boxes)))
        wide = [dim for dim, (start, end) in enumerate(box) if end - start > 1]
        if not wide:
            boxes.append(box)
            continue
        dim = rng.choice(wide)
        start, end = box[dim]
        middle = rng.randint(start + 1, end - 1)
        boxes += [[*box[:dim], half, *box[dim + 1 :]] for half in ((start, middle), (middle, end))]
    return boxes


def make_world(seed: int, ranks: int = 3, *, transforms: bool = True) -> World:
    """A world of a few small tensors; `ranks` ranks that split, repeat or leave them."""
    rng = random.Random(seed)
    specs = [
        TensorSpec(
            f"t{number}",
            rng.choice(["U8", "F16", "BF16", "F32", "F64"]),
            tuple(rng.choice([0, 1, 2, 3, 5, 8, 13, 40]) for _ in range(rng.randint(0, 3))),
        )
        for number in range(rng.randint(1, 6))
    ]
    content = np.random.default_rng(seed)
    tensors = [content.integers(0, 256, spec_bytes(spec), dtype=np.uint8) for spec in specs]
    ends = [0] * rng.randint(1, 3)
    shards, places = [], []
    for number, spec in enumerate(specs):
        for box in cut(spec.shape, rng, rng.choice([0, 0, 1, 4])):
            segment, step = rng.randrange(len(ends)), rng.choice([1, 2, 8, 256])
            offset = -(-ends[segment] // step) * step
            starts, sizes = tuple(a for a, _ in box), tuple(b - a for a, b in box)
            shards.append(ShardSpec(number, starts, sizes, segment, offset))
            data = box_of(tensors[number], spec, box)
            places.append((segment, offset, data))
            ends[segment] = offset + data.size
    segments = [content.integers(0, 256, end + rng.randint(0, 9), dtype=np.uint8) for end in ends]
    for segment, offset, data in places:
        segments[segment][offset : offset + data.size] = data
    rng.shuffle(shards)
    layout = Layout(
        tuple(specs), tuple(shards), tuple(SegmentSpec(len(segment)) for segment in segments)
    )
    check_layout(layout)
    needs = _make_needs(layout, rng, ranks, transforms)
    for one in needs:
        check_needs(one, layout)
    return World(layout, segments, tensors, needs)


def spec_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtype]


def box_of(tensor: Bytes, spec: TensorSpec, box: Box) -> Bytes:
    """The bytes of one box, one after the other."""
    whole = tensor.reshape(*spec.shape, DTYPE_BYTES[spec.dtype])
    part = whole[tuple(slice(start, end) for start, end in box)]
    return np.ascontiguousarray(part).reshape(-1)


def memory_bytes(parameter: ParameterSpec) -> int:
    """Bytes of a parameter's memory, from its first element to its last."""
    if 0 in parameter.shape:
        return 0
    steps = zip(parameter.shape, parameter.strides, strict=True)
    return DTYPE_BYTES[parameter.dtype] * (1 + sum((n - 1) * stride for n, stride in steps))


@dataclass
class _Rank:
    parameters: list[ParameterSpec]
    copies: list[Copy]
    fills: list[Fill]


def _make_needs(layout: Layout, rng: random.Random, count: int, transforms: bool) -> list[Needs]:
    ranks = [_Rank([], [], []) for _ in range(count)]
    for number, tensor in enumerate(layout.tensors):
        way = rng.choice(["replicated", "split", "boxes", "overlapping", "tied", "absent"])
        for index, rank in enumerate(ranks):
            if way == "absent" or (way == "boxes" and rng.random() < 0.3):
                continue
            boxes: list[Box] = [[(0, extent) for extent in tensor.shape]]
            if way == "split" and tensor.shape:
                dim = max(range(len(tensor.shape)), key=lambda d: tensor.shape[d])
                extent = tensor.shape[dim]
                boxes[0][dim] = (extent * index // count, extent * (index + 1) // count)
            elif way == "boxes":
                boxes = cut(tensor.shape, rng, 2)
                boxes = rng.sample(boxes, rng.randint(0, len(boxes)))
            elif way == "overlapping":
                boxes = [[_part(extent, rng) for extent in tensor.shape]]
            for box in boxes * (2 if way == "tied" else 1):
                _add_parameter(rank, number, tensor, box, rng, transforms)
    return [
        Needs(
            tuple(rank.parameters),
            tuple(rank.copies),
            tuple(rank.fills),
            (Transform((("cast", "F64"),)),) if transforms else (),
        )
        for rank in ranks
    ]


def _part(extent: int, rng: random.Random) -> tuple[int, int]:
    start = rng.randint(0, extent)
    return start, rng.randint(start, extent)


def _add_parameter(
    rank: _Rank, number: int, tensor: TensorSpec, box: Box, rng: random.Random, transforms: bool
) -> None:
    """A parameter that takes a box, its dimensions in any order, perhaps padded, perhaps cast."""
    sizes = [end - start for start, end in box]
    order = rng.sample(range(len(sizes)), len(sizes))
    shape = [sizes[dim] for dim in order]
    padding = rng.choice([0, 0, 3]) if shape and 0 not in shape else 0
    if padding:
        shape[0] += padding
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cast = transforms and tensor.dtype == "F32" and rng.random() < 0.5
    parameter = len(rank.parameters)
    dtype = "F64" if cast else tensor.dtype
    rank.parameters.append(ParameterSpec(f"p{parameter}", dtype, tuple(shape), tuple(strides)))
    rank.copies.append(
        Copy(
            number,
            tuple(start for start, _ in box),
            tuple(sizes),
            parameter,
            0,
            tuple(strides[order.index(dim)] for dim in range(len(sizes))),
            0 if cast else -1,
        )
    )
    if padding:
        first = (shape[0] - padding) * strides[0]
        fill = Fill(parameter, first, (padding, *shape[1:]), tuple(strides), 1.0)
        rank.fills.append(fill)


def expected_parameters(world: World, rank: int) -> list[Bytes]:
    """What the copies of a rank leave in its parameters; fills are left unwritten."""
    needs = world.needs[rank]
    memories = [np.full(memory_bytes(one), UNWRITTEN, dtype=np.uint8) for one in needs.parameters]
    for copy in needs.copies:
        spec = world.layout.tensors[copy.tensor]
        box = [(start, start + size) for start, size in zip(copy.starts, copy.sizes, strict=True)]
        elements = box_of(world.tensors[copy.tensor], spec, box)
        elements = elements.reshape(-1, DTYPE_BYTES[spec.dtype])
        if copy.transform >= 0:
            with np.errstate(invalid="ignore"):  # random bits are signalling NaNs at times
                elements = elements.view("<f4").astype("<f8").view(np.uint8)
        places = np.full(copy.sizes, copy.offset)
        for dim, stride in enumerate(copy.strides):
            steps = stride * np.arange(copy.sizes[dim])
            places += steps.reshape([-1 if d == dim else 1 for d in range(len(copy.sizes))])
        memory = memories[copy.parameter].reshape(-1, elements.shape[1])
        memory[places.reshape(-1)] = elements
    return memories

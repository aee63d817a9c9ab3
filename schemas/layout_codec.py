"""Layouts to bytes and back, and the rules that a layout and its placement must keep.

Does no I/O. A layout that leaves `decode_layout` or `check_layout` has known dtypes, unique names,
every shard inside its tensor and its segment, no byte of a segment in two shards, and every element
of every tensor in exactly one shard. One pass over the shards; what lies in order is never sorted.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from math import prod
from operator import add, le
from typing import Final, NoReturn

import msgspec

from weightbus.schemas.blobs import canonical, compress, decode_object, digest_of, inflate
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout, ShardSpec, TensorSpec
from weightbus.schemas.limits import DEFAULT_LIMITS, MAX_ELEMENTS, Limits
from weightbus.schemas.overlap import Box, StepBudget, find_overlap
from weightbus.schemas.placement import Placement
from weightbus.schemas.rules import check_ways

__all__ = (
    "check_layout",
    "check_placement",
    "decode_layout",
    "digest_of",
    "encode_layout",
    "layout_digest",
    "tensor_bytes",
)

OVERLAP_STEPS_FREE: Final = 1_000_000
"""Steps of the overlap search that every layout is granted, however few its shards."""

_DECODER = msgspec.msgpack.Decoder(Layout)


def encode_layout(layout: Layout, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The blob to store. Checked, but for coverage: it may be a part (see `check_layout`).

    Raises:
        MessageInvalid: a field does not hold what its type says, or any other rule broken.
    """
    raw = canonical("layout", layout)
    check_layout(decode_object("layout", raw, _DECODER), limits, partial=True)
    return compress(raw)


def decode_layout(blob: bytes, limits: Limits = DEFAULT_LIMITS, *, partial: bool = False) -> Layout:
    """The layout in a blob, checked; `partial`: as in `check_layout`.

    Raises:
        MessageInvalid: not readable, or any rule broken.
    """
    layout = decode_object("layout", inflate("layout", blob, limits), _DECODER)
    check_layout(layout, limits, partial=partial)
    return layout


def layout_digest(layout: Layout) -> str:
    """The layout's digest: equal to `digest_of(encode_layout(layout))`, without compressing.

    Raises:
        MessageInvalid: a field does not hold what its type says.
    """
    return hashlib.sha256(canonical("layout", layout)).hexdigest()


def tensor_bytes(tensor: TensorSpec) -> int:
    """Size of a whole tensor whose dtype is known."""
    return prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def check_layout(layout: Layout, limits: Limits = DEFAULT_LIMITS, *, partial: bool = False) -> None:
    """Every rule of a layout. `partial`: a part of one, whose shards need not cover its tensors.

    Raises:
        MessageInvalid: names the tensor or shard at fault.
    """
    _check_count("tensors", len(layout.tensors), limits.max_tensors)
    _check_count("shards", len(layout.shards), limits.max_shards)
    _check_count("segments", len(layout.segments), limits.max_segments)
    sizes = _check_tensors(layout)
    shard_sizes, of_tensor = _check_shards(layout, sizes)
    _check_segment_overlaps(layout, shard_sizes)
    budget = StepBudget(OVERLAP_STEPS_FREE + limits.max_overlap_steps_per_shard * len(shard_sizes))
    _check_box_overlaps(layout, of_tensor, budget)
    if not partial:
        _check_coverage(layout, sizes, shard_sizes)


def check_placement(layout: Layout, placement: Placement) -> None:
    """A placement must offer at least one way to every segment of the layout, in its order.

    Raises:
        MessageInvalid: another number of segments, or a way that breaks a rule.
    """
    if len(placement) != len(layout.segments):
        limit = f"the layout has {len(layout.segments)} segments"
        raise MessageInvalid("placement", "$", f"for {len(placement)} segments", limit)
    check_ways("placement", "", placement)


def _check_count(field: str, found: int, limit: int) -> None:
    if found > limit:
        raise MessageInvalid("layout", field, f"{found} long", f"at most {limit}")


def _check_tensors(layout: Layout) -> list[int]:
    """Bytes of every tensor."""
    sizes = []
    for number, tensor in enumerate(layout.tensors):
        element_bytes = DTYPE_BYTES.get(tensor.dtype)
        if element_bytes is None:
            _refuse_tensor(number, tensor, "dtype", tensor.dtype, _known_dtypes())
        size = prod(tensor.shape) * element_bytes
        extent = size or prod(max(n, 1) for n in tensor.shape) * element_bytes
        if extent > MAX_ELEMENTS:
            limit = f"at most {MAX_ELEMENTS} bytes, counting an extent of 0 as 1"
            _refuse_tensor(number, tensor, "shape", tensor.shape, limit)
        sizes.append(size)
    _check_names(layout)
    return sizes


def _check_names(layout: Layout) -> None:
    names = {tensor.name for tensor in layout.tensors}
    if len(names) == len(layout.tensors):
        return
    seen: dict[str, int] = {}
    for number, tensor in enumerate(layout.tensors):
        first = seen.setdefault(tensor.name, number)
        if first != number:
            limit = f"names must be unique; tensors[{first}] has it too"
            raise MessageInvalid("layout", f"tensors[{number}].name", tensor.name, limit)


def _check_shards(layout: Layout, sizes: list[int]) -> tuple[list[int], dict[int, list[int]]]:
    """Bytes of every shard; and of tensors cut in several: tensor number -> its shards."""
    tensors, segments = layout.tensors, layout.segments
    segment_sizes = [segment.size_bytes for segment in segments]
    first_shard = [-1] * len(tensors)
    shard_sizes: list[int] = []
    of_tensor: dict[int, list[int]] = {}
    for number, shard in enumerate(layout.shards):
        t = shard.tensor
        if t >= len(tensors):
            _refuse_shard(number, "tensor", t, f"the layout has {len(tensors)} tensors")
        if shard.segment >= len(segment_sizes):
            _refuse_shard(number, "segment", shard.segment, f"of {len(segment_sizes)} segments")
        if (
            shard.sizes == tensors[t].shape
            and len(shard.starts) == len(shard.sizes)
            and not any(shard.starts)
        ):
            size = sizes[t]
        else:
            _check_box(number, shard, tensors[t])
            size = prod(shard.sizes) * DTYPE_BYTES[tensors[t].dtype]
        if shard.offset_bytes + size > segment_sizes[shard.segment]:
            limit = f"{size} bytes must end within the segment's {segment_sizes[shard.segment]}"
            _refuse_shard(number, "offset_bytes", shard.offset_bytes, limit)
        shard_sizes.append(size)
        if first_shard[t] < 0:
            first_shard[t] = number
        else:
            of_tensor.setdefault(t, [first_shard[t]]).append(number)
    return shard_sizes, of_tensor


def _check_box(number: int, shard: ShardSpec, tensor: TensorSpec) -> None:
    starts, sizes, shape = shard.starts, shard.sizes, tensor.shape
    if len(starts) == len(sizes) == len(shape) and all(map(le, map(add, starts, sizes), shape)):
        return
    for field, found in (("starts", starts), ("sizes", sizes)):
        if len(found) != len(shape):
            limit = f"tensor {tensor.name} has {len(shape)} dimensions"
            _refuse_shard(number, field, found, limit)
    d = next(d for d, extent in enumerate(shape) if starts[d] + sizes[d] > extent)
    limit = f"must lie within {shape[d]}, the extent of tensor {tensor.name}"
    _refuse_shard(number, f"sizes[{d}]", f"{sizes[d]} from {starts[d]}", limit)


def _check_segment_overlaps(layout: Layout, shard_sizes: list[int]) -> None:
    """Segments whose shards come in the order of their offsets are done in one pass."""
    ends = [0] * len(layout.segments)
    unordered: set[int] = set()
    for shard, size in zip(layout.shards, shard_sizes, strict=True):
        if size:
            if shard.offset_bytes < ends[shard.segment]:
                unordered.add(shard.segment)
            ends[shard.segment] = shard.offset_bytes + size
    if not unordered:
        return
    spans = sorted(
        (shard.segment, shard.offset_bytes, number)
        for number, (shard, size) in enumerate(zip(layout.shards, shard_sizes, strict=True))
        if size and shard.segment in unordered
    )
    for (segment, offset, number), (next_segment, next_offset, other) in pairwise(spans):
        if segment == next_segment and offset + shard_sizes[number] > next_offset:
            limit = f"shards[{number}] takes bytes {offset} to {offset + shard_sizes[number]}"
            _refuse_shard(other, "offset_bytes", next_offset, f"{limit} of segment {segment}")


def _check_box_overlaps(
    layout: Layout, of_tensor: dict[int, list[int]], budget: StepBudget
) -> None:
    for t, numbers in of_tensor.items():
        shards = [layout.shards[number] for number in numbers]
        if _cut_in_slices(shards, layout.tensors[t].shape):
            continue
        boxes = [
            Box(shard.starts, tuple(map(add, shard.starts, shard.sizes)), number)
            for number, shard in zip(numbers, shards, strict=True)
            if all(shard.sizes)
        ]
        pair = find_overlap(boxes, budget)
        if pair is not None:
            first, second = sorted(box.shard for box in pair)
            limit = f"overlaps shards[{first}] of tensor {layout.tensors[t].name}"
            _refuse_shard(second, "starts", layout.shards[second].starts, limit)


def _cut_in_slices(shards: list[ShardSpec], shape: tuple[int, ...]) -> bool:
    """Follow one another along the first dimension that is cut: the common case, quickly."""
    d = next((d for d, size in enumerate(shards[0].sizes) if size != shape[d]), None)
    if d is None:
        return False
    end = 0
    for shard in shards:
        start = shard.starts[d]
        if start < end:
            return False
        end = start + shard.sizes[d]
    return True


def _check_coverage(layout: Layout, sizes: list[int], shard_sizes: list[int]) -> None:
    """Nothing overlaps and everything lies inside, so equal sizes mean: every element once."""
    left = sizes.copy()
    for shard, size in zip(layout.shards, shard_sizes, strict=True):
        left[shard.tensor] -= size
    if not any(left):
        return
    number = next(n for n, rest in enumerate(left) if rest)
    found = f"{left[number]} of {sizes[number]} bytes are in no shard"
    _refuse_tensor(number, layout.tensors[number], "", found, "shards must hold every element")


def _known_dtypes() -> str:
    return "must be one of " + ", ".join(DTYPE_BYTES)


def _refuse_tensor(
    number: int, tensor: TensorSpec, field: str, value: object, limit: str
) -> NoReturn:
    path = f"tensors[{number}].{field}" if field else f"tensors[{number}]"
    raise MessageInvalid("layout", path, value, f"{limit} (tensor {tensor.name})")


def _refuse_shard(number: int, field: str, value: object, limit: str) -> NoReturn:
    raise MessageInvalid("layout", f"shards[{number}].{field}", value, limit)

"""What a trainer rank holds -> the layout of its part, and the tensor behind every shard.

Does no I/O and moves no bytes. Knows plain tensors, boxes (`Shard`) and torch's `DTensor`; the
order is the trainer's. Every box begins at a multiple of `ALIGNMENT_BYTES` of the one segment.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch.distributed import tensor as distributed

from weightbus.producers.errors import TensorInvalid
from weightbus.schemas.dtypes import TORCH_NAMES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec

__all__ = ("ALIGNMENT_BYTES", "Part", "Shard", "Tensors", "plan_part")

ALIGNMENT_BYTES: Final = 256
"""What a GPU's widest loads and its allocator align to; wide loads need both sides aligned."""

MAX_DIMENSIONS: Final = 8
"""`schemas.layout.Shape`."""

MAX_NAME_CHARACTERS: Final = 512
"""`schemas.base.Name`."""

_DTYPE_NAMES: Final[dict[torch.dtype, str]] = {
    getattr(torch, attribute): name
    for name, attribute in TORCH_NAMES.items()
    if hasattr(torch, attribute)
}


@dataclass(frozen=True)
class Shard:
    """A box of a tensor, as Megatron and the like hold it. Without the last two: a whole tensor."""

    name: str
    """Of the whole tensor, as the engine's `load_weights` knows it. Several shards may share it."""
    tensor: torch.Tensor
    """The box's elements, of any strides, on any device. Read while `publish` runs; kept by
    a `Part` alone."""
    global_shape: tuple[int, ...] | None = None
    """Shape of the whole tensor."""
    starts: tuple[int, ...] | None = None
    """First index of the box in each dimension of the whole tensor."""


Tensors = Mapping[str, torch.Tensor] | Iterable[Shard]
"""A state dict (its values may be `DTensor`), or boxes."""


@dataclass(frozen=True)
class Part:
    """What one rank publishes.

    A trainer whose tensors stay where they are, and change their values alone, plans its part once,
    and gives it to `publish` each time: that saves the time to plan it. Plan again when a parameter
    has got other memory (`param.data = new`, a reload, a new wrapper), shape, strides or device: of
    a state dict and of `DTensor`s a part holds aliases, which keep the old memory and its values.
    """

    layout: Layout
    """Specs of whole tensors, this rank's shards, one segment; not empty even without shards."""
    sources: tuple[torch.Tensor, ...]
    """For every shard of the layout the tensor that holds its elements, in the shard's shape."""

    @cached_property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(source.nbytes for source in self.sources)

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """That hold the tensors."""
        return frozenset(source.device for source in self.sources)


class _Box(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    source: torch.Tensor | None
    """None: another rank publishes it."""


def plan_part(tensors: Tensors) -> Part:
    """The part of a rank that holds `tensors`.

    Tied tensors are published under each of their names. Boxes without elements get no shard. Boxes
    that overlap are left to `check_layout`.

    Raises:
        TensorInvalid: something is no tensor, or has no bytes, no dtype of safetensors or no box.
    """
    specs: dict[str, TensorSpec] = {}
    numbers: dict[str, int] = {}
    shards: list[ShardSpec] = []
    sources: list[torch.Tensor] = []
    end_bytes = 0
    for box in _boxes(tensors):
        spec = TensorSpec(box.name, _dtype_name(box), box.shape)
        known = specs.setdefault(box.name, spec)
        number = numbers.setdefault(box.name, len(numbers))
        if known != spec:
            value = f"{spec.dtype} {spec.shape}"
            raise TensorInvalid(box.name, value, f"also given as {known.dtype} {known.shape}")
        if box.source is None or box.source.numel() == 0:
            continue
        sizes = tuple(box.source.shape)
        shards.append(ShardSpec(number, box.starts, sizes, 0, end_bytes))
        sources.append(box.source)
        end_bytes = _align(end_bytes + box.source.numel() * box.source.element_size())
    segment = SegmentSpec(max(end_bytes, ALIGNMENT_BYTES))
    return Part(Layout(tuple(specs.values()), tuple(shards), (segment,)), tuple(sources))


def _align(offset_bytes: int) -> int:
    return -(-offset_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _boxes(tensors: Tensors) -> Iterator[_Box]:
    if isinstance(tensors, Mapping):
        for name, tensor in tensors.items():
            yield _box_of_tensor(name, tensor)
        return
    for number, shard in enumerate(tensors):
        if not isinstance(shard, Shard):
            raise TensorInvalid(f"number {number}", _type_of(shard), "must be a Shard")
        yield _box_of_shard(shard)


def _box_of_tensor(name: Any, tensor: Any) -> _Box:
    _check_tensor(name, tensor)
    if isinstance(tensor, distributed.DTensor):
        return _box_of_dtensor(name, tensor)
    shape = tuple(tensor.shape)
    return _Box(name, tensor.dtype, shape, (0,) * len(shape), tensor)


def _box_of_shard(shard: Shard) -> _Box:
    _check_tensor(shard.name, shard.tensor)
    if isinstance(shard.tensor, distributed.DTensor):
        limit = "must be a local tensor; a DTensor goes into a state dict as it is"
        raise TensorInvalid(shard.name, "a DTensor in a Shard", limit)
    sizes = tuple(shard.tensor.shape)
    shape = sizes if shard.global_shape is None else tuple(map(operator.index, shard.global_shape))
    starts = (0,) * len(sizes) if shard.starts is None else tuple(map(operator.index, shard.starts))
    ends = tuple(map(operator.add, starts, sizes))
    inside = all(map(operator.le, ends, shape)) and min(starts, default=0) >= 0
    if not len(shape) == len(starts) == len(sizes) or not inside:
        value = f"a box of sizes {sizes} at {starts} of shape {shape}"
        raise TensorInvalid(shard.name, value, "must lie inside, with as many dimensions")
    return _Box(shard.name, shard.tensor.dtype, shape, starts, shard.tensor)


def _box_of_dtensor(name: str, tensor: distributed.DTensor) -> _Box:
    """The local box of this rank; none where it is a replica and not the first of its mesh."""
    shape = tuple(tensor.shape)
    nowhere = _Box(name, tensor.dtype, shape, (0,) * len(shape), None)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return nowhere
    held = [[range(extent)] for extent in shape]
    for where, ways, placement in zip(coordinate, mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            if where != 0:
                return nowhere
        elif (dimension := getattr(placement, "dim", None)) is not None:
            split_factor = getattr(placement, "split_factor", 1)
            held[dimension] = _indices_held(held[dimension], where, ways, split_factor)
        else:
            raise TensorInvalid(name, f"placed as {placement}", "must be Shard or Replicate")
    local = tensor.to_local().detach()
    spans = [_span(indices) for indices in held]
    sizes = tuple(sum(map(len, indices)) for indices in held)
    if tuple(map(len, spans)) != sizes or (all(sizes) and sizes != tuple(local.shape)):
        value = f"placed as {tensor.placements}, {tuple(local.shape)} of {shape} here"
        raise TensorInvalid(name, value, "must be one box on every rank; give it as Shards")
    return _Box(name, tensor.dtype, shape, tuple(span.start for span in spans), local)


def _indices_held(indices: list[range], where: int, ways: int, split_factor: int) -> list[range]:
    """What number `where` of `ways` ranks keeps of `indices`, as `torch.chunk` cuts them.

    `split_factor` is 1 for `Shard`. FSDP2 over tensor parallelism places weights as
    `_StridedShard`: the indices are cut into so many pieces first, and every rank has its chunk of
    each piece.
    """
    held = []
    for piece in range(split_factor):
        held += _chunk(_chunk(indices, piece, split_factor), where, ways)
    return held


def _chunk(indices: list[range], number: int, count: int) -> list[range]:
    size = -(-sum(map(len, indices)) // count)
    begin, end = number * size, (number + 1) * size
    chunk = []
    for run in indices:
        part = run[max(begin, 0) : max(end, 0)]
        if part:
            chunk.append(part)
        begin, end = begin - len(run), end - len(run)
    return chunk


def _span(indices: list[range]) -> range:
    """From the first index to the last: as long as `indices` only if they lie in one run."""
    return range(indices[0].start, indices[-1].stop) if indices else range(0)


def _check_tensor(name: Any, tensor: Any) -> None:
    if not isinstance(name, str):
        raise TensorInvalid(
            repr(name), f"named by a value {_type_of(name)}", "must be named by a str"
        )
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        limit = f"must have 1 to {MAX_NAME_CHARACTERS} characters"
        raise TensorInvalid(repr(name[:64]), f"a name of {len(name)} characters", limit)
    if not isinstance(tensor, torch.Tensor):
        raise TensorInvalid(name, _type_of(tensor), "must be a torch.Tensor")
    if tensor.device.type == "meta":
        raise TensorInvalid(name, "on the meta device", "must have data")
    if tensor.layout != torch.strided:
        raise TensorInvalid(name, f"of layout {tensor.layout}", "must be dense (torch.strided)")
    if tensor.ndim > MAX_DIMENSIONS:
        raise TensorInvalid(name, f"{tensor.ndim}-dimensional", f"at most {MAX_DIMENSIONS}")


def _dtype_name(box: _Box) -> str:
    if box.dtype not in _DTYPE_NAMES:
        raise TensorInvalid(box.name, box.dtype, f"must be one of {', '.join(TORCH_NAMES)}")
    return _DTYPE_NAMES[box.dtype]


def _type_of(value: object) -> str:
    return f"of type {type(value).__qualname__}"

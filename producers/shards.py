"""What a trainer rank holds -> the layout of its part, and the tensor behind every shard.

Does no I/O and moves no bytes. Knows plain tensors, boxes (`Shard`) and torch's `DTensor`; the
order is the trainer's. Every box begins at a multiple of `ALIGNMENT_BYTES` of the one segment.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch.distributed import tensor as distributed

from weightbus.producers.dtensors import local_box
from weightbus.producers.errors import TensorInvalid
from weightbus.producers.held import Held
from weightbus.schemas.dtypes import DTYPE_BYTES, TORCH_NAMES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec

__all__ = (
    "ALIGNMENT_BYTES",
    "Box",
    "Cast",
    "Delta",
    "Part",
    "Shard",
    "Tensors",
    "box_bytes",
    "box_of_shard",
    "box_of_tensor",
    "cast_dtype",
    "plan_boxes",
    "plan_part",
    "torch_dtype",
)

ALIGNMENT_BYTES: Final = 256
"""What a GPU's widest loads and its allocator align to; wide loads need both sides aligned."""

MAX_DIMENSIONS: Final = 8
"""`schemas.layout.Shape`."""

MAX_NAME_CHARACTERS: Final = 512
"""`schemas.base.Name`."""

CASTABLE: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What `dtype=` casts, and casts to: FP8 needs scales, which a cast does not make."""

_DTYPE_NAMES: Final[dict[torch.dtype, str]] = {
    getattr(torch, attribute): name
    for name, attribute in TORCH_NAMES.items()
    if hasattr(torch, attribute)
}
_DTYPES: Final = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


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

Cast = torch.dtype | Callable[[str], torch.dtype | None]
"""What tensors of floating point are published as: one dtype for all, or one for each name under
which something is published, alike on all ranks. None: as they are."""


class Delta(ABC):
    """What is added to a tensor as it is copied: the product of an adapter's factors."""

    @abstractmethod
    def prepare(self) -> None:
        """Take the factors of now. In the trainer's thread; may talk to other ranks, which call it,
        too, for the same deltas in the same order.

        Raises:
            TensorInvalid: the adapter is of a kind that is not known.
        """

    @abstractmethod
    def add_to(self, source: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of the sum, in the source's dtype, on the current stream of its
        device; the source, of two dimensions, stays as it is. A temporary of the size of these
        rows, or a view of the source, if there is nothing to add. Talks to nobody."""


@dataclass(frozen=True)
class Part:
    """What one rank publishes.

    A trainer whose tensors stay where they are, and change their values alone, plans its part once,
    and gives it to `publish` each time: that saves the time to plan it. Plan again when a parameter
    has got other memory (`param.data = new`, a reload, a new wrapper), shape, strides or device: of
    a state dict and of `DTensor`s a part holds aliases, which keep the old memory and its values. A
    part of a module (`plan_module`) tells: it is refused then; 0.4 us a tensor.
    """

    layout: Layout
    """Specs of whole tensors, this rank's shards, one segment; not empty even without shards. Its
    dtypes are what is published: what the sources hold is cast in the copy."""
    sources: tuple[torch.Tensor, ...]
    """For every shard of the layout the tensor that holds its elements, in the shard's shape."""
    deltas: Mapping[int, Delta] = field(default_factory=dict)
    """Number of a shard -> what is added to its source in the copy."""
    prepared: Sequence[Delta] = ()
    """All deltas of the model, also of shards that other ranks publish: the same on every rank."""
    held: Sequence[Held] = ()
    """Of a module all that is published, also by other ranks: where it lay when it was planned."""

    @cached_property
    def size_bytes(self) -> int:
        """Of all that is published: as it lies in a slot, without gaps."""
        return sum(box_bytes(self.layout, shard) for shard in self.layout.shards)

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """That hold the tensors."""
        return frozenset(source.device for source in self.sources)

    def prepare(self) -> None:
        """Called in the trainer's thread for each version that is published, before it is copied.

        Where adapters are cut over ranks, it is a collective of torch's: all ranks call it.

        Raises:
            TensorInvalid: an adapter has become one of a kind that is not known; or a module's
                tensor lies in other memory than when it was planned.
        """
        for delta in self.prepared:
            delta.prepare()
        for held in self.held:  # the last: a rank that raises leaves no other in a collective
            held.check()


class Box(NamedTuple):
    """One box, to be published by this rank or another."""

    name: str
    dtype: torch.dtype
    """Of `source`, before a cast."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    starts: tuple[int, ...]
    source: torch.Tensor | None
    """None: another rank publishes it."""
    delta: Delta | None = None


def plan_part(tensors: Tensors, *, dtype: Cast | None = None) -> Part:
    """The part of a rank that holds `tensors`.

    Tied tensors are published under each of their names. Boxes without elements get no shard. Boxes
    that overlap are left to `check_layout`.

    Args:
        dtype: what tensors of floating point (16 bits and more) are cast to in the copy; they stay
            as they are, and so do all others. None: nothing is cast.

    Raises:
        TensorInvalid: something is no tensor, or has no bytes, no dtype of safetensors or no box.
    """
    return plan_boxes(_boxes(tensors), dtype)


def plan_boxes(
    boxes: Iterable[Box], dtype: Cast | None = None, prepared: Sequence[Delta] = ()
) -> Part:
    """As `plan_part`."""
    specs: dict[str, TensorSpec] = {}
    numbers: dict[str, int] = {}
    shards: list[ShardSpec] = []
    sources: list[torch.Tensor] = []
    deltas: dict[int, Delta] = {}
    end_bytes = 0
    for box in boxes:
        target = cast_dtype(box.name, box.dtype, dtype)
        spec = TensorSpec(box.name, _dtype_name(box.name, target), box.shape)
        known = specs.setdefault(box.name, spec)
        number = numbers.setdefault(box.name, len(numbers))
        if known != spec:
            value = f"{spec.dtype} {spec.shape}"
            raise TensorInvalid(box.name, value, f"also given as {known.dtype} {known.shape}")
        if box.source is None or box.source.numel() == 0:
            continue
        sizes = tuple(box.source.shape)
        if box.delta is not None:
            deltas[len(shards)] = box.delta
        shards.append(ShardSpec(number, box.starts, sizes, 0, end_bytes))
        sources.append(box.source)
        end_bytes = _align(end_bytes + box.source.numel() * target.itemsize)
    segment = SegmentSpec(max(end_bytes, ALIGNMENT_BYTES))
    layout = Layout(tuple(specs.values()), tuple(shards), (segment,))
    return Part(layout, tuple(sources), deltas, tuple(prepared))


def cast_dtype(name: str, source: torch.dtype, dtype: Cast | None) -> torch.dtype:
    """What a tensor of dtype `source` is published as.

    Raises:
        TensorInvalid: nothing is cast to `dtype`.
    """
    if not (dtype is None or isinstance(dtype, torch.dtype) or callable(dtype)):
        limit = "must be a torch.dtype, or a function of the name that returns one or None"
        raise TensorInvalid(name, f"to be cast to {dtype!r}", limit)
    target = dtype if dtype is None or isinstance(dtype, torch.dtype) else dtype(name)
    if target is None or target == source:
        return source
    if target not in CASTABLE:
        names = ", ".join(map(str, CASTABLE))
        raise TensorInvalid(name, f"to be cast to {target}", f"must be one of {names}")
    return target if source in CASTABLE else source


def torch_dtype(layout: Layout, shard: ShardSpec) -> torch.dtype:
    """Of what is published of a shard."""
    return _DTYPES[layout.tensors[shard.tensor].dtype]


def box_bytes(layout: Layout, shard: ShardSpec) -> int:
    """Size of a shard as it is published."""
    size_bytes = DTYPE_BYTES[layout.tensors[shard.tensor].dtype]
    for extent in shard.sizes:
        size_bytes *= extent
    return size_bytes


def _align(offset_bytes: int) -> int:
    return -(-offset_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _boxes(tensors: Tensors) -> Iterator[Box]:
    if isinstance(tensors, Mapping):
        for name, tensor in tensors.items():
            yield box_of_tensor(name, tensor)
        return
    if isinstance(tensors, torch.nn.Module):
        limit = "must be a state dict, Shards or a Part: plan_module makes one of a module"
        raise TensorInvalid("to publish", _type_of(tensors), limit)
    for number, shard in enumerate(tensors):
        if not isinstance(shard, Shard):
            raise TensorInvalid(f"number {number}", _type_of(shard), "must be a Shard")
        yield box_of_shard(shard)


def box_of_tensor(name: str, tensor: torch.Tensor) -> Box:
    """Of a plain tensor the whole; of a `DTensor` what this rank publishes.

    Raises:
        TensorInvalid
    """
    _check_tensor(name, tensor)
    shape = tuple(tensor.shape)
    if not isinstance(tensor, distributed.DTensor):
        return Box(name, tensor.dtype, shape, (0,) * len(shape), tensor)
    box = local_box(name, tensor)
    if box is None:
        return Box(name, tensor.dtype, shape, (0,) * len(shape), None)
    return Box(name, tensor.dtype, shape, box.starts, box.local)


def box_of_shard(shard: Shard) -> Box:
    """
    Raises:
        TensorInvalid
    """
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
    return Box(shard.name, shard.tensor.dtype, shape, starts, shard.tensor)


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


def _dtype_name(name: str, dtype: torch.dtype) -> str:
    if dtype not in _DTYPE_NAMES:
        raise TensorInvalid(name, dtype, f"must be one of {', '.join(TORCH_NAMES)}")
    return _DTYPE_NAMES[dtype]


def _type_of(value: object) -> str:
    return f"of type {type(value).__qualname__}"

"""Hypothesis strategies for every message, derived from the types; overrides keep the cross-field
rules. Collections are short: what is large has tests of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import msgspec
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.inspect import (
    BoolType,
    BytesType,
    CollectionType,
    DictType,
    FloatType,
    IntType,
    LiteralType,
    Metadata,
    NoneType,
    StrType,
    StructType,
    TupleType,
    Type,
    UnionType,
)

from weightbus.schemas import (
    DTYPE_BYTES,
    MAX_READERS,
    SCHEMA_VERSION,
    Abort,
    Applied,
    Apply,
    Attach,
    Cell,
    CheckpointPart,
    CheckpointReady,
    CheckpointSkipped,
    Copy,
    CopyReady,
    CudaSegment,
    Described,
    EngineRoute,
    FileSegment,
    Fill,
    Group,
    Inspected,
    Join,
    Layout,
    Member,
    Message,
    Needs,
    ParameterSpec,
    Prepare,
    RankOffer,
    RankRoute,
    RoundComplete,
    RoundPlan,
    RouteName,
    Segment,
    SegmentSpec,
    ShardSpec,
    SharedMemorySegment,
    Stream,
    TensorSpec,
    Transform,
    UnaryOp,
    UpdateComplete,
    needs_digest,
    tensor_bytes,
)

__all__ = ("layouts", "messages", "needs_of_nothing")

MAX_ITEMS: Final = 3


@cache
def messages(message_type: type[Message]) -> st.SearchStrategy[Any]:
    """Valid messages of one type."""
    built = _structs(message_type)
    keep = _RULES.get(message_type)
    return built if keep is None else st.composite(lambda draw: keep(draw, draw(built)))()


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Valid layouts: every tensor cut along one or two dimensions, shards packed with gaps."""
    segments = draw(st.integers(1, 3))
    ends = [0] * segments
    tensors, shards = [], []
    for number in range(draw(st.integers(0, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        tensor = TensorSpec(f"tensor-{number}", draw(st.sampled_from(list(DTYPE_BYTES))), shape)
        tensors.append(tensor)
        boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((0,) * len(shape), shape)]
        for d in draw(st.lists(st.integers(0, 3), max_size=2)):
            if d < len(shape) and shape[d] > 1:
                boxes = _cut(boxes, d, draw(st.integers(1, shape[d] - 1)))
        for starts, sizes in draw(st.permutations(boxes)):
            segment = draw(st.integers(0, segments - 1))
            offset = ends[segment] + draw(st.integers(0, 9))
            shards.append(ShardSpec(number, starts, sizes, segment, offset))
            ends[segment] = offset + tensor_bytes(TensorSpec("", tensor.dtype, sizes))
    specs = tuple(SegmentSpec(end + draw(st.integers(0, 9))) for end in ends)
    return Layout(tuple(tensors), tuple(draw(st.permutations(shards))), specs)


@st.composite
def needs_of_nothing(draw: st.DrawFn) -> Needs:
    """Valid needs of contiguous parameters, relative to no layout in particular."""
    parameters, copies, fills = [], [], []
    transforms = tuple(draw(st.lists(_transforms(), max_size=2)))
    for number in range(draw(st.integers(0, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        strides = tuple(_product(shape[d + 1 :]) for d in range(len(shape)))
        dtype = draw(st.sampled_from(list(DTYPE_BYTES)))
        parameters.append(ParameterSpec(f"parameter-{number}", dtype, shape, strides))
        row = draw(st.integers(0, shape[0] - 1))
        sizes = (shape[0] - row, *shape[1:])
        transform = draw(st.integers(-1, len(transforms) - 1))
        starts = tuple(draw(st.integers(0, 2**40)) for _ in shape)
        offset = row * strides[0]
        tensor = draw(st.integers(0, 2**32 - 1))
        copies.append(Copy(tensor, starts, sizes, number, offset, strides, transform))
        value = draw(st.floats(allow_nan=False, allow_infinity=False))
        fills.append(Fill(number, 0, (row, *shape[1:]), strides, value))
    return Needs(tuple(parameters), tuple(copies), tuple(fills), transforms)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _cut(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], d: int, at: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    parts = []
    for starts, sizes in boxes:
        inside = at - starts[d]
        if 0 < inside < sizes[d]:
            parts.append((starts, (*sizes[:d], inside, *sizes[d + 1 :])))
            rest = (*sizes[:d], sizes[d] - inside, *sizes[d + 1 :])
            parts.append(((*starts[:d], at, *starts[d + 1 :]), rest))
        else:
            parts.append((starts, sizes))
    return parts


def _transforms() -> st.SearchStrategy[Transform]:
    op: st.SearchStrategy[tuple[UnaryOp, str]] = st.one_of(
        st.sampled_from(list(DTYPE_BYTES)).map(lambda dtype: ("cast", dtype)),
        st.sampled_from([("neg", ""), ("exp", "")]),
    )
    return st.lists(op, min_size=1, max_size=3).map(lambda ops: Transform(tuple(ops)))


def _structs(struct_type: type[Struct]) -> st.SearchStrategy[Any]:
    info = msgspec.inspect.type_info(struct_type)
    assert isinstance(info, StructType)
    fields = {}
    for field in info.fields:
        own = _FIELDS.get((struct_type, field.name))
        fields[field.name] = _values(field.type) if own is None else own
    if issubclass(struct_type, Message):
        fields["schema_version"] = st.just(SCHEMA_VERSION)
    return st.builds(struct_type, **fields)


def _values(of: Type) -> st.SearchStrategy[Any]:
    if isinstance(of, StructType):
        return _structs(of.cls)
    if isinstance(of, IntType):
        low = of.ge if of.ge is not None else -(2**63)
        high = of.le if of.le is not None else (of.lt - 1 if of.lt is not None else 2**63 - 1)
        return st.integers(low, high)
    if isinstance(of, FloatType):
        return st.floats(of.ge, of.le, allow_nan=False)
    if isinstance(of, StrType):
        if of.pattern is not None:
            return st.from_regex(of.pattern)
        return st.text(min_size=of.min_length or 0, max_size=min(of.max_length or 20, 20))
    if isinstance(of, BytesType):
        return st.binary(max_size=min(of.max_length or 40, 40))
    if isinstance(of, CollectionType):
        low = of.min_length or 0
        return st.lists(_values(of.item_type), min_size=low, max_size=low + MAX_ITEMS).map(tuple)
    return _other_values(of)


def _other_values(of: Type) -> st.SearchStrategy[Any]:
    if isinstance(of, Metadata):
        return _values(of.type)
    if isinstance(of, UnionType):
        return st.one_of(*map(_values, of.types))
    if isinstance(of, LiteralType):
        return st.sampled_from(list(of.values))
    if isinstance(of, TupleType):
        return st.tuples(*map(_values, of.item_types))
    if isinstance(of, DictType):
        keys, values = _values(of.key_type), _values(of.value_type)
        return st.dictionaries(keys, values, max_size=MAX_ITEMS)
    if isinstance(of, BoolType):
        return st.booleans()
    assert isinstance(of, NoneType), of
    return st.none()


def _unique_by(strategy: st.SearchStrategy[Any], key: Callable[[Any], Any], low: int = 0) -> Any:
    return st.lists(strategy, min_size=low, max_size=low + MAX_ITEMS, unique_by=key).map(tuple)


_paths = st.text(max_size=20).map(lambda text: "/" + text.replace("\0", ""))
_routes = st.lists(st.sampled_from(["local", "broadcast", "p2p"]), unique=True).map(tuple)
_alone: tuple[RouteName, ...] = ("local", "p2p")
_tokens = st.from_regex(r"^[A-Za-z0-9_-]{1,64}\Z")
_digests = st.binary(max_size=5).map(lambda data: b"".join(bytes([byte]) * 8 for byte in data))


@st.composite
def _cells(draw: st.DrawFn) -> Cell:
    ndim = draw(st.integers(0, 8))
    starts = tuple(draw(st.lists(st.integers(0, 2**50), min_size=ndim, max_size=ndim)))
    sizes = tuple(draw(st.lists(st.integers(0, 2**50), min_size=ndim, max_size=ndim)))
    return Cell(draw(st.integers(0, 2**32 - 1)), starts, sizes, draw(st.integers(-1, 2**40)))


def _ready(draw: st.DrawFn, message: CheckpointReady) -> CheckpointReady:
    if draw(st.booleans()):
        files = tuple(draw(st.lists(_paths, min_size=1, max_size=3, unique=True)))
        message = msgspec.structs.replace(message, files=files, layout_digest=None, placement=())
    else:
        message = msgspec.structs.replace(message, files=(), layout_digest="0" * 64)
    if message.weights_digest is None:
        message = msgspec.structs.replace(message, tensor_digests=None)
    return msgspec.structs.replace(message, valid_until_ns=0)


def _part(draw: st.DrawFn, message: CheckpointPart) -> CheckpointPart:
    world_size = draw(st.integers(message.rank + 1, 65_536))
    return msgspec.structs.replace(message, world_size=world_size)


def _plan(draw: st.DrawFn, message: RoundPlan) -> RoundPlan:
    engines = draw(st.lists(_tokens, min_size=1, max_size=3, unique=True))
    sizes = {engine: draw(st.integers(1, 3)) for engine in engines}
    hosts = engines[: draw(st.integers(0, len(engines)))]
    lanes = max((sizes[host] for host in hosts), default=0)
    groups = tuple(
        Group(
            id=f"g{lane}",
            members=tuple(Member(host, lane % sizes[host]) for host in hosts),
            rendezvous="tcp://host:1",
        )
        for lane in range(lanes)
    )
    parts = []
    for engine, size in sizes.items():
        route: RouteName = "broadcast" if engine in hosts else draw(st.sampled_from(_alone))
        ranks = tuple(RankRoute(rank=rank, route=route) for rank in range(size))
        parts.append(EngineRoute(engine=engine, ranks=ranks))
    return msgspec.structs.replace(
        message, engines=tuple(parts), groups=groups, bucket_bytes=max(message.bucket_bytes, 1)
    )


def _complete(draw: st.DrawFn, message: RoundComplete) -> RoundComplete:
    completed = tuple(one for one in dict.fromkeys(message.completed) if one not in message.failed)
    return msgspec.structs.replace(message, completed=completed)


def _update(draw: st.DrawFn, message: UpdateComplete) -> UpdateComplete:
    verified = "not_offered" if message.weights_digest is None else "verified"
    return msgspec.structs.replace(message, verified=verified)


def _described(draw: st.DrawFn, message: Described) -> Described:
    world_size = draw(st.integers(message.rank + 1, 65_536))
    digest = needs_digest(message.needs)
    return msgspec.structs.replace(message, world_size=world_size, needs_digest=digest)


def _inspected(draw: st.DrawFn, message: Inspected) -> Inspected:
    cells = len(message.cell_digests) // 8
    unreadable = tuple(range(draw(st.integers(0, cells))))
    proven = tuple(dict.fromkeys(message.proven))
    return msgspec.structs.replace(message, unreadable=unreadable, proven=proven)


def _fed(draw: st.DrawFn, message: Apply | Prepare) -> Apply | Prepare:
    feed = message.feed
    if isinstance(feed, Stream):
        feed = _stream(draw, msgspec.structs.replace(feed, lanes=tuple(dict.fromkeys(feed.lanes))))
    return msgspec.structs.replace(message, feed=feed)


def _stream(draw: st.DrawFn, feed: Stream) -> Stream:
    if not feed.device:
        return msgspec.structs.replace(feed, fills=(), sources=(), readers=0)
    fills = tuple(
        msgspec.structs.replace(fill, lane=lane, place=draw(st.integers(0, fill.size - 1)))
        for lane, fill in zip(range(len(feed.lanes)), feed.fills, strict=False)
    )
    readers = draw(st.integers(feed.reader + 1, MAX_READERS))
    return msgspec.structs.replace(feed, fills=fills, readers=readers)


_placements = st.lists(
    _unique_by(st.deferred(lambda: _values(msgspec.inspect.type_info(Segment))), repr, 1),
    max_size=MAX_ITEMS,
).map(tuple)

_FIELDS: Final[dict[tuple[type[Struct], str], st.SearchStrategy[Any]]] = {
    (FileSegment, "path"): _paths,
    (SharedMemorySegment, "generation"): st.integers(0, 2**62 - 1).map(lambda n: 2 * n),
    (CudaSegment, "generation"): st.integers(0, 2**62 - 1).map(lambda n: 2 * n),
    (CheckpointReady, "placement"): _placements,
    (CheckpointPart, "placement"): _placements,
    (CopyReady, "placement"): _placements,
    (Join, "groups"): _unique_by(_tokens, str),
    (CheckpointSkipped, "ranks"): _unique_by(st.integers(0, 65_535), int),
    (Abort, "lost"): _unique_by(_tokens, str),
    (RankOffer, "routes"): _routes,
    (UpdateComplete, "routes"): _routes,
    (Join, "ranks"): _unique_by(
        st.builds(
            RankOffer,
            rank=st.integers(0, 65_535),
            needs_digest=st.just("a" * 64),
            need_bytes=st.integers(0, 2**50),
            routes=_routes,
        ),
        lambda offer: offer.rank,
        1,
    ),
    (Described, "needs"): needs_of_nothing(),
    (Attach, "cells"): st.lists(_cells(), max_size=MAX_ITEMS).map(tuple),
    (Attach, "roots"): st.lists(_paths, max_size=MAX_ITEMS).map(tuple),
    (Applied, "cell_digests"): _digests,
    (Inspected, "cell_digests"): _digests,
}

_RULES: Final[dict[type[Message], Callable[[st.DrawFn, Any], Any]]] = {
    CheckpointReady: _ready,
    CheckpointPart: _part,
    RoundPlan: _plan,
    RoundComplete: _complete,
    UpdateComplete: _update,
    Described: _described,
    Apply: _fed,
    Prepare: _fed,
    Inspected: _inspected,
}

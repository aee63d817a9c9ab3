"""The header of a safetensors file, and the layout of a checkpoint made of such files.

Does no I/O: the caller reads the bytes. A file is 8 bytes of header length (little endian), the
header (JSON), the data. By the format's own rules the tensors lie back to back and fill the data;
so a file that is cut short, overlaps or names a range twice is refused. Tensors are numbered by
their place in the file (empty ones at the same place by name), whatever the JSON's order: readers
in any language derive the same layout. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Final, NoReturn

import msgspec
from msgspec import Meta, Struct

from weightbus.schemas.base import DtypeName
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.faults import DECODE_ERRORS, fault_of, reread
from weightbus.schemas.layout import Layout, SegmentSpec, Shape, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import check_layout
from weightbus.schemas.limits import DEFAULT_LIMITS, Limits

__all__ = (
    "LENGTH_WORD_BYTES",
    "SafetensorsHeader",
    "layout_of_files",
    "parse_safetensors_header",
    "safetensors_header_bytes",
)

LENGTH_WORD_BYTES: Final = 8
"""The file begins with the header's length: 8 bytes, little endian."""

METADATA_KEY: Final = "__metadata__"

Offset = Annotated[int, Meta(ge=0, le=2**50)]


class _Entry(Struct, frozen=True, gc=False):
    """One value of the header. Optional and loose, because `__metadata__` stands among them."""

    dtype: str | None = None
    shape: Shape | str | None = None
    data_offsets: tuple[Offset, Offset] | str | None = None


class _Metadata(Struct, frozen=True, rename={"metadata": METADATA_KEY}):
    metadata: dict[str, str] = {}


class _Tensor(Struct, frozen=True, gc=False):
    """One value of the header that stands for a tensor."""

    dtype: DtypeName
    shape: Shape
    data_offsets: tuple[Offset, Offset]


class SafetensorsHeader(Struct, frozen=True, kw_only=True):
    """What a file holds."""

    path: str
    size_bytes: int
    """Of the whole file."""
    tensors: tuple[tuple[TensorSpec, int], ...]
    """Tensor and offset in bytes from byte 0 of the file, in the order of the offsets."""
    metadata: dict[str, str]


_DECODER = msgspec.json.Decoder(dict[str, _Entry])
_METADATA_DECODER = msgspec.json.Decoder(_Metadata)


def safetensors_header_bytes(
    length_word: bytes, file_size_bytes: int, path: str, limits: Limits = DEFAULT_LIMITS
) -> int:
    """How many bytes of header follow the file's first `LENGTH_WORD_BYTES`, given those.

    Raises:
        MessageInvalid: the file is too short, or its header longer than the file or the limit.
    """
    kind = f"safetensors file {path}"
    if len(length_word) != LENGTH_WORD_BYTES:
        limit = f"must begin with {LENGTH_WORD_BYTES} bytes of header length"
        raise MessageInvalid(kind, "$", f"{len(length_word)} bytes long", limit)
    header_bytes = int.from_bytes(length_word, "little")
    limit_bytes = min(limits.max_safetensors_header_bytes, file_size_bytes - LENGTH_WORD_BYTES)
    if header_bytes > limit_bytes:
        limit = f"at most {limit_bytes} bytes of header in a file of {file_size_bytes} bytes"
        raise MessageInvalid(kind, "header length", header_bytes, limit)
    return header_bytes


def parse_safetensors_header(
    header: bytes, file_size_bytes: int, path: str, limits: Limits = DEFAULT_LIMITS
) -> SafetensorsHeader:
    """What a file holds. `header` is the JSON alone, as long as the length word said.

    Raises:
        MessageInvalid: names the file and the tensor.
    """
    kind = f"safetensors file {path}"
    if len(header) > limits.max_safetensors_header_bytes:
        limit = f"at most {limits.max_safetensors_header_bytes} bytes"
        raise MessageInvalid(kind, "$", f"{len(header)} bytes of header", limit)
    try:
        metadata = _METADATA_DECODER.decode(header).metadata
        entries = _DECODER.decode(header)
    except DECODE_ERRORS as error:
        document = reread(header, msgspec.json.Decoder().decode)
        raise fault_of(kind, error, dict[str, _Entry], document) from None
    entries.pop(METADATA_KEY, None)
    if len(entries) > limits.max_tensors:
        raise MessageInvalid(kind, "$", f"{len(entries)} tensors", f"at most {limits.max_tensors}")
    begin = LENGTH_WORD_BYTES + len(header)
    tensors = _place(kind, entries, begin, file_size_bytes)
    return SafetensorsHeader(
        path=path, size_bytes=file_size_bytes, tensors=tensors, metadata=metadata
    )


def layout_of_files(
    headers: Sequence[SafetensorsHeader], limits: Limits = DEFAULT_LIMITS
) -> Layout:
    """One segment per file in the given order, one shard per tensor; checked.

    Raises:
        MessageInvalid: a tensor is in two files, or there are too many of something.
    """
    home: dict[str, str] = {}
    for header in headers:
        for tensor, _ in header.tensors:
            other = home.setdefault(tensor.name, header.path)
            if other != header.path:
                kind = f"safetensors file {header.path}"
                raise MessageInvalid(kind, tensor.name, "repeated", f"it is in {other} too")
    tensors: list[TensorSpec] = []
    shards: list[ShardSpec] = []
    for segment, header in enumerate(headers):
        for tensor, offset_bytes in header.tensors:
            starts = (0,) * len(tensor.shape)
            shards.append(ShardSpec(len(tensors), starts, tensor.shape, segment, offset_bytes))
            tensors.append(tensor)
    segments = tuple(SegmentSpec(header.size_bytes) for header in headers)
    layout = Layout(tuple(tensors), tuple(shards), segments)
    check_layout(layout, limits)
    return layout


def _place(
    kind: str, entries: dict[str, _Entry], begin: int, file_size_bytes: int
) -> tuple[tuple[TensorSpec, int], ...]:
    """Tensors with their offsets in the file, whose data begins at byte `begin`."""
    placed = sorted(
        (_tensor(kind, name, entry) for name, entry in entries.items()),
        key=lambda one: (one[1].data_offsets, one[0]),
    )
    tensors = []
    end = 0
    for name, entry in placed:
        start, stop = entry.data_offsets
        size = prod(entry.shape) * DTYPE_BYTES[entry.dtype]
        if stop - start != size:
            limit = f"must be {size} bytes apart: {entry.dtype} {entry.shape}"
            _refuse(kind, name, "data_offsets", entry.data_offsets, limit)
        if begin + stop > file_size_bytes:
            limit = f"must end within the {file_size_bytes - begin} bytes of data of the file"
            _refuse(kind, name, "data_offsets", entry.data_offsets, limit)
        if start != end:
            limit = f"must begin at {end}, where the tensor before it ends"
            _refuse(kind, name, "data_offsets", entry.data_offsets, limit)
        end = stop
        tensors.append((TensorSpec(name, entry.dtype, entry.shape), begin + start))
    if begin + end != file_size_bytes:
        limit = f"its tensors and header fill {begin + end} bytes"
        raise MessageInvalid(kind, "$", f"{file_size_bytes} bytes long", limit)
    return tuple(tensors)


def _tensor(kind: str, name: str, entry: _Entry) -> tuple[str, _Tensor]:
    dtype, shape, data_offsets = entry.dtype, entry.shape, entry.data_offsets
    if not 0 < len(name) <= 512:
        raise MessageInvalid(kind, name, f"{len(name)} characters", "1 to 512 characters")
    if dtype not in DTYPE_BYTES:
        _refuse(kind, name, "dtype", dtype, "must be one of " + ", ".join(DTYPE_BYTES))
    if not isinstance(shape, tuple):
        _refuse(kind, name, "shape", shape, "must be an array of sizes")
    if not isinstance(data_offsets, tuple):
        _refuse(kind, name, "data_offsets", data_offsets, "must be [begin, end]")
    return name, _Tensor(dtype, shape, data_offsets)


def _refuse(kind: str, name: str, field: str, value: object, limit: str) -> NoReturn:
    raise MessageInvalid(kind, f"{name}.{field}", value, limit)

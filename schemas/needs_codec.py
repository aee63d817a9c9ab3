"""Needs to bytes and back, and the rules that needs must keep.

Does no I/O. Needs that leave `decode_needs` or `check_needs` have known dtypes, unique parameter
names, and no copy or fill that writes outside its parameter. With a layout given, no copy reads
outside its tensor either, and bytes that are moved as they are keep their element size.
"""

from __future__ import annotations

import hashlib
from math import isnan, prod

import msgspec

from weightbus.schemas.blobs import canonical, compress, decode_object, inflate
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout
from weightbus.schemas.limits import DEFAULT_LIMITS, MAX_ELEMENTS, Limits
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec

__all__ = ("check_needs", "decode_needs", "encode_needs", "needs_digest")

_DECODER = msgspec.msgpack.Decoder(Needs)


def encode_needs(needs: Needs, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The blob to store, checked without a layout.

    Raises:
        MessageInvalid: a field does not hold what its type says, or any rule broken.
    """
    raw = canonical("needs", needs)
    check_needs(decode_object("needs", raw, _DECODER), limits=limits)
    return compress(raw)


def decode_needs(blob: bytes, limits: Limits = DEFAULT_LIMITS) -> Needs:
    """The needs in a blob, checked without a layout.

    Raises:
        MessageInvalid: not readable, or any rule broken.
    """
    needs = decode_object("needs", inflate("needs", blob, limits), _DECODER)
    check_needs(needs, limits=limits)
    return needs


def needs_digest(needs: Needs) -> str:
    """The needs' digest: equal to `digest_of(encode_needs(needs))`, without compressing.

    Raises:
        MessageInvalid: a field does not hold what its type says.
    """
    return hashlib.sha256(canonical("needs", needs)).hexdigest()


def check_needs(
    needs: Needs, layout: Layout | None = None, limits: Limits = DEFAULT_LIMITS
) -> None:
    """Every rule of needs. Without parameters (an untraced model) copies have no destination.

    Raises:
        MessageInvalid: names the parameter, copy or fill at fault.
    """
    _check_counts(needs, limits)
    spans = [_check_parameter(number, p) for number, p in enumerate(needs.parameters)]
    names = {parameter.name for parameter in needs.parameters}
    if len(names) != len(needs.parameters):
        _refuse_repeated_name(needs)
    for number, transform in enumerate(needs.transforms):
        for op, dtype in transform.ops:
            if (dtype in DTYPE_BYTES) != (op == "cast") or (op != "cast" and dtype):
                limit = "`cast` names a known dtype, other operations none"
                raise MessageInvalid("needs", f"transforms[{number}]", (op, dtype), limit)
    for number, copy in enumerate(needs.copies):
        _check_copy(f"copies[{number}]", copy, needs, spans)
    if layout is not None:
        for number, copy in enumerate(needs.copies):
            _check_source(f"copies[{number}]", copy, needs, layout)
    for number, fill in enumerate(needs.fills):
        _check_fill(f"fills[{number}]", fill, spans)


def _check_counts(needs: Needs, limits: Limits) -> None:
    for field, found, limit in (
        ("parameters", len(needs.parameters), limits.max_parameters),
        ("copies", len(needs.copies), limits.max_copies),
        ("fills", len(needs.fills), limits.max_fills),
        ("transforms", len(needs.transforms), limits.max_transforms),
    ):
        if found > limit:
            raise MessageInvalid("needs", field, f"{found} long", f"at most {limit}")


def _check_parameter(number: int, parameter: ParameterSpec) -> int:
    """Elements of the parameter's memory, from its first to its last."""
    field = f"parameters[{number}]"
    if parameter.dtype not in DTYPE_BYTES:
        limit = "must be one of " + ", ".join(DTYPE_BYTES)
        raise MessageInvalid("needs", f"{field}.dtype", parameter.dtype, limit)
    shape, strides = parameter.shape, parameter.strides
    if len(strides) != len(shape) or any(stride < 0 for stride in strides):
        limit = f"one stride, not negative, for each of {len(shape)} dimensions"
        raise MessageInvalid("needs", f"{field}.strides", strides, limit)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    extent = max(span, prod(max(n, 1) for n in shape)) * DTYPE_BYTES[parameter.dtype]
    if extent > MAX_ELEMENTS:
        limit = f"at most {MAX_ELEMENTS} bytes of memory, counting an extent of 0 as 1"
        raise MessageInvalid("needs", f"{field}.shape", shape, limit)
    return span if all(shape) else 0


def _refuse_repeated_name(needs: Needs) -> None:
    seen: dict[str, int] = {}
    for number, parameter in enumerate(needs.parameters):
        first = seen.setdefault(parameter.name, number)
        if first != number:
            limit = f"names must be unique; parameters[{first}] has it too"
            raise MessageInvalid("needs", f"parameters[{number}].name", parameter.name, limit)


def _check_copy(field: str, copy: Copy, needs: Needs, spans: list[int]) -> None:
    if not len(copy.starts) == len(copy.sizes) == len(copy.strides):
        limit = f"as many as sizes: {len(copy.sizes)}"
        raise MessageInvalid("needs", f"{field}.strides", copy.strides, limit)
    if copy.transform >= len(needs.transforms):
        limit = f"there are {len(needs.transforms)} transforms"
        raise MessageInvalid("needs", f"{field}.transform", copy.transform, limit)
    if spans or copy.parameter:
        _check_window(field, copy, spans)


def _check_fill(field: str, fill: Fill, spans: list[int]) -> None:
    if len(fill.sizes) != len(fill.strides):
        limit = f"as many as sizes: {len(fill.sizes)}"
        raise MessageInvalid("needs", f"{field}.strides", fill.strides, limit)
    if isnan(fill.value):
        raise MessageInvalid("needs", f"{field}.value", fill.value, "must be a number")
    _check_window(field, fill, spans)


def _check_window(field: str, window: Copy | Fill, spans: list[int]) -> None:
    """Its lowest and highest element must lie in the parameter's memory."""
    if window.parameter >= len(spans):
        limit = f"there are {len(spans)} parameters"
        raise MessageInvalid("needs", f"{field}.parameter", window.parameter, limit)
    if not all(window.sizes):
        return
    low = high = window.offset
    for size, stride in zip(window.sizes, window.strides, strict=True):
        reach = (size - 1) * stride
        if reach < 0:
            low += reach
        else:
            high += reach
    if low < 0 or high >= spans[window.parameter]:
        found = f"elements {low} to {high}"
        limit = f"parameter {window.parameter} has {spans[window.parameter]} elements of memory"
        raise MessageInvalid("needs", field, found, limit)


def _check_source(field: str, copy: Copy, needs: Needs, layout: Layout) -> None:
    if copy.tensor >= len(layout.tensors):
        limit = f"the layout has {len(layout.tensors)} tensors"
        raise MessageInvalid("needs", f"{field}.tensor", copy.tensor, limit)
    tensor = layout.tensors[copy.tensor]
    if len(copy.sizes) != len(tensor.shape) or any(
        start + size > extent
        for start, size, extent in zip(copy.starts, copy.sizes, tensor.shape, strict=True)
    ):
        found = f"{copy.sizes} from {copy.starts}"
        limit = f"must lie within {tensor.shape} of tensor {tensor.name}"
        raise MessageInvalid("needs", f"{field}.sizes", found, limit)
    if needs.parameters and copy.transform < 0:
        parameter = needs.parameters[copy.parameter]
        if DTYPE_BYTES[parameter.dtype] != DTYPE_BYTES[tensor.dtype]:
            found = f"{tensor.dtype} into {parameter.dtype} of parameter {parameter.name}"
            limit = "needs a transform unless elements have the same size"
            raise MessageInvalid("needs", f"{field}.transform", found, limit)

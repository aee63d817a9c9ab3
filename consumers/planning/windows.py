"""From one recorded write (parameter window <- source window) to copies of boxes. Does no I/O.

A window is what a tensor library makes with views alone: an offset, sizes and strides, in elements,
over the memory of one whole, C-contiguous checkpoint tensor. A `Copy` holds a box of that tensor
and one parameter stride per dimension of it. Narrowed, permuted, transposed, merged and split
windows become one copy where they can; where a window leaves the form of a box (steps, diagonals, a
split dimension that is permuted, a repeated source) it is cut into as many boxes as it takes.

Invariant: the copies of a write put exactly the elements where the write would have put them, each
destination once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from weightbus.consumers.errors import PlanError
from weightbus.schemas.needs import Copy

__all__ = ("MAX_COPIES_PER_WRITE", "copies_of_write")

MAX_COPIES_PER_WRITE = 65_536
"""A write that takes more boxes than this is refused: the engine's own loader is the better way."""

Axis = tuple[int, int, int]
"""(extent, source stride, destination stride) of one dimension of a window, strides in elements."""

Piece = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""(starts, sizes, destination strides, destination offset) of one box."""


def copies_of_write(
    tensor: int,
    tensor_shape: Sequence[int],
    source_offset: int,
    sizes: Sequence[int],
    source_strides: Sequence[int],
    parameter: int,
    destination_offset: int,
    destination_strides: Sequence[int],
    transform: int = -1,
) -> list[Copy]:
    """The copies that do what `parameter_window.copy_(source_window)` does.

    Both windows have `sizes`; offsets and strides count elements from the first element of the
    whole tensor and of the parameter. A source dimension of stride 0 (expanded) is repeated.

    Raises:
        PlanError: a window leaves its memory, writes one element twice, or takes more than
            `MAX_COPIES_PER_WRITE` boxes.
    """
    thing = f"write of tensor {tensor} to parameter {parameter}"
    if math.prod(sizes) == 0:
        return []
    axes: list[Axis] = []
    for extent, source, destination in zip(sizes, source_strides, destination_strides, strict=True):
        if extent == 1:
            continue
        if destination == 0:
            raise PlanError(
                thing, f"a window of sizes {tuple(sizes)}", "must write an element once"
            )
        if source < 0:  # read it from its other end
            source_offset += (extent - 1) * source
            destination_offset += (extent - 1) * destination
            source, destination = -source, -destination
        axes.append((extent, source, destination))
    last = source_offset + sum((extent - 1) * source for extent, source, _ in axes)
    if source_offset < 0 or last >= math.prod(tensor_shape):
        window = f"elements {source_offset} to {last}"
        raise PlanError(thing, window, f"must lie in a tensor of shape {tuple(tensor_shape)}")
    first = destination_offset + sum((e - 1) * min(stride, 0) for e, _, stride in axes)
    if first < 0:
        raise PlanError(thing, f"from parameter element {first}", "must not be negative")
    copies: list[Copy] = []
    for starts, box_sizes, strides, offset in _cut(
        tuple(tensor_shape), _merged(axes), source_offset, destination_offset
    ):
        if len(copies) == MAX_COPIES_PER_WRITE:
            raise PlanError(thing, "not a box", f"takes over {MAX_COPIES_PER_WRITE} boxes")
        copies.append(Copy(tensor, starts, box_sizes, parameter, offset, strides, transform))
    return copies


def _merged(axes: list[Axis]) -> list[Axis]:
    """The same window with as few axes as can be, the widest source stride first."""
    merged: list[Axis] = []
    for extent, source, destination in sorted(axes, key=lambda axis: -axis[1]):
        if merged and source:
            outer_extent, outer_source, outer_destination = merged[-1]
            if outer_source == extent * source and outer_destination == extent * destination:
                merged[-1] = (outer_extent * extent, source, destination)
                continue
        merged.append((extent, source, destination))
    return merged


def _cut(
    shape: tuple[int, ...], axes: list[Axis], source: int, destination: int
) -> Iterator[Piece]:
    """Cut a window at `source` of a tensor of `shape` into boxes, one dimension after the other.

    `axes` are ordered by source stride, the widest first; every extent is above 1.
    """
    if not shape:
        for _, offset in _unbound(axes, 0, destination):  # repeats of one element
            yield (), (), (), offset
        return
    step = math.prod(shape[1:])  # elements per index of the first dimension
    inner = [axis for axis in axes if axis[1] < step]
    outer = [axis for axis in axes if axis[1] >= step]
    if source % step + sum((extent - 1) * stride for extent, stride, _ in inner) >= step:
        for part, part_source, part_destination in _uncarried(inner, step, source, destination):
            part_axes = sorted([*outer, *part], key=lambda axis: -axis[1])
            yield from _cut(shape, part_axes, part_source, part_destination)
        return
    along = next((axis for axis in outer if axis[1] == step), None)
    if along is not None:
        outer.remove(along)
    extent, _, stride = along or (1, step, 0)
    for at, offset in _unbound(outer, source, destination):
        if at % step + sum((e - 1) * s for e, s, _ in inner) >= step:  # moved by a diagonal
            yield from _cut(shape, [*([along] if along else []), *inner], at, offset)
            continue
        for starts, sizes, strides, rest in _cut(shape[1:], inner, at % step, offset):
            yield (at // step, *starts), (extent, *sizes), (stride, *strides), rest


def _unbound(axes: list[Axis], source: int, destination: int) -> Iterator[tuple[int, int]]:
    """(source, destination) of every index of `axes`, the first axis slowest."""
    if not axes:
        yield source, destination
        return
    (extent, source_stride, destination_stride), *rest = axes
    for index in range(extent):
        yield from _unbound(
            rest, source + index * source_stride, destination + index * destination_stride
        )


def _uncarried(
    inner: list[Axis], step: int, source: int, destination: int
) -> Iterator[tuple[list[Axis], int, int]]:
    """Cut the widest axis of `inner` where it would run over a multiple of `step`.

    A piece may hold a new axis of stride `step` (whole rows of a flattened window); pieces that
    still run over, by a narrower axis, have extent 1 in the widest and are cut again by the caller.
    """
    (extent, stride, destination_stride), *rest = inner
    reach = sum((e - 1) * s for e, s, _ in rest)
    whole = step // stride if step % stride == 0 else 0  # indices per row, if rows are alike
    while extent:
        phase = source % step
        if whole and phase + reach < stride and extent >= whole:
            rows = extent // whole
            taken = rows * whole
            part = [(rows, step, whole * destination_stride), (whole, stride, destination_stride)]
        else:
            taken = min(extent, max(1, (step - 1 - phase - reach) // stride + 1))
            part = [(taken, stride, destination_stride)]
        yield [axis for axis in part if axis[0] > 1] + rest, source, destination
        extent -= taken
        source += taken * stride
        destination += taken * destination_stride

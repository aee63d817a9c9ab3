"""Where a rank's needs write, and the proof that no element is written twice. Does no I/O.

Almost always the windows of a parameter lie one behind the other, which sorting shows. The few that
are woven into each other (columns side by side, rows taken in turns) are painted, in units of the
longest run of elements that none of them cuts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.tables import (
    CopyTable,
    Integers,
    LayoutTable,
    column,
    lengths_of,
    padded,
)
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout
from weightbus.schemas.limits import MAX_ELEMENTS
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec

__all__ = ("Windows", "Writes", "check_destinations", "tabulate_writes")

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Windows:
    """What writes to parameters: the copies of a `CopyTable`, then the fills, and their names."""

    layout: Layout
    needs: Needs
    all: Sequence[Copy | Fill]

    def name(self, number: int) -> str:
        """A window as errors name it."""
        window = self.all[number]
        into = f"parameter {window.parameter}"
        if window.parameter < len(self.needs.parameters):
            into = f"parameter {self.needs.parameters[window.parameter].name}"
        if isinstance(window, Fill):
            return f"fill of {into}"
        return f"copy of tensor {self.layout.tensors[window.tensor].name} to {into}"

    def refuse(self, wrong: Mask, value: str, limit: str) -> None:
        """Raises `PlanError` for the first window that is `wrong`, if any."""
        if wrong.any():
            raise PlanError(self.name(int(np.argmax(wrong))), value, limit)


@dataclass(frozen=True, eq=False)
class Writes:
    """Where W windows lie in their parameters; none is empty."""

    windows: Windows
    parameter: Integers
    item_bytes: Integers
    """[W]: size of one element of the parameter."""
    offset: Integers
    """[W]: the window's first element, counted in elements from the parameter's first."""
    sizes: Integers
    """[W, D]"""
    strides: Integers
    """[W, D]: in elements; may be negative."""


def tabulate_writes(table: LayoutTable, needs: Needs, copies: CopyTable) -> Writes:
    """Every window of at least one element that the needs write to.

    Raises:
        PlanError: a parameter does not exist, or a window has not one stride per dimension.
    """
    chosen: list[Copy | Fill] = [
        *map(needs.copies.__getitem__, copies.number.tolist()),
        *(fill for fill in needs.fills if all(fill.sizes)),
    ]
    windows = Windows(table.layout, needs, chosen)
    parameter, ranks = column(chosen, "parameter"), lengths_of(chosen, "sizes")
    unknown = parameter >= len(needs.parameters)
    windows.refuse(unknown, "impossible", f"there are {len(needs.parameters)} parameters")
    bent = lengths_of(chosen, "strides") != ranks
    windows.refuse(bent, "impossible", "must have one stride for each size")
    widths = np.array([DTYPE_BYTES[one.dtype] for one in needs.parameters], dtype=np.int64)
    dims = max(table.dims, int(ranks.max(initial=0)))
    return Writes(
        windows=windows,
        parameter=parameter,
        item_bytes=widths[parameter],
        offset=column(chosen, "offset"),
        sizes=padded(chosen, "sizes", dims, 1),
        strides=padded(chosen, "strides", dims, 0),
    )


def check_destinations(writes: Writes, copies: CopyTable) -> Integers:
    """Check that every window fits its parameter, and that no two have an element in common.

    Returns one past the last byte that is written of every parameter.

    Raises:
        PlanError: dtypes do not fit, a window leaves its parameter's memory, or an element is
            written twice; names the tensor and the parameter.
    """
    _check_dtypes(writes, copies)
    steps = np.abs(writes.strides)
    far: Mask = (writes.sizes - 1.0) * steps > MAX_ELEMENTS  # in floats: integers would overflow
    writes.windows.refuse(np.any(far, axis=1), "too wide", "must lie in the parameter's memory")
    reaches = (writes.sizes - 1) * writes.strides
    low = writes.offset + np.minimum(reaches, 0).sum(axis=1)
    high = writes.offset + np.maximum(reaches, 0).sum(axis=1)
    spans = np.array(
        [_span(parameter) for parameter in writes.windows.needs.parameters], dtype=np.int64
    )
    outside = (low < 0) | (high >= spans[writes.parameter])
    if outside.any():
        number = int(np.argmax(outside))
        found = f"to elements {low[number]} to {high[number]}"
        limit = f"the parameter has {spans[writes.parameter[number]]} elements of memory"
        raise PlanError(writes.windows.name(number), found, limit)
    order = np.lexsort((low, writes.parameter))
    place = (np.cumsum(spans) - spans)[writes.parameter]  # parameters one behind the other
    reach = np.maximum.accumulate((place + high)[order])
    apart = np.ones(order.size, dtype=np.bool_)
    apart[1:] = (place + low)[order][1:] > reach[:-1]
    begins = np.append(np.flatnonzero(apart), order.size)
    for number in np.flatnonzero(~_nested(writes.sizes, steps)).tolist():
        _paint(writes, steps, low, [number])
    for cluster in np.flatnonzero(np.diff(begins) > 1).tolist():
        _paint(writes, steps, low, order[begins[cluster] : begins[cluster + 1]].tolist())
    ends = np.zeros(spans.size, dtype=np.int64)
    np.maximum.at(ends, writes.parameter, (high + 1) * writes.item_bytes)
    return ends


def _check_dtypes(writes: Writes, copies: CopyTable) -> None:
    """What a copy makes of its tensor's dtype must fit its parameter's."""
    needs, tensors = writes.windows.needs, writes.windows.layout.tensors
    reasons: dict[tuple[str, int, str], str] = {}
    for number, copied in enumerate(copies.number.tolist()):
        copy = needs.copies[copied]
        source, target = tensors[copy.tensor].dtype, needs.parameters[copy.parameter].dtype
        key = (source, copy.transform, target)
        if key not in reasons:
            reasons[key] = _why_unfit(needs, *key)
        if reasons[key]:
            raise PlanError(writes.windows.name(number), f"{source} into {target}", reasons[key])


def _why_unfit(needs: Needs, source: str, transform: int, target: str) -> str:
    """Why elements of one dtype cannot be moved into another; empty: they can."""
    if transform < 0:
        same = DTYPE_BYTES[source] == DTYPE_BYTES[target]
        return "" if same else "elements of another size need a transform"
    if transform >= len(needs.transforms):
        return f"transform {transform} is not one of {len(needs.transforms)}"
    casts = [dtype for op, dtype in needs.transforms[transform].ops if op == "cast"]
    made = casts[-1] if casts else source
    return "" if made == target else f"transform {transform} makes {made}"


def _span(parameter: ParameterSpec) -> int:
    """Elements of a parameter's memory, from its first to its last."""
    if not all(parameter.shape):
        return 0
    steps = zip(parameter.shape, parameter.strides, strict=True)
    return 1 + sum((extent - 1) * stride for extent, stride in steps)


def _nested(sizes: Integers, steps: Integers) -> Mask:
    """Whether each dimension steps over all that the narrower ones reach: no element twice."""
    alone = sizes == 1
    order = np.argsort(np.where(alone, 0, steps), axis=1)
    ordered_steps = np.take_along_axis(np.where(alone, 1, steps), order, axis=1)
    reaches = (np.take_along_axis(sizes, order, axis=1) - 1) * ordered_steps
    below = np.cumsum(reaches, axis=1) - reaches
    nested: Mask = (ordered_steps > below).all(axis=1)
    return nested


def _paint(writes: Writes, steps: Integers, low: Integers, numbers: list[int]) -> None:
    """Check exactly that windows of one parameter have no element in common, nor twice their own.

    Of several windows none may have an element of its own twice.
    """
    base = int(low[numbers].min())
    runs = [_run(writes.sizes[number], steps[number]) for number in numbers]
    offsets = (low[numbers] - base).tolist()
    unit = math.gcd(*offsets, *chain.from_iterable((run[0], *run[2]) for run in runs))
    ends = [
        offset + length + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        for offset, (length, sizes, strides) in zip(offsets, runs, strict=True)
    ]
    painted = np.zeros(max(ends) // unit, dtype=np.bool_)
    limit = "every element must be written once"
    total = 0
    for number, offset, (length, sizes, strides) in zip(numbers, offsets, runs, strict=True):
        shape = (*sizes, length // unit)
        view = as_strided(
            painted[offset // unit :], shape, (*(stride // unit for stride in strides), 1)
        )
        if view.any():
            raise PlanError(writes.windows.name(number), "over elements that others write", limit)
        view[...] = True
        total += view.size
    if int(np.count_nonzero(painted)) != total:
        raise PlanError(writes.windows.name(numbers[0]), "over its own elements", limit)


def _run(sizes: Integers, steps: Integers) -> tuple[int, list[int], list[int]]:
    """A window as runs of adjacent elements: a run's length, and the other dimensions."""
    dims = [
        (step, size) for size, step in zip(sizes.tolist(), steps.tolist(), strict=True) if size > 1
    ]
    dims.sort(reverse=True)
    length = 1
    while dims and dims[-1][0] == length:
        length *= dims.pop()[1]
    return length, [size for _, size in dims], [step for step, _ in dims]

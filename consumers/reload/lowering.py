"""Turns recorded writes into the copies, fills and transforms of `Needs`. Pure: does no I/O.

A write's source may be a window of something that was derived from checkpoint tensors (cloned,
cast, negated, concatenated), any number of times. Each window is cut into boxes of what it looks
at, each box followed into the parts that it was made of, down to the checkpoint; operations met on
the way become a transform.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from weightbus.consumers.errors import PlanError, TraceRefused
from weightbus.consumers.planning.windows import copies_of_write
from weightbus.consumers.reload.dtypes import DTYPE_NAMES, TORCH_DTYPES
from weightbus.consumers.reload.recorder import Op, Part, Source, Window, Write
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec, Transform

__all__ = ("Lowering",)


@dataclass(frozen=True)
class _Target:
    """A window of a parameter on the way from a write to its copies."""

    offset: int
    strides: tuple[int, ...]
    ops: tuple[Op, ...]
    """Applied, in order, to what is read before it is written."""
    reinterpreted: bool
    """Some view on the way changed the dtype of the bits: they can be moved, not computed with."""


class Lowering:
    """Collects the needs of one model, parameter by parameter."""

    def __init__(self, model: str, layout: Layout) -> None:
        self._model, self._layout = model, layout
        self._parameters: list[ParameterSpec] = []
        self._copies: list[Copy] = []
        self._fills: list[Fill] = []
        self._transforms: dict[tuple[Op, ...], int] = {}

    def needs(self) -> Needs:
        """Everything added so far."""
        return Needs(
            tuple(self._parameters),
            tuple(self._copies),
            tuple(self._fills),
            tuple(Transform(ops) for ops in self._transforms),
        )

    def add_parameter(self, spec: ParameterSpec, first_byte: int, writes: list[Write]) -> int:
        """Add a parameter with everything that is written to it, in order; its number.

        `first_byte` is where its first element lies in the storage.

        Raises:
            TraceRefused: a write cannot be told as copies.
        """
        number = len(self._parameters)
        self._parameters.append(spec)
        for write in writes:
            try:
                self._add_write(write, number, spec, first_byte)
            except PlanError as error:
                raise TraceRefused(self._model, f"write to {spec.name}: {error}") from error
        return number

    def _add_write(
        self, write: Write, parameter: int, spec: ParameterSpec, first_byte: int
    ) -> None:
        dtype = TORCH_DTYPES[spec.dtype]
        if write.target.itemsize != dtype.itemsize:
            raise PlanError("dtype of a view", write.dtype, f"must be as wide as {dtype}")
        offset = write.target.offset - first_byte
        steps = (offset, *write.target.strides)
        if any(step % dtype.itemsize for step in steps):
            raise PlanError("a view's place", steps, "must be whole elements of the parameter")
        offset //= dtype.itemsize
        strides = tuple(step // dtype.itemsize for step in write.target.strides)
        reinterpreted = write.dtype != dtype
        if isinstance(write.value, float):
            if reinterpreted and write.value != 0.0:
                raise PlanError("dtype of a filled view", write.dtype, f"must be {dtype}")
            self._fills.append(Fill(parameter, offset, write.target.sizes, strides, write.value))
            return
        ops: tuple[Op, ...] = ()
        if write.value.dtype != write.dtype:
            if write.dtype not in DTYPE_NAMES:
                raise PlanError("dtype of a view", write.dtype, "must be one of a layout's")
            ops = (("cast", DTYPE_NAMES[write.dtype]),)
        self._lower(write.value, _Target(offset, strides, ops, reinterpreted), parameter)

    def _lower(self, window: Window, target: _Target, parameter: int) -> None:
        base = window.base
        target = replace(target, reinterpreted=target.reinterpreted or window.dtype != base.dtype)
        if target.ops and target.reinterpreted:
            raise PlanError(
                "dtype of a view", window.dtype, f"must be {base.dtype} to compute with"
            )
        number, transform = 0, -1
        if isinstance(base, Source):
            number = base.tensor
            if target.ops:
                transform = self._transforms.setdefault(target.ops, len(self._transforms))
        copies = copies_of_write(
            number,
            base.shape,
            window.offset,
            window.sizes,
            window.strides,
            parameter,
            target.offset,
            target.strides,
            transform,
        )
        if isinstance(base, Source):
            self._copies += copies
            return
        for copy in copies:
            for part in base.parts:
                self._lower_part(part, copy, target)

    def _lower_part(self, part: Part, copy: Copy, target: _Target) -> None:
        """Follow what a copy takes of one part; nothing if they do not meet."""
        box = list(zip(part.starts, part.window.sizes, copy.starts, copy.sizes, strict=True))
        starts = [max(p, c) for p, _, c, _ in box]
        sizes = tuple(
            min(p + n, c + m) - start for (p, n, c, m), start in zip(box, starts, strict=True)
        )
        if any(size <= 0 for size in sizes):
            return
        into_part = (start - p for start, p in zip(starts, part.starts, strict=True))
        into_copy = (start - c for start, c in zip(starts, copy.starts, strict=True))
        window = replace(
            part.window,
            offset=part.window.offset + _dot(into_part, part.window.strides),
            sizes=sizes,
        )
        ops = target.ops if part.op is None else (part.op, *target.ops)
        offset = copy.offset + _dot(into_copy, copy.strides)
        self._lower(
            window, _Target(offset, copy.strides, ops, target.reinterpreted), copy.parameter
        )


def _dot(steps: Iterable[int], strides: tuple[int, ...]) -> int:
    return sum(step * stride for step, stride in zip(steps, strides, strict=True))

"""Which memory a model's parameters and buffers are, who shares it, and who wrote it last.

Does no I/O. Everything here is in bytes, counted from the start of a storage, so that parameters
that share one (tied weights, views of a flat buffer) and writes through views of any dtype compare.
Memory needed is 4 bytes per *unit*: the largest run of bytes that no window cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import nn

__all__ = (
    "ByteWindow",
    "Coverage",
    "StateTensor",
    "module_of",
    "plain_tensors",
    "state_tensors",
    "storage_id",
    "trace_coverage",
    "window_of",
)


@dataclass(frozen=True)
class ByteWindow:
    """A strided window of a storage: byte offset of its first element, and bytes per step."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def end(self) -> int:
        """One past the last byte; `offset` if the window is empty."""
        if 0 in self.sizes:
            return self.offset
        steps = ((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))
        return self.offset + sum(steps) + self.itemsize


@dataclass(frozen=True)
class StateTensor:
    """One name of a model's state."""

    name: str
    tensor: torch.Tensor
    parameter: bool
    persistent: bool
    """Would be in a `state_dict`; true for every parameter."""


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, also on `meta`; valid while the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def window_of(tensor: torch.Tensor) -> ByteWindow:
    """Where a tensor lies in its storage."""
    itemsize = tensor.itemsize
    return ByteWindow(
        offset=int(tensor.storage_offset()) * itemsize,
        sizes=tuple(tensor.shape),
        strides=tuple(step * itemsize for step in tensor.stride()),
        itemsize=itemsize,
    )


def module_of(name: str) -> str:
    """The module that a parameter or buffer belongs to; "" is the model itself."""
    return name.rpartition(".")[0]


def state_tensors(model: nn.Module) -> tuple[StateTensor, ...]:
    """Every parameter and buffer under every name it has, parameters first."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    parameters = (
        StateTensor(name, tensor, parameter=True, persistent=True)
        for name, tensor in model.named_parameters(remove_duplicate=False)
    )
    buffers = (
        StateTensor(name, tensor, parameter=False, persistent=name not in transient)
        for name, tensor in model.named_buffers(remove_duplicate=False)
    )
    return (*parameters, *buffers)


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that hang on modules as plain attributes, or lie in a list, tuple or dict that does.

    Neither `state_dict` nor a checkpoint knows them; engines derive them from loaded weights.
    """
    found = {}
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for path, tensor in _tensors_in(value, attribute):
                found[f"{prefix}.{path}" if prefix else path] = tensor
    return found


def _tensors_in(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    for key, item in items:
        if isinstance(item, torch.Tensor):
            yield f"{path}[{key!r}]", item


@dataclass(frozen=True)
class Coverage:
    """What a sequence of writes leaves in one storage."""

    held: tuple[int, ...]
    """Per write: how many units it wrote last."""
    written: tuple[int, ...]
    """Per write: how many units it wrote."""
    uncovered: tuple[int, ...]
    """Per window asked about: how many of its bytes nobody wrote."""


def trace_coverage(writes: Sequence[ByteWindow], windows: Sequence[ByteWindow]) -> Coverage:
    """Paint `writes` in order and count what is left of each, and what `windows` still lack.

    A write that hits one of its own elements twice holds fewer units than it wrote.
    """
    runs = [_Runs.of(window) for window in (*writes, *windows)]
    solid = [run for run in runs if run.length]
    if not solid:
        return Coverage((0,) * len(writes), (0,) * len(writes), (0,) * len(windows))
    base = min(run.offset for run in solid)
    unit = math.gcd(*(part for run in solid for part in run.boundaries(base)))
    last_byte = max(run.end for run in solid)
    painted = np.full((last_byte - base) // unit, -1, dtype=np.int32)
    for number, run in enumerate(runs[: len(writes)]):
        run.view(painted, base, unit)[...] = number
    held = np.bincount(painted[painted >= 0], minlength=len(writes))
    return Coverage(
        held=tuple(held.tolist()),
        written=tuple(run.length * math.prod(run.sizes) // unit for run in runs[: len(writes)]),
        uncovered=tuple(
            int(np.count_nonzero(run.view(painted, base, unit) < 0)) * unit
            for run in runs[len(writes) :]
        ),
    )


@dataclass(frozen=True)
class _Runs:
    """A byte window as runs of contiguous bytes, as long as they can be."""

    offset: int
    length: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, window: ByteWindow) -> _Runs:
        if 0 in window.sizes:
            return cls(window.offset, 0, (), ())
        dims = [pair for pair in zip(window.sizes, window.strides, strict=True) if pair[0] > 1]
        dims.sort(key=lambda pair: pair[1], reverse=True)
        length = window.itemsize
        while dims and dims[-1][1] == length:
            length *= dims.pop()[0]
        return cls(window.offset, length, tuple(s for s, _ in dims), tuple(t for _, t in dims))

    @property
    def end(self) -> int:
        steps = ((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))
        return self.offset + sum(steps) + self.length

    def boundaries(self, base: int) -> tuple[int, ...]:
        """Numbers that a unit must divide."""
        return (self.offset - base, self.length, *self.strides)

    def view(self, painted: NDArray[np.int32], base: int, unit: int) -> NDArray[np.int32]:
        """The window's units in the painted storage; writable."""
        if not self.length:
            return painted[:0]
        shape = (*self.sizes, self.length // unit)
        strides = (*(step // unit * 4 for step in self.strides), 4)
        return as_strided(painted[(self.offset - base) // unit :], shape, strides)

"""A function that makes a checkpoint's tensors of a module's -> which of them lie where in which.

The function is run on tensors without data, and watched: what comes out as a view of a module's
tensor, or joined of such, is made of windows. Nothing is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from operator import add, lt
from typing import Any, Final, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightbus.producers.errors import TensorInvalid
from weightbus.producers.fused import Window

__all__ = ("Tensors", "windows_of")

Tensors = dict[str, torch.Tensor]

_aten = torch.ops.aten
_SAME_VALUES: Final = (_aten.clone.default, _aten.contiguous.default, _aten.detach.default)


def windows_of(
    convert: Callable[[Tensors], Tensors], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Window, ...]]:
    """For every tensor that `convert` is given those that it makes of it, in the order of memory.

    Args:
        convert: slices, turns, splits, stacks and joins tensors. It is called once, with tensors of
            `shapes` on the meta device.

    Raises:
        TensorInvalid: what it makes is no box of what it was given, dimension by dimension; or
            elements are lost, or there twice.
    """
    sources = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    watcher = _Watcher(sources)
    with torch.no_grad(), watcher:
        found = convert(dict(sources))
    windows: dict[str, list[Window]] = {name: [] for name in sources}
    for name, tensor in found.items():
        shape = tuple(tensor.shape)
        for piece in watcher.pieces(name, tensor):
            window = Window(name, shape, piece.starts, piece.sizes, piece.at, piece.axes)
            windows[piece.source].append(window)
    for name, parts in windows.items():
        parts.sort(key=_in_memory)
        count = sum(torch.Size(part.sizes).numel() for part in parts)
        if count != sources[name].numel():
            value = f"{sources[name].numel():,} elements long, {count:,} of them in the checkpoint"
            raise TensorInvalid(name, value, "the conversion must keep all, and once")
        for part, other in _overlapping(parts):
            value = f"in {part.name} and in {other.name}, some elements of it"
            raise TensorInvalid(name, value, "the conversion must keep all, and once")
    return {name: tuple(parts) for name, parts in windows.items()}


def _in_memory(window: Window) -> tuple[int, ...]:
    return window.starts


def _overlapping(windows: Sequence[Window]) -> Iterator[tuple[Window, Window]]:
    """Those of one tensor that have elements in common; they come in the order of memory."""
    for number, one in enumerate(windows):
        for other in islice(windows, number + 1, None):
            if one.starts and other.starts[0] >= one.starts[0] + one.sizes[0]:
                break  # and so are all that follow
            firsts = map(max, one.starts, other.starts)
            ends = map(min, map(add, one.starts, one.sizes), map(add, other.starts, other.sizes))
            if all(map(lt, firsts, ends)):
                yield one, other


class _Piece(NamedTuple):
    """A box of a module's tensor, and where it lies in the tensor that is asked for."""

    source: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    at: tuple[int, ...]
    axes: tuple[int, ...]


class _Joined(NamedTuple):
    shape: torch.Size
    parts: list[tuple[torch.Tensor, tuple[int, ...]]]
    """And where each begins in the result."""


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows of which memory tensors without data are views, and which were joined of others.

    A copy counts as the tensor that it copies. Memory that another operation made is known by that
    operation's name, to refuse what lies in it.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = {_memory(tensor): name for name, tensor in sources.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in sources.items()}
        self._joined: dict[int, _Joined] = {}
        self._made: dict[int, str] = {}
        self._alive: list[torch.Tensor] = list(sources.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAME_VALUES:
            return args[0]
        if func is _aten._unsafe_view.default:
            try:
                return _aten.view.default(*args)
            except RuntimeError:  # it moves elements
                return self._note(torch.empty(args[1], device="meta"), "reshape")
        if func is _aten.cat.default or func is _aten.stack.default:
            return self._join(func, *args, **(kwargs or {}))
        known = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in known:
                self._note(tensor, str(func))
        for tensor in _written(func, args, kwargs or {}):
            self._spoil(tensor, str(func))
        return results

    def pieces(self, name: str, tensor: torch.Tensor) -> Iterator[_Piece]:
        """What `tensor` consists of."""
        memory = _memory(tensor)
        if memory in self._sources:
            source = self._sources[memory]
            yield _piece_of_view(name, tensor, source, self._shapes[source])
            return
        joined = self._joined.get(memory)
        if joined is None or tensor.shape != joined.shape or not tensor.is_contiguous():
            made = self._made.get(memory, "nothing that was seen")
            raise TensorInvalid(name, f"made by {made}", "must be boxes of the module's tensors")
        for part, first in joined.parts:
            for piece in self.pieces(name, part):
                at = tuple(map(sum, zip(first, piece.at, strict=True)))
                yield piece._replace(at=at)

    def _spoil(self, tensor: torch.Tensor, operation: str) -> None:
        """Its memory has other values now, and so has all that is a view of it. What was copied or
        joined of it counts as changed, too: a copy is known as what it copies."""
        self._sources.pop(_memory(tensor), None)
        self._joined.pop(_memory(tensor), None)
        self._note(tensor, operation)

    def _note(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        self._made[_memory(tensor)] = operation
        self._alive.append(tensor)
        return tensor

    def _join(self, func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        if func is _aten.stack.default:
            tensors = [tensor.unsqueeze(dim) for tensor in tensors]
        result = torch.cat(tuple(tensors), dim)
        first, parts = 0, []
        for tensor in tensors:
            at = [0] * result.ndim
            at[dim] = first
            parts.append((tensor, tuple(at)))
            first += tensor.shape[dim]
        self._joined[_memory(result)] = _Joined(result.shape, parts)
        return self._note(result, "cutting or turning what was joined")


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors whose values an operation changes in place: not those that it turns so."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return
    for number, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (each for each in tree_leaves(given) if isinstance(each, torch.Tensor))


def _piece_of_view(name: str, view: torch.Tensor, source: str, shape: tuple[int, ...]) -> _Piece:
    """Which box of `source` (contiguous) a view is: its strides are those of some dimensions."""
    strides = [max(torch.Size(shape[n + 1 :]).numel(), 1) for n in range(len(shape))]
    number_of = {strides[n]: n for n in range(len(shape)) if shape[n] > 1}
    axes, sizes = [], [1] * len(shape)
    for extent, stride in zip(view.shape, view.stride(), strict=True):
        axis = -1 if extent == 1 else number_of.get(stride, -1)
        if extent != 1 and (axis < 0 or axis in axes):
            value = f"{tuple(view.shape)} of strides {view.stride()} in {source} {shape}"
            raise TensorInvalid(name, value, "must be a box of it, dimension by dimension")
        axes.append(axis)
        if axis >= 0:
            sizes[axis] = extent
    starts, offset = [], view.storage_offset()
    for stride in strides:
        starts.append(offset // stride)
        offset %= stride
    ends = (start + size for start, size in zip(starts, sizes, strict=True))
    if any(end > extent for end, extent in zip(ends, shape, strict=True)):
        value = f"{tuple(view.shape)} from element {view.storage_offset()} of {source} {shape}"
        raise TensorInvalid(name, value, "must be a box of it, dimension by dimension")
    return _Piece(source, tuple(starts), tuple(sizes), (0,) * view.ndim, tuple(axes))


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

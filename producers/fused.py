"""Tensors that hold several of a checkpoint's, or pieces of them -> shards of the checkpoint's own.

Engines load `q_proj`, `k_proj` and `v_proj`, or `experts.3.gate_proj`; trainers keep one tensor for
all of them. A `Window` says where a box of a checkpoint's tensor lies in such a fused tensor; `cut`
meets the windows with the box that a rank holds. Does no I/O, copies no bytes, talks to no rank:
the shards alias the trainer's memory, so that a part of them can be planned once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weightbus.producers.errors import TensorInvalid
from weightbus.producers.shards import Shard

__all__ = ("Split", "Window", "cut")


@dataclass(frozen=True)
class Window:
    """A box of a fused tensor that is a box of a checkpoint's tensor. In elements."""

    name: str
    """Of the checkpoint's tensor, as the engine's `load_weights` knows it."""
    shape: tuple[int, ...]
    """Of the checkpoint's whole tensor."""
    starts: tuple[int, ...]
    """First index of the window in each dimension of the fused tensor."""
    sizes: tuple[int, ...]
    """Of the window, in the dimensions of the fused tensor."""
    at: tuple[int, ...] | None = None
    """First index of the window in each dimension of the checkpoint's tensor; None: zeros."""
    axes: tuple[int, ...] | None = None
    """For each dimension of the checkpoint's tensor that of the fused one, or -1 where it has none
    (the window is one index thick there). None: both keep their order, and the tensor with more
    dimensions has the others in front. A dimension left out must be of size 1 in the window."""


Split = Callable[[str, tuple[int, ...]], Sequence[Window] | None]
"""(name, shape of the whole tensor) -> where the checkpoint's tensors lie in it. None: it is one of
the checkpoint's tensors itself. No window: nothing of it is published."""


def cut(shard: Shard, windows: Sequence[Window]) -> list[Shard]:
    """The boxes of checkpoint tensors that lie in `shard`, a box of a fused tensor.

    In the order of the windows; a window that does not meet the box gives none. What no window
    holds (padding) is left out. The result's tensors are views of the shard's, valid as long as it
    is; they may have strides of their own.

    Raises:
        TensorInvalid: a window does not lie in the fused tensor, or not in the checkpoint's.
    """
    tensor = shard.tensor.detach()
    whole = tuple(tensor.shape) if shard.global_shape is None else shard.global_shape
    begin = (0,) * tensor.ndim if shard.starts is None else shard.starts
    shards = []
    for window in windows:
        axes, at = _check_window(shard.name, whole, window)
        span = [
            (max(first, start), min(first + held, start + size))
            for first, held, start, size in zip(
                begin, tensor.shape, window.starts, window.sizes, strict=True
            )
        ]
        if any(low >= high for low, high in span):
            continue
        starts = tuple(
            first if axis < 0 else first + span[axis][0] - window.starts[axis]
            for first, axis in zip(at, axes, strict=True)
        )
        place = [
            (low - first, high - first) for (low, high), first in zip(span, begin, strict=True)
        ]
        shards.append(Shard(window.name, _view(tensor, place, axes), window.shape, starts))
    return shards


def _view(
    tensor: torch.Tensor, place: Sequence[tuple[int, int]], axes: Sequence[int]
) -> torch.Tensor:
    """The box of `tensor` from the first to the last index of each pair, its dimensions turned."""
    kept = sorted(axis for axis in axes if axis >= 0)
    piece = tensor[tuple(slice(*p) if axis in kept else p[0] for axis, p in enumerate(place))]
    piece = piece.permute([kept.index(axis) for axis in axes if axis >= 0])
    for number, axis in enumerate(axes):
        if axis < 0:
            piece = piece.unsqueeze(number)
    return piece


def _check_window(
    fused: str, whole: tuple[int, ...], window: Window
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`axes` and `at` of a window, filled in."""
    many, few = len(window.shape), len(whole)
    axes = window.axes
    if axes is None:
        axes = (-1,) * (many - few) + tuple(range(max(few - many, 0), few))
    at = (0,) * many if window.at is None else window.at
    value = (
        f"cut for {window.name} {window.shape} by a window of sizes {window.sizes} at "
        f"{window.starts} of {whole}"
    )
    if not len(window.starts) == len(window.sizes) == few or not len(at) == len(axes) == many:
        raise TensorInvalid(fused, value, "must have as many dimensions")
    if any(
        not 0 <= start <= start + size <= extent
        for start, size, extent in zip(window.starts, window.sizes, whole, strict=True)
    ):
        raise TensorInvalid(fused, value, "must lie inside")
    taken = [axis for axis in axes if axis != -1]
    if len(set(taken)) < len(taken) or not set(taken) <= set(range(few)):
        raise TensorInvalid(fused, f"{value}, axes {axes}", f"each of 0 to {few - 1} at most once")
    if any(size != 1 for axis, size in enumerate(window.sizes) if axis not in taken):
        raise TensorInvalid(fused, value, "a dimension left out must be of size 1")
    sizes = [1 if axis < 0 else window.sizes[axis] for axis in axes]
    if any(
        not 0 <= first <= first + size <= extent
        for first, size, extent in zip(at, sizes, window.shape, strict=True)
    ):
        raise TensorInvalid(fused, f"{value}, put at {at}", f"must lie inside {window.name}")
    return axes, at

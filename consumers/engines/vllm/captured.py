"""What a module of vLLM keeps of its weights elsewhere than in parameters and buffers.

Does no I/O. vLLM's post-processing hangs packed copies on its modules: in closures
(`layer.cpu_linear` on a CPU), in kernel objects, or as plain tensors. A write to the parameter does
not reach them, even where the parameter itself still holds the very bytes of the checkpoint.

A copy is told from scratch memory by when it comes to be: only what post-processing binds anew is
a copy. Tensors of the model's own state are none, however they are reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Final

import torch
from torch import nn

__all__ = (
    "Bound",
    "bound_attributes",
    "keep_in_place",
    "reaches_only",
    "rebound",
    "storage_address",
    "tensors_within",
)

MAX_DEPTH: Final = 6
"""Of objects in objects that are looked into."""

MAX_OBJECTS: Final = 4096
"""Looked into for one attribute."""

_SKIPPED: Final = (str, bytes, int, float, complex, type, ModuleType, nn.Module, torch.dtype)

Bound = dict[str, object]
"""What is bound to the attributes of an object, parameters, buffers and modules left out."""


def bound_attributes(thing: object) -> Bound:
    """What hangs on an object by name now, held so that nothing else takes its id."""
    held = getattr(thing, "__dict__", {})
    return {
        name: value
        for name, value in held.items()
        if name not in ("_parameters", "_buffers", "_modules") and not isinstance(value, _SKIPPED)
    }


def rebound(thing: object, before: Bound, state: frozenset[int]) -> Bound:
    """The attributes that are bound to another object than before, and reach a tensor that is not
    of `state`: storages of the model's own tensors."""
    return {
        name: value
        for name, value in bound_attributes(thing).items()
        if value is not before.get(name) and not reaches_only(value, state)
    }


def reaches_only(value: object, state: frozenset[int]) -> bool:
    """Whether every tensor that is reached from a value is of `state`."""
    return all(
        storage_address(tensor) in state for _, tensor in tensors_within(value) if tensor.numel()
    )


def tensors_within(value: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that is reached from a value, with the way to it; in a fixed order.

    Looks into containers, closures, partials, bound methods and plain objects, not into modules.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, object, int]] = [("", value, 0)]
    while waiting and len(seen) < MAX_OBJECTS:
        way, thing, depth = waiting.pop()
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield way, thing
        elif depth < MAX_DEPTH and not isinstance(thing, _SKIPPED):
            inner = [(f"{way}{step}", item, depth + 1) for step, item in _within(thing)]
            waiting.extend(reversed(inner))


def _within(thing: object) -> Iterator[tuple[str, object]]:
    match thing:
        case list() | tuple() | set() | frozenset():
            yield from ((f"[{number}]", item) for number, item in enumerate(thing))
        case dict():
            yield from ((f"[{key!r}]", item) for key, item in thing.items())
        case partial():
            yield from ((".func", thing.func), (".args", thing.args), (".kw", thing.keywords))
        case MethodType():
            yield from ((".self", thing.__self__), (".func", thing.__func__))
        case FunctionType():
            for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
                try:
                    yield f"<{name}>", cell.cell_contents
                except ValueError:  # a cell that nothing was put into yet
                    continue
            yield ".defaults", thing.__defaults__
        case _:
            yield from ((f".{name}", item) for name, item in getattr(thing, "__dict__", {}).items())


def keep_in_place(old: object, new: object, state: frozenset[int]) -> bool:
    """Let `old` hold what `new` holds, in the memory that `old` holds it in, and the other way.

    The contents of both change places: whoever refers to `old`, as a compiled graph does, sees the
    new ones, and an object that owns what its tensors point to still owns, and frees, one of each.

    Args:
        state: storages of the model's own tensors, which are left alone.

    Returns:
        False: they do not have the same structure, and nothing was changed.
    """
    left, right = list(tensors_within(old)), list(tensors_within(new))
    if [way for way, _ in left] != [way for way, _ in right] or type(old) is not type(new):
        return False
    if isinstance(old, FunctionType) and old.__code__ is not getattr(new, "__code__", None):
        return False
    pairs = [
        (some, other)
        for (_, some), (_, other) in zip(left, right, strict=True)
        if some is not other and storage_address(some) not in state
    ]
    if any(
        (some.shape, some.dtype, some.device) != (other.shape, other.dtype, other.device)
        or storage_address(some) == storage_address(other)
        for some, other in pairs
    ):
        return False
    for some, other in pairs:
        kept = some.clone()
        some.copy_(other)
        if storage_address(other) not in state:
            other.copy_(kept)
    return True


def storage_address(tensor: torch.Tensor) -> int:
    """Of the memory that a tensor is a part of; 0 if it has none."""
    return tensor.untyped_storage().data_ptr()

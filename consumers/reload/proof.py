"""Proof before use: which parameters may be written directly, and which the engine must process.

Does no I/O. Equal shape does not prove equal layout: engines repack weights after loading. After
an update through the engine's own loader every live parameter is compared, byte for byte, with what
the plan makes of the same checkpoint. A module with a parameter that differs, or is larger than
what any checkpoint has of it, is *processed*, as a whole: it goes through the engine's own reload
every time. So does every module below one that hangs tensors on itself which a freshly built model
does not have, or of which its engine says that it keeps such elsewhere: they are derived from what
was loaded.

Some bytes prove nothing: zeros, or rows that are all equal, look the same in any order. A parameter
that holds such bytes is *undecided*: of it is known only what the engine makes of these very bytes.
It may be written directly while they stay the same, and must be proven again once they change.

A proof holds for one layout, one set of needs and the memory that the live parameters then had. It
cannot see what an engine derives from weights and keeps elsewhere than in tensors of its modules:
that is for its host to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.memory import (
    Place,
    StateTensor,
    module_of,
    places_of,
    plain_tensors,
    state_tensors,
)
from weightbus.consumers.reload.tracer import Trace
from weightbus.schemas.needs import ParameterSpec

__all__ = ("Made", "Proof", "memory_of", "prove", "same_bytes", "same_bytes_elsewhere")

COMPARED_BYTES = 64 * 2**20
"""Compared at a time."""

COPIED_BYTES = 8 * 2**20
"""Of a parameter on a device, copied to main memory at a time: no memory of the device is taken."""

GATHERED_BYTES = 2**20
"""The same of one with gaps between its elements: as much memory of the device is taken."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> a dtype in which equal bits are equal, NaNs included."""

Made = Iterator[tuple[int, torch.Tensor]]
"""Parameters by number as the plan makes them: new tensors, of the live ones' device or in main
memory."""

Memory = frozenset[Place]


@dataclass(frozen=True)
class Proof:
    """What was found out about a live model."""

    memory: Memory
    """Where its parameters and buffers were; elsewhere the proof does not hold."""
    direct: frozenset[int]
    """Parameters of the needs that are what the plan makes of them."""
    undecided: frozenset[int]
    """Those of them that must be proven again as soon as the plan makes other bytes of them."""
    processed: frozenset[int]
    """The others."""
    modules: frozenset[str]
    """Modules that the engine must load."""
    reasons: tuple[str, ...]
    """Why, for each parameter or tensor that gave rise to it."""


def memory_of(model: nn.Module) -> Memory:
    """Where every parameter and buffer of a model is."""
    return places_of(model)


def prove(
    trace: Trace,
    live: nn.Module,
    make: Callable[[Iterable[int]], Made],
    derived: Mapping[str, str] | None = None,
) -> Proof:
    """Compare a live model, loaded by its engine, with what the plan makes of the same checkpoint.

    Args:
        make: the plan's parameters of some numbers, in any order.
        derived: as `ModelHost.derived` tells.
    """
    state = {item.name: item for item in state_tensors(live)}
    reasons: dict[str, list[str]] = {}  # by module
    owners = trace.needs.parameters
    comparable: list[int] = []
    for number, (spec, names) in enumerate(zip(owners, _names(trace), strict=True)):
        difference = _difference(spec, state.get(spec.name))
        if not difference and trace.padded.intersection(names):
            difference = "is larger than what the checkpoint has of it"
        if difference:
            _note(reasons, spec.name, f"{spec.name} {difference}")
        else:
            comparable.append(number)
    undecided: set[int] = set()
    for number, made in make(comparable):
        name = owners[number].name
        if not same_bytes(state[name].tensor, made):
            _note(reasons, name, f"{name} holds other bytes than the plan makes")
        elif _hides_order(made):
            undecided.add(number)
    for tie in trace.ties:
        name, owner = tie.spec.name, owners[tie.parameter].name
        difference = _difference(tie.spec, state.get(name))
        if not difference and owner in state:
            distance = state[name].tensor.data_ptr() - state[owner].tensor.data_ptr()
            difference = "" if distance == tie.offset_bytes else f"is no longer tied to {owner}"
        if difference:
            _note(reasons, name, f"{name} {difference}")
    found = {(module_of(name), name.rpartition(".")[2]) for name in state.keys() - trace.names}
    found |= plain_tensors(live).keys() - trace.plain
    holders = sorted({module_of(name) for names in _names(trace) for name in names})
    for module, attribute in sorted(found | set((derived or {}).items())):
        below = f"{module}." if module else ""
        for inner in holders:
            if inner == module or inner.startswith(below):
                reasons.setdefault(inner, []).append(f"{module} derives {attribute} from weights")
    modules = _closure(trace, reasons)
    processed = frozenset(
        number for number, names in enumerate(_names(trace)) if modules & set(map(module_of, names))
    )
    return Proof(
        memory=memory_of(live),
        direct=frozenset(range(len(owners))) - processed,
        undecided=frozenset(undecided) - processed,
        processed=processed,
        modules=modules,
        reasons=tuple(dict.fromkeys(reason for found in reasons.values() for reason in found)),
    )


def same_bytes(live: torch.Tensor, made: torch.Tensor) -> bool:
    """Equal bits, NaNs and signs of zero included; shapes, strides and dtypes are equal already.

    Where they are compared, memory for three times `COMPARED_BYTES` is taken at most.

    Args:
        live: on whatever device.
        made: there, or in main memory.

    Raises:
        Exception: whatever torch raises of the device.
    """
    if live.device != made.device:
        return same_bytes_elsewhere(live, made)
    parts = _parts(*_in_order(live, made), COMPARED_BYTES)
    return all(_equal(_bytes(some), _bytes(expected)) for some, expected in parts)


def same_bytes_elsewhere(live: torch.Tensor, made: torch.Tensor) -> bool:
    """The same, of a live tensor that is copied to main memory part by part."""
    left, right = _in_order(live, made)
    part_bytes = COPIED_BYTES if left.is_contiguous() else GATHERED_BYTES
    copied = torch.empty(
        min(part_bytes, left.nbytes), dtype=torch.uint8, device="cpu", pin_memory=live.is_cuda
    )
    for some, expected in _parts(left, right, part_bytes):
        found = copied[: some.nbytes]
        found.copy_(_bytes(some))
        if not _equal(found, _bytes(expected)):
            return False
    return True


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Of bytes; by words of 8 where they are aligned, which takes a third of the time."""
    end = left.numel() // 8 * 8
    if end and not (left.storage_offset() % 8 or right.storage_offset() % 8):
        if not torch.equal(left[:end].view(torch.int64), right[:end].view(torch.int64)):
            return False
        left, right = left[end:], right[end:]
    return torch.equal(left, right)


def _in_order(live: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, their dimensions in the order of the memory."""
    steps = live.stride()
    order = sorted(range(live.dim()), key=lambda dim: (-steps[dim], live.shape[dim]))
    return live.detach().permute(order), made.detach().permute(order)


def _parts(
    left: torch.Tensor, right: torch.Tensor, part_bytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors in equal parts, in the order of their memory."""
    if left.nbytes <= part_bytes:
        if left.nbytes:
            yield left, right
        return
    rows = max(1, part_bytes * left.shape[0] // left.nbytes)
    for first in range(0, left.shape[0], rows):
        some = slice(first, first + rows)
        if rows == 1:
            yield from _parts(left[first], right[first], part_bytes)
        else:
            yield left[some], right[some]


def _note(reasons: dict[str, list[str]], name: str, reason: str) -> None:
    reasons.setdefault(module_of(name), []).append(reason)


def _names(trace: Trace) -> list[list[str]]:
    """Every parameter's names, its own first."""
    names = [[spec.name] for spec in trace.needs.parameters]
    for tie in trace.ties:
        names[tie.parameter].append(tie.spec.name)
    return names


def _closure(trace: Trace, modules: Iterable[str]) -> frozenset[str]:
    """Modules, with all that share a parameter or a checkpoint tensor with one of them."""
    neighbours: dict[str, set[object]] = {}
    for number, names in enumerate(_names(trace)):
        for name in names:
            neighbours.setdefault(module_of(name), set()).add(("parameter", number))
    for copy in trace.needs.copies:
        module = module_of(trace.needs.parameters[copy.parameter].name)
        neighbours[module].add(("tensor", copy.tensor))
    holders: dict[object, list[str]] = {}
    for module, things in neighbours.items():
        for thing in things:
            holders.setdefault(thing, []).append(module)
    reached, waiting = set(modules), list(modules)
    while waiting:
        for thing in neighbours.get(waiting.pop(), ()):
            for module in holders.pop(thing, ()):
                if module not in reached:
                    reached.add(module)
                    waiting.append(module)
    return frozenset(reached)


def _difference(spec: ParameterSpec, live: StateTensor | None) -> str:
    """Why a live tensor cannot be written as a parameter of the needs; empty: it can."""
    if live is None:
        return "is gone from the live model"
    tensor = live.tensor
    if tensor.dtype != TORCH_DTYPES[spec.dtype]:
        return f"is of {tensor.dtype}, not {TORCH_DTYPES[spec.dtype]}"
    if tuple(tensor.shape) != spec.shape:
        return f"has shape {tuple(tensor.shape)}, not {spec.shape}"
    if tensor.numel() and tuple(tensor.stride()) != spec.strides:
        return f"has strides {tuple(tensor.stride())}, not {spec.strides}"
    return ""


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _hides_order(made: torch.Tensor) -> bool:
    """Whether elements can change places without a trace: within a dimension, or two for another.

    Looks at two slices, or at a row and a column, before it looks at all of a tensor.
    """
    bits = made.view(_BITS[made.itemsize])
    for dim, extent in enumerate(bits.shape):
        if extent > 1 and torch.equal(bits.select(dim, 0), bits.select(dim, 1)):
            first = bits.narrow(dim, 0, 1)
            if _same_parts(bits, first.expand_as(bits)):
                return True
    square = bits.dim() > 1 and bits.shape[-1] == bits.shape[-2] > 1
    return (
        square
        and torch.equal(bits[..., 0, :], bits[..., :, 0])
        and _same_parts(bits, bits.transpose(-1, -2))
    )


def _same_parts(left: torch.Tensor, right: torch.Tensor) -> bool:
    """As `torch.equal`, which on a device takes memory for every element."""
    return all(torch.equal(*parts) for parts in _parts(left, right, COMPARED_BYTES))

"""Needs by tracing: what a rank wants of a layout, told by the engine's own `load_weights`.

Does no I/O. `trace_needs` runs the engine's mapping once on a scratch model on `meta` and turns
what it did into `Needs`. It is a plan only if all of this holds; else `TraceRefused` is raised:
    every write to the model's state is a copy of a checkpoint tensor's elements, or a constant;
    no storage was rebound, no tensor of the model appeared or vanished;
    no checkpoint tensor was changed in place;
    no two copies meet, unless the later hides the earlier whole;
    every parameter is written whole but for what is known to be padding, and every buffer that is
    not known to be something else than a part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from weightbus.consumers.errors import CheckpointRefused, TraceRefused
from weightbus.consumers.reload.canvas import Canvas
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.grouping import grouped_by_module
from weightbus.consumers.reload.host import ModelHost
from weightbus.consumers.reload.lowering import Lowering
from weightbus.consumers.reload.memory import (
    ByteWindow,
    StateTensor,
    module_of,
    plain_tensors,
    state_tensors,
    storage_id,
    window_of,
)
from weightbus.consumers.reload.ownership import Owner, owners_of, spec_of
from weightbus.consumers.reload.recorder import LoadRecorder, Source, Window, Write
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout, TensorSpec
from weightbus.schemas.needs import Copy, Needs, ParameterSpec
from weightbus.schemas.needs_codec import check_needs

__all__ = ("Tie", "Trace", "trace_needs", "whole_needs")


@dataclass(frozen=True)
class Tie:
    """A name whose memory lies inside a parameter's of the needs."""

    spec: ParameterSpec
    parameter: int
    """Index into `Needs.parameters`."""
    offset_bytes: int
    """From the parameter's first byte to its own."""


@dataclass(frozen=True)
class Trace:
    """What one rank wants of one layout."""

    needs: Needs
    """Its parameters are those that something is written to, each under one name."""
    ties: tuple[Tie, ...]
    names: frozenset[str]
    """Of every parameter and buffer of the scratch model."""
    plain: frozenset[tuple[str, str]]
    """(module, attribute) of every tensor of the scratch model that is neither."""
    excused: frozenset[str]
    """Buffers that the checkpoint does not reach."""
    padded: frozenset[str]
    """Parameters that are larger than what any checkpoint has of them."""
    order: tuple[int, ...]
    """Every tensor's number, as an engine's loader is given them: see `grouped_by_module`."""


def trace_needs(host: ModelHost, layout: Layout) -> Trace:
    """Record the engine's mapping of `layout` on a scratch model.

    Raises:
        TraceRefused: it cannot be told as a plan; the reason names operation and tensor.
        CheckpointRefused: the layout does not make the model.
    """
    model = host.scratch_model()
    state = state_tensors(model)
    owners = owners_of(host.name, state)
    before = _memory(model)
    writes = _record(host, layout, model, before)
    after = _memory(model)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise TraceRefused(host.name, f"{name} was bound to another tensor")
    lowering = Lowering(host.name, layout)
    ties: list[Tie] = []
    excused: list[str] = []
    padded: list[str] = []
    owned_writes = _by_owner(host.name, owners, writes)
    for owner, owned in zip(owners, owned_writes, strict=True):
        seen, canvas = _last_writes(host, owner, owned)
        for item, lacking_bytes in _unwritten(owner, canvas):
            if seen and item.parameter and lacking_bytes == host.padding_bytes(item.name):
                padded.append(item.name)
            else:
                _check_unwritten(host, item, lacking_bytes, whole=not seen)
                excused.append(item.name)
        if seen:
            number = lowering.add_parameter(owner.spec, owner.window.offset, seen)
            ties += (
                Tie(spec_of(host.name, item), number, window.offset - owner.window.offset)
                for item, window in owner.held[1:]
            )
    needs = lowering.needs()
    try:
        check_needs(needs, layout)
    except MessageInvalid as error:
        raise TraceRefused(host.name, str(error)) from error
    host.check_needs(needs, layout)
    return Trace(
        needs,
        tuple(ties),
        names=frozenset(item.name for item in state),
        plain=frozenset(plain_tensors(model)),
        excused=frozenset(excused),
        padded=frozenset(padded),
        order=grouped_by_module(_modules_of(layout, owners, owned_writes)),
    )


def whole_needs(layout: Layout) -> Needs:
    """What a rank reads whose own loader does the work: whole tensors, with no destination."""
    return Needs(
        (),
        tuple(
            Copy(number, (0,) * len(t.shape), t.shape, 0, 0, _contiguous_strides(t.shape))
            for number, t in enumerate(layout.tensors)
            if 0 not in t.shape
        ),
    )


def _record(
    host: ModelHost, layout: Layout, model: nn.Module, state: Mapping[str, _Memory]
) -> list[Write]:
    sources = {number: _meta_tensor(host, spec) for number, spec in enumerate(layout.tensors)}
    names: dict[int, str] = {}
    for name, memory in state.items():
        names.setdefault(memory.storage, name)
    recorder = LoadRecorder(sources, names)
    weights = ((layout.tensors[number].name, tensor) for number, tensor in sources.items())
    try:
        with torch.no_grad(), recorder:
            host.load_weights(model, weights)
    except Exception as error:
        if isinstance(error, CheckpointRefused) and recorder.refusal is None:
            raise
        raise TraceRefused(
            host.name, recorder.refusal or f"{type(error).__name__}: {error}"
        ) from error
    if recorder.refusal is not None:
        raise TraceRefused(host.name, recorder.refusal)
    return recorder.writes


def _meta_tensor(host: ModelHost, spec: TensorSpec) -> torch.Tensor:
    if spec.dtype not in TORCH_DTYPES:
        raise TraceRefused(host.name, f"this torch has no dtype for {spec.name}: {spec.dtype}")
    return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")


@dataclass(frozen=True)
class _Memory:
    """What a name of the model stands for."""

    storage: int
    window: ByteWindow
    dtype: torch.dtype
    alive: torch.UntypedStorage = field(compare=False)
    """Held, so that no other storage takes its id."""


def _memory(model: nn.Module) -> dict[str, _Memory]:
    """Of every parameter, buffer and plain tensor of the model."""
    tensors = {item.name: item.tensor for item in state_tensors(model)}
    for (module, attribute), tensor in plain_tensors(model).items():
        tensors[f"{module}.{attribute}" if module else attribute] = tensor
    return {
        name: _Memory(storage_id(t), window_of(t), t.dtype, t.untyped_storage())
        for name, t in tensors.items()
    }


def _by_owner(
    model_name: str, owners: Sequence[Owner], writes: Sequence[Write]
) -> list[list[Write]]:
    """Every write, in order, beside the owner of the memory it goes to; empty ones left out."""
    owned: list[list[Write]] = [[] for _ in owners]
    of_storage: dict[int, list[int]] = {}
    for number, owner in enumerate(owners):
        of_storage.setdefault(owner.storage, []).append(number)
    for write in writes:
        if 0 in write.target.sizes:
            continue
        for number in of_storage.get(write.storage, ()):
            window = owners[number].window
            if window.offset <= write.target.offset and write.target.end <= window.end:
                owned[number].append(write)
                break
        else:
            raise TraceRefused(model_name, f"{write.name}: written outside of every parameter")
    return owned


def _modules_of(
    layout: Layout, owners: Sequence[Owner], owned: Sequence[Sequence[Write]]
) -> list[set[str]]:
    """For every tensor by number: all modules that hold memory it is written to."""
    modules_of: list[set[str]] = [set() for _ in layout.tensors]
    for owner, writes in zip(owners, owned, strict=True):
        modules = {module_of(item.name) for item, _ in owner.held}
        for write in writes:
            for tensor in _tensors_of(write.value):
                modules_of[tensor] |= modules
    return modules_of


def _tensors_of(value: Window | float) -> set[int]:
    """The tensors that a written value is made of."""
    if isinstance(value, float):
        return set()
    if isinstance(value.base, Source):
        return {value.base.tensor}
    return {tensor for part in value.base.parts for tensor in _tensors_of(part.window)}


def _last_writes(
    host: ModelHost, owner: Owner, writes: Sequence[Write]
) -> tuple[list[Write], Canvas]:
    """What is seen of the writes at the end."""
    canvas = Canvas([write.target for write in writes], [window for _, window in owner.held])
    seen: list[Write] = []
    for number, write in enumerate(writes):
        if canvas.is_whole(number):
            seen.append(write)
        elif isinstance(write.value, float):
            seen += (replace(write, target=window) for window in canvas.visible(number))
        elif not canvas.is_hidden(number):
            raise TraceRefused(
                host.name, f"a copy to {owner.spec.name} is overwritten, but only in part"
            )
    return seen, canvas


def _unwritten(owner: Owner, canvas: Canvas) -> Iterator[tuple[StateTensor, int]]:
    """What nothing, or not everything, is written to, and how many of its bytes are not."""
    for item, window in owner.held:
        lacking_bytes = canvas.lacking_bytes(window)
        if lacking_bytes:
            yield item, lacking_bytes


def _check_unwritten(
    host: ModelHost, item: StateTensor, lacking_bytes: int, *, whole: bool
) -> None:
    """
    Args:
        whole: nothing at all is written to it.

    Raises:
        CheckpointRefused, TraceRefused: it has to come of the checkpoint.
    """
    if item.parameter and (reason := host.unwritten(item.name)):
        raise CheckpointRefused(
            host.name, f"{item.name}: {lacking_bytes} of its bytes are in no tensor: {reason}"
        )
    if item.parameter:
        is_excused = whole and host.drops(item.name)
    else:
        is_excused = host.may_stay_uncovered(item.name, persistent=item.persistent)
    if not is_excused:
        raise TraceRefused(
            host.name, f"{item.name}: {lacking_bytes} of its bytes are not written by load_weights"
        )


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))

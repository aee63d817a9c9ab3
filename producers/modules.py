"""A trainer's module -> the part of this rank, under the names that engines load.

Does no I/O, moves no bytes and talks to no rank. Wrappers are known by their types, never by a
pattern in a name: a module may have an attribute called `module`. Tied parameters are known as one
object under several names, and published under the first, as `save_pretrained` does.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed import tensor as distributed
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from weightbus.producers.adapters import adapted, known_type, wrapped_by_peft
from weightbus.producers.errors import RankInvalid, TensorInvalid
from weightbus.producers.fused import Split, Window, cut
from weightbus.producers.held import hold
from weightbus.producers.shards import (
    Box,
    Cast,
    Delta,
    Part,
    Shard,
    box_of_shard,
    box_of_tensor,
    cast_dtype,
    plan_boxes,
)

__all__ = ("Buffers", "plan_module")

Buffers = Literal["persistent", "none"]
"""Which buffers are published: those that a state dict has, or none."""

_WRAPPERS: Final = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)
"""Where a type of wrapper is defined, its name, and what it keeps its module as. What nobody has
imported wraps nothing: that saves us the seconds that an import takes."""


class _Entry(NamedTuple):
    name: str
    tensor: torch.Tensor
    delta: Delta | None
    owner: Mapping[str, torch.Tensor | None]
    """Where the module has it, by the last part of its name."""

    @property
    def is_plain(self) -> bool:
        return not isinstance(self.tensor, distributed.DTensor)


def plan_module(
    module: nn.Module,
    *,
    rank: int = 0,
    world_size: int = 1,
    dtype: Cast | None = None,
    buffers: Buffers = "persistent",
    split: Split | None = None,
) -> Part:
    """The part of rank `rank` of the `world_size` ranks that hold `module`.

    Names are those of the innermost module: `torch.compile`, `DistributedDataParallel`,
    `DataParallel`, activation checkpointing and PEFT leave no trace in them.

    - Of a `DTensor` (FSDP2, tensor parallelism) each rank publishes its own box, and of boxes that
      are held by replicas (HSDP) the first one does. Replicas that its mesh does not know of (what
      is not tensor parallel, beside what is) are copied by each rank, compared, and sealed once.
    - All other tensors are taken to be whole and equal on every rank (DDP, buffers, parameters that
      FSDP ignores). They are dealt to the ranks, the largest first, each to the rank that has the
      fewest bytes so far: a rank copies, and keeps in its slots, 1/world_size of them.

    - Of PEFT's LoRA layers the sum W + B A s is published, as their adapters are at each `publish`,
      added in the copy, one layer at a time; and of modules to save those in use. Under FSDP the
      factors A (r x in) are gathered then, in the trainer's thread: a collective of all ranks.

    Give the part to `publish` each time; `Part` says when it is to be planned anew, and so it is
    when adapters were added, or other modules to save are active.

    Args:
        module: with its wrappers, or without. It stays as it is (what FSDP2 has gathered is given
            up, as by `state_dict`). Its tensors are kept, and layers with adapters.
        rank: of this process, as given to the publisher; every rank calls this.
        world_size: as given to the publisher.
        dtype: what parameters and buffers of floating point are cast to in the copy, as in
            `plan_part`.
        buffers: which ones.
        split: where the checkpoint's tensors lie in those of the module that hold several.

    Raises:
        RankInvalid: `rank` is not one of `world_size`.
        TensorInvalid: something cannot be published, or not from where it lies; nothing of it is
            passed over.
    """
    if not 0 <= rank < world_size:
        raise RankInvalid(rank, f"must be 0 to {world_size - 1}, world_size being {world_size}")
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()  # after a forward pass it may show the gathered parameters
    entries = list(_distinct(_walk(module, "", buffers)))
    plain = [entry for entry in entries if entry.is_plain]
    # A function is promised published names, which these are not: it is not asked.
    uniform = dtype if isinstance(dtype, torch.dtype) else None
    dtypes = [cast_dtype(e.name, e.tensor.dtype, uniform) for e in plain]
    sizes = [e.tensor.numel() * each.itemsize for e, each in zip(plain, dtypes, strict=True)]
    owners = {e.name: owner for e, owner in zip(plain, _deal(sizes, world_size), strict=True)}
    boxes, held = [], []
    for entry in entries:
        box = box_of_tensor(entry.name, entry.tensor)._replace(delta=entry.delta)
        if owners.get(entry.name, rank) != rank:
            box = box._replace(source=None)
        parts = _split(box, split)
        aliased = not entry.is_plain or len(parts) > 1  # else it is read itself
        held.append(hold(entry.name, entry.tensor, entry.owner, aliased=aliased))
        boxes += parts
    deltas = [e.delta for e in entries if e.delta is not None]
    return replace(plan_boxes(boxes, dtype, deltas), held=held)


def _walk(module: nn.Module, prefix: str, buffers: Buffers) -> Iterator[_Entry]:
    """All parameters, then buffers, of each module before its children's."""
    module = _unwrapped(module, prefix)
    layer = adapted(prefix.removesuffix("."), module)
    if layer is not None:
        for entry in _walk(layer.base, prefix, buffers):
            yield entry._replace(delta=layer.delta) if entry.name == f"{prefix}weight" else entry
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _Entry(prefix + name, parameter, None, module._parameters)
    if buffers == "persistent":
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield _Entry(prefix + name, buffer, None, module._buffers)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", buffers)


def _unwrapped(module: nn.Module, prefix: str) -> nn.Module:
    name = prefix.removesuffix(".")
    while (inner := _inner(module) or wrapped_by_peft(name, module)) is not None:
        module = inner
    if isinstance(module, FullyShardedDataParallel):
        limit = "its parameters are flat ranges; use torch.distributed.fsdp.fully_shard (FSDP2)"
        name = name or type(module.module).__name__
        raise TensorInvalid(name, "wrapped in FullyShardedDataParallel", limit)
    return module


def _inner(module: nn.Module) -> nn.Module | None:
    inner: nn.Module
    if isinstance(module, DistributedDataParallel | nn.DataParallel):
        inner = module.module
        return inner
    for where, kind, attribute in _WRAPPERS:
        wrapper = known_type(where, kind)
        if wrapper is not None and isinstance(module, wrapper):
            inner = getattr(module, attribute)
            return inner
    return None


def _distinct(entries: Iterator[_Entry]) -> Iterator[_Entry]:
    """Each tensor under its first name."""
    first: dict[int, _Entry] = {}
    for entry in entries:
        if hasattr(entry.tensor, "ds_shape"):
            limit = "every rank holds a flat range; use ZeRO-2 or less, or FSDP2"
            raise TensorInvalid(entry.name, "partitioned by ZeRO-3", limit)
        known = first.setdefault(id(entry.tensor), entry)
        if known is entry:
            yield entry
        elif known.delta != entry.delta:
            value = f"tied to {known.name}, and one of them has an adapter"
            raise TensorInvalid(entry.name, value, "an adapter on both or none, or untied")


def _deal(sizes_bytes: Sequence[int], ranks: int) -> list[int]:
    """For each size the rank that takes it: the same wherever it is asked."""
    owners = [0] * len(sizes_bytes)
    loads = [(0, rank) for rank in range(ranks)]
    for number in sorted(range(len(sizes_bytes)), key=lambda n: (-sizes_bytes[n], n)):
        load_bytes, owner = loads[0]
        owners[number] = owner
        heapq.heapreplace(loads, (load_bytes + sizes_bytes[number], owner))
    return owners


def _split(box: Box, split: Split | None) -> list[Box]:
    """The boxes of the checkpoint's tensors that lie in one of the module's."""
    windows = None if split is None else split(box.name, box.shape)
    if windows is None:
        return [box]
    if len(windows) == 1 and _is_whole(windows[0], box.shape):
        return [box._replace(name=windows[0].name)]
    if box.delta is not None and windows:
        limit = "what an adapter changes must be one of the checkpoint's tensors"
        raise TensorInvalid(box.name, "split, and has an adapter", limit)
    boxes = [Box(w.name, box.dtype, w.shape, (0,) * len(w.shape), None) for w in windows]
    if box.source is not None:
        shard = Shard(box.name, box.source, box.shape, box.starts)
        boxes += map(box_of_shard, cut(shard, windows))
    return boxes


def _is_whole(window: Window, shape: tuple[int, ...]) -> bool:
    """Whether it only has another name."""
    zeros = (0,) * len(shape)
    plain = window.axes is None and window.at in (None, zeros)
    return plain and (window.shape, window.starts, window.sizes) == (shape, zeros, shape)

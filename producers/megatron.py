"""Megatron's GPT models: the boxes of a rank of any TP/PP/EP grid, as shards of a checkpoint.

Names and order of rows are those of Hugging Face's Llama, Qwen2, Qwen3 and Qwen3-MoE, which engines
load. Megatron keeps q, k and v of a group of heads together, and gate and up; ranks hold slices of
them. Copies no bytes, talks to no rank, gathers nothing, and needs no Megatron but for `grid_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from weightbus.producers.errors import TrainerInvalid
from weightbus.producers.fused import Window, cut
from weightbus.producers.megatron_boxes import LAYER, boxes_of
from weightbus.producers.megatron_grid import MegatronGrid, grid_of
from weightbus.producers.shards import Shard

__all__ = ("MegatronGrid", "grid_of", "megatron_shards")

Model = torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.Tensor]
"""A `GPTModel` with its wrappers or without, several of them (the chunks of a virtual pipeline), or
tensors by the names that they have in one."""


def megatron_shards(
    model: Model,
    grid: MegatronGrid,
    *,
    skip: Collection[str] = (),
    rename: Callable[[str], str] | None = None,
) -> list[Shard]:
    """What this rank publishes; every rank calls it, and publishes the result as its part.

    The shards alias the model's parameters: plan them once (`plan_part`) and publish the part as
    long as the parameters keep their memory. Call `publish` when they are whole on every rank: with
    `overlap_param_gather`, after `disable_forward_pre_hook()`.

    What several ranks hold is given by one of them: what tensor parallel ranks hold alike by the
    first; what data parallel ranks hold alike is dealt to them, in runs of about as many bytes.

    Args:
        skip: beginnings of names that are left out, because others publish them or nobody does.
        rename: from Qwen3-MoE's name of a tensor to that of the checkpoint (Mixtral calls
            `mlp.experts.0.gate_proj` otherwise; a multimodal model has a prefix).

    Raises:
        TensorInvalid: a name is not known, or its shape is not what the grid says.
        TrainerInvalid: `model` is no `GPTModel`.
    """
    skipped = (skip,) if isinstance(skip, str) else tuple(skip)
    held = [
        _Held(name, tensor, *boxes_of(name, layer, tensor, grid))
        for name, layer, tensor in _named(model, grid)
        if not name.startswith(skipped)
    ]
    shards: list[Shard] = []
    for of_experts, rank, size in (
        (False, grid.dp_rank, grid.dp_size),
        (True, grid.edp_rank, grid.edp_size),
    ):
        dealt = [one for one in held if one.is_expert == of_experts and one.shard is not None]
        for one in _run_of(dealt, rank, size):
            assert one.shard is not None
            shards += cut(one.shard, one.windows)
    if rename is None:
        return shards
    return [Shard(rename(s.name), s.tensor, s.global_shape, s.starts) for s in shards]


class _Held(NamedTuple):
    name: str
    tensor: torch.Tensor
    shard: Shard | None
    """None: another tensor parallel rank gives it."""
    windows: Sequence[Window]
    is_expert: bool


def _run_of(held: Sequence[_Held], rank: int, size: int) -> Iterator[_Held]:
    """What number `rank` of `size` replicas gives: those whose middle lies in its share."""
    total, before = max(sum(one.tensor.nbytes for one in held), 1), 0
    for one in held:
        middle = before + one.tensor.nbytes // 2
        if min(middle * size // total, size - 1) == rank:
            yield one
        before += one.tensor.nbytes


def _named(model: Model, grid: MegatronGrid) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(name, number of its layer in the whole model, tensor)."""
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            if not name.endswith("_extra_state"):
                found = LAYER.match(name)
                layer = None if found is None else int(found[1]) + grid.layer_offset
                yield from _unless_copy(name, layer, tensor, grid)
        return
    for chunk in (model,) if isinstance(model, torch.nn.Module) else model:
        gpt = _unwrapped(chunk)
        layers = {n: layer.layer_number - 1 for n, layer in enumerate(gpt.decoder.layers)}
        for name, tensor in _tensors(gpt):
            found = LAYER.match(name)
            layer = None if found is None else layers[int(found[1])]
            yield from _unless_copy(name, layer, tensor, grid)


def _unless_copy(
    name: str, layer: int | None, tensor: torch.Tensor, grid: MegatronGrid
) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    shared = grid.tied_embeddings or getattr(tensor, "shared_embedding", False)
    if not (shared and name == "output_layer.weight"):
        yield name, layer, tensor


def _unwrapped(module: torch.nn.Module) -> Any:
    """Megatron's wrappers (DDP, Float16Module) keep the model as `module`; a GPTModel has none."""
    inner: Any = module
    while not hasattr(inner, "decoder"):
        outer, inner = inner, getattr(inner, "module", None)
        if not isinstance(inner, torch.nn.Module):
            value = f"of type {type(outer).__qualname__}"
            raise TrainerInvalid("a Megatron model", value, "must be a GPTModel, or wrap one")
    return inner


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    for path, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer

"""Shards of all ranks -> the whole tensors, each element exactly once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weightbus.producers.shards import Shard

__all__ = ("assemble",)


def assemble(shards: Iterable[Shard]) -> dict[str, torch.Tensor]:
    """By name. Fails where boxes overlap, lie outside or leave elements out."""
    whole: dict[str, torch.Tensor] = {}
    times: dict[str, torch.Tensor] = {}
    for shard in shards:
        shape = tuple(shard.tensor.shape) if shard.global_shape is None else shard.global_shape
        starts = (0,) * len(shape) if shard.starts is None else shard.starts
        tensor = whole.setdefault(shard.name, torch.zeros(shape, dtype=shard.tensor.dtype))
        assert tensor.shape == shape, shard
        assert len(starts) == shard.tensor.ndim == len(shape), shard
        sizes = shard.tensor.shape
        ends = [first + size for first, size in zip(starts, sizes, strict=True)]
        assert all(end <= extent for end, extent in zip(ends, shape, strict=True)), shard
        place = tuple(slice(first, end) for first, end in zip(starts, ends, strict=True))
        tensor[place] = shard.tensor
        times.setdefault(shard.name, torch.zeros(shape, dtype=torch.int8))[place] += 1
    for name, count in times.items():
        assert bool((count == 1).all()), (
            f"{name}: elements are there {int(count.min())} to {int(count.max())} times"
        )
    return whole

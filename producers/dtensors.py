"""Which box of a `DTensor` this rank publishes. Does no I/O, and talks to no rank.

Every rank finds its own box by the mesh and the placements alone. A box that replicas hold, too, is
published by the first of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed import tensor as distributed
from torch.distributed.tensor import Placement
from torch.distributed.tensor.placement_types import _StridedShard

from weightbus.producers.errors import TensorInvalid

__all__ = ("LocalBox", "local_box")


class LocalBox(NamedTuple):
    """A box, in indices of the whole tensor."""

    starts: tuple[int, ...]
    local: torch.Tensor
    """Its elements: an alias of this rank's memory."""


def local_box(name: str, tensor: distributed.DTensor) -> LocalBox | None:
    """This rank's box, maybe without elements; None: another rank publishes it.

    Raises:
        TensorInvalid: it is placed in a way that is not known, or not as one box on every rank.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    ways = tuple(mesh.shape)
    for where, placement in zip(coordinate, placements, strict=True):
        if placement.is_replicate():
            if where != 0:
                return None
        elif not _cuts(placement):
            raise TensorInvalid(name, f"placed as {placement}", "must be Shard or Replicate")
    held = [range(extent) for extent in tensor.shape]
    for number in _in_order_of_cuts(placements):
        dimension = placements[number].dim  # type: ignore[attr-defined]
        held[dimension] = _chunk(held[dimension], coordinate[number], ways[number])
    sizes = tuple(map(len, held))
    local = tensor.to_local().detach()
    alike = sizes == tuple(local.shape) or (0 in sizes and local.numel() == 0)
    if not alike or not _cut_as_fsdp_does(placements, ways):
        value = f"placed as {placements}, {tuple(local.shape)} of {tuple(tensor.shape)} here"
        raise TensorInvalid(name, value, "must be one box on every rank; give it as Shards")
    return LocalBox(tuple(indices.start for indices in held), local)


def _cuts(placement: Placement) -> bool:
    return isinstance(placement, _StridedShard | distributed.Shard)


def _in_order_of_cuts(placements: tuple[Placement, ...]) -> list[int]:
    """Numbers of the placements that cut, in the order in which they did.

    A mesh names data parallelism before tensor parallelism, but FSDP2 cuts what tensor parallelism
    has cut before. It says so by `_StridedShard`, which comes after all that stand to its right.
    """
    strided = [n for n, each in enumerate(placements) if isinstance(each, _StridedShard)]
    plain = [n for n, each in enumerate(placements) if _cuts(each) and n not in strided]
    return plain + strided[::-1]


def _cut_as_fsdp_does(placements: tuple[Placement, ...], ways: tuple[int, ...]) -> bool:
    """Whether each `_StridedShard` counts the pieces of its dimension that stand to its right."""
    for number, placement in enumerate(placements):
        if not isinstance(placement, _StridedShard):
            continue
        pieces = 1
        for right in range(number + 1, len(placements)):
            if getattr(placements[right], "dim", None) == placement.dim:
                pieces *= ways[right]
        if placement.split_factor != pieces:
            return False
    return True


def _chunk(indices: range, number: int, count: int) -> range:
    """As `torch.chunk` cuts them: the last ones may be shorter, or empty."""
    size = -(-len(indices) // count)
    return indices[number * size : (number + 1) * size]

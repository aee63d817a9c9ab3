"""Whether a module's tensors still lie where they lay when it was planned. Moves no bytes.

FSDP2 of older torch pads its uneven shards at the first forward pass, in other memory, and a load
may put other tensors in a module's place: an alias of what was there keeps the values of then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from weightbus.producers.errors import TensorInvalid

__all__ = ("Held", "hold")


class Held(NamedTuple):
    """A parameter or buffer, and where it was found."""

    name: str
    """Without wrappers, and before it is cut into the checkpoint's."""
    tensor: torch.Tensor
    owner: Mapping[str, torch.Tensor | None]
    """All of its module's."""
    key: str
    """Its name among them."""
    address: int
    """Of its memory here; 0: whatever memory it has is read, or none of it."""

    def check(self) -> None:
        """
        Raises:
            TensorInvalid: it was replaced, or has got other memory.
        """
        now = self.owner.get(self.key)
        moved = self.address != 0 and _local(self.tensor).data_ptr() != self.address
        if moved or (now is not self.tensor and _is_another(now, self.tensor)):
            value = "in other memory than when it was planned"
            raise TensorInvalid(self.name, value, "plan the module again")


def hold(
    name: str, tensor: torch.Tensor, owner: Mapping[str, torch.Tensor | None], *, aliased: bool
) -> Held:
    """Of a tensor that is planned; `aliased`: what is read is an alias, and not itself."""
    local = _local(tensor)
    address = local.data_ptr() if aliased and local.numel() else 0
    return Held(name, tensor, owner, name.rpartition(".")[2], address)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What `to_local` returns, without its 5 us."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _is_another(now: torch.Tensor | None, then: torch.Tensor) -> bool:
    """Not so if it is gathered: FSDP shows parameters placed otherwise until it frees them."""
    if not isinstance(then, DTensor):
        return True
    placed = (then.device_mesh, then.placements)
    return isinstance(now, DTensor) and (now.device_mesh, now.placements) == placed

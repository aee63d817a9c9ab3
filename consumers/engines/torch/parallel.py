"""Which part of a model one rank holds, and how the ranks add up. Owns no process group.

Building a model needs only the two numbers, so a scratch model can be built on `meta` at any time;
the collectives run on torch's default group, which the worker opens before it serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from weightbus.consumers.errors import PlanError

__all__ = ("TensorParallel",)


@dataclass(frozen=True)
class TensorParallel:
    """One rank of `size` ranks that share every layer of a model. Alone by default."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise PlanError("tensor-parallel rank", self.rank, f"must be below {self.size}")

    def share(self, total: int, what: str) -> int:
        """This rank's equal share of `total` things.

        Raises:
            PlanError: `total` cannot be shared out evenly.
        """
        if total % self.size:
            raise PlanError(what, total, f"must be a multiple of {self.size} ranks")
        return total // self.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place. Called by every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors side by side in the last dimension. Called by every rank."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=-1)

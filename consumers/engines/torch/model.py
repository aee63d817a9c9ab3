"""The contract of a model that the `torch` engine serves, and what every such model shares.

Does no I/O. A model is built unset for one rank; checkpoint names are those of Hugging Face,
parameter names are the model's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from weightbus.consumers.engines.torch.messages import Inputs, Outputs
from weightbus.consumers.engines.torch.parallel import TensorParallel
from weightbus.consumers.engines.torch.parameter import Shard, ShardedParameter
from weightbus.consumers.errors import PlanError

__all__ = ("CheckpointPart", "ServedModel")


class CheckpointPart(NamedTuple):
    """One checkpoint tensor and the parameter that it is a part of."""

    name: str
    parameter: ShardedParameter
    shard: Shard = None


class ServedModel(nn.Module, ABC):
    """One rank of a model."""

    def __init__(self, parallel: TensorParallel) -> None:
        super().__init__()
        self.parallel = parallel

    @abstractmethod
    def checkpoint_parts(self) -> Iterator[CheckpointPart]:
        """Every checkpoint tensor that this model is made of, each once."""

    @abstractmethod
    def infer(self, inputs: Inputs) -> Outputs:
        """Answer one request; called by every rank with the same inputs.

        Raises:
            RequestRefused: the model cannot answer such inputs.
        """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy checkpoint tensors into the parameters; returns the names that were taken.

        Names that the model is not made of (a pooler, position ids, a tied head) are passed over.

        Raises:
            PlanError: a tensor has another shape than the model is made for.
        """
        parts = {part.name: part for part in self.checkpoint_parts()}
        taken: set[str] = set()
        for name, tensor in weights:
            part = parts.get(name)
            if part is not None:
                try:
                    part.parameter.weight_loader(tensor, part.shard)
                except PlanError as error:
                    raise PlanError(f"shape of {name}", error.value, error.limit) from None
                taken.add(name)
        return taken

    def load_checkpoint(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As `load_weights`, for all that the model is made of.

        Raises:
            PlanError: a tensor is missing, or has another shape than the model is made for.
        """
        missing = {part.name for part in self.checkpoint_parts()} - self.load_weights(weights)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise PlanError("checkpoint", "incomplete", f"must have {min(missing)}{more}")

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """The inverse of `load_weights`: views that share the parameters' memory. Unsharded models
        only.

        Raises:
            PlanError: this is one of several ranks, or a module keeps its weight repacked.
        """
        if self.parallel.size > 1:
            raise PlanError("ranks of the model", self.parallel.size, "must be 1 to be exported")
        for name, module in self.named_modules():
            if hasattr(module, "process_weights_after_loading"):
                raise PlanError("module", name, "keeps its weight repacked and cannot be exported")
        return {p.name: p.parameter.checkpoint_view(p.shard) for p in self.checkpoint_parts()}

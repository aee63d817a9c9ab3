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
                part.parameter.weight_loader(tensor, part.shard)
                taken.add(name)
        return taken

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

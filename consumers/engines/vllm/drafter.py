"""A target model and the drafter that proposes for it, made of one checkpoint, as one model.

Does no I/O. vLLM lets a drafter use modules of its target (embeddings, head): they are one module
under two names here, as they are in the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import nn

from weightbus.consumers.reload.host import Weights

__all__ = ("DRAFT", "TARGET", "Joint", "share_as", "tie_as")

TARGET: Final = "target."
DRAFT: Final = "draft."
"""What the names of a target's and of a drafter's tensors begin with."""


class Joint(nn.Module):
    """Both, side by side. `load_weights` gives each of them the checkpoint."""

    def __init__(self, target: nn.Module, draft: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.draft = draft
        self.drafted: frozenset[str] | None = None
        """Names of the checkpoint tensors that the drafter alone is made of; None: not known."""

    def load_weights(self, weights: Weights) -> None:
        """The target first; what the drafter needs is held meanwhile: all of it, if not known."""
        kept: list[tuple[str, torch.Tensor]] = []

        def passing() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if self.drafted is None or name in self.drafted:
                    kept.append((name, tensor))
                yield name, tensor

        target: Any = self.target
        draft: Any = self.draft
        target.load_weights(passing())
        with _incomplete() if self.drafted is not None else nullcontext():
            draft.load_weights(iter(kept))


def _incomplete() -> AbstractContextManager[None]:
    """vLLM 0.32 looks whether a drafter is given all of its layers; what it shares it is not."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import (
            disable_mtp_completeness_check,
        )
    except ImportError:
        return nullcontext()
    disabled: AbstractContextManager[None] = disable_mtp_completeness_check()
    return disabled


def share_as(live: Joint, scratch: Joint) -> None:
    """Let the scratch drafter use modules of its target wherever the live one does."""
    targets = {id(module): name for name, module in live.target.named_modules() if name}
    for name, module in list(live.draft.named_modules(remove_duplicate=False)):
        if name and id(module) in targets:
            above, _, attribute = name.rpartition(".")
            shared = scratch.target.get_submodule(targets[id(module)])
            setattr(scratch.draft.get_submodule(above), attribute, shared)


def tie_as(live: nn.Module, scratch: nn.Module) -> list[tuple[str, str]]:
    """Tie parameters of the scratch model that are one parameter in the live one.

    vLLM 0.32 ties a head to the embeddings after loading, if it finds them equal.

    Returns:
        The names of each pair that was not tied when the model was built.
    """
    fresh = dict(scratch.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = []
    for name, parameter in live.named_parameters(remove_duplicate=False):
        if not parameter.numel():
            continue
        kept = first.setdefault(parameter.data_ptr(), name)
        if kept == name or not {kept, name} <= fresh.keys() or fresh[kept] is fresh[name]:
            continue
        if fresh[kept].shape == fresh[name].shape:
            above, _, attribute = name.rpartition(".")
            setattr(scratch.get_submodule(above), attribute, fresh[kept])
            tied.append((kept, name))
    return tied

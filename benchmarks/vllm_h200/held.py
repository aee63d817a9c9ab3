"""What one rank of vLLM holds: every bit of its parameters, compared with a version.

Does no I/O. Shares nothing with what moves weights, neither vLLM's loader nor our tracer: where a
checkpoint tensor lies in vLLM's parameters is written down once more, by the shapes of
`consumers/engines/torch/shapes.py` (fused projections, stacked experts, a padded vocabulary, and
the cuts of tensor parallelism), and what it must hold is computed (`benchmarks/h200/weights.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks.h200.held import holding
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.parameter import ShardedParameter

__all__ = ("bind", "holding", "plain_name")


def bind(model: ServedModel, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Let a model of shapes, as `build_meta` makes it, hold vLLM's parameters as its own: they
    share memory. May be called again when vLLM has replaced some.

    Raises:
        ValueError: they do not fit, and which.
    """
    theirs = {plain_name(name): tensor for name, tensor in parameters}
    for prefix, module in model.named_modules():
        for name, ours in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            held = theirs.pop(full, None)
            if held is None:
                raise ValueError(f"vLLM has no parameter {full}")
            if held.shape != ours.shape or held.dtype != ours.dtype:
                found = f"{tuple(held.shape)} of {held.dtype}"
                raise ValueError(f"{full} is {found} in vLLM, not {tuple(ours.shape)}")
            assert isinstance(ours, ShardedParameter), "as every layer of shapes makes it"
            shared = held.detach().as_subclass(torch.Tensor)
            bound = ShardedParameter(shared, requires_grad=False)
            bound.windows = ours.windows
            module.register_parameter(name, bound)
    if theirs:
        raise ValueError(f"vLLM has parameters that are of no checkpoint: {', '.join(theirs)}")


def plain_name(name: str) -> str:
    """A parameter's name without what vLLM puts around modules."""
    return name.removeprefix("model.").replace(".routed_experts.", ".")

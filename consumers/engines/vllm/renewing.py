"""What vLLM makes of weights only once, and keeps: made anew in its own memory after every update.

Does no I/O. Neither a write to the parameter nor vLLM's reload lifecycle reaches these copies, or
not always:
    attention sinks, which some kernels take in float32 or another dtype than the checkpoint has;
    sines and cosines of Fourier position embeddings (FoPE), multiplied by learned coefficients,
    which are computed in the first forward pass.
Their memory stays where it is, as captured graphs read them there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from weightbus.consumers.engines.vllm.captured import storage_address
from weightbus.consumers.errors import ProofFailed

__all__ = ("Renewer", "Sinks")


@dataclass(frozen=True)
class Sinks:
    """Attention sinks that a kernel keeps beside the model's."""

    name: str
    """Of the attention module."""
    kept: torch.Tensor
    source: torch.Tensor | None
    """The parameter that they are a copy of; None: it is not known which."""
    kernel: int
    """Its number, of all of the model."""

    @property
    def reason(self) -> str:
        """Why an engine that has them takes no version, if the source is not known."""
        return (
            f"keeps a copy of its attention sinks, {tuple(self.kept.shape)} of {self.kept.dtype}, "
            "which is not known to be that of a parameter as it is: it would become stale"
        )


class Renewer:
    """Of one model, whose modules stay the same."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attention = [
            (name, impl) for name, module in model.named_modules() for impl in _impls(module)
        ]
        self._copying: set[int] = set()
        """Kernels whose sinks were once found to be a parameter's, as it was then."""
        self._fourier: list[Any] = [module for module in model.modules() if _is_fourier(module)]

    def sinks(self) -> Iterator[Sinks]:
        """Every copy of sinks that there is now."""
        used = [
            (number, name, impl, impl.sinks)
            for number, (name, impl) in enumerate(self._attention)
            if isinstance(getattr(impl, "sinks", None), torch.Tensor)
        ]
        if not used:
            return
        tensors = (*self._model.parameters(), *self._model.buffers())
        state = {storage_address(tensor) for tensor in tensors}
        for number, name, impl, kept in used:
            if storage_address(kept) not in state:
                told = getattr(impl, "_sinks_source", None)
                nearest = _nearest_sinks(self._model, name, kept)
                source = told if isinstance(told, torch.Tensor) else nearest
                yield Sinks(name, kept, source, number)

    def unknown(self, *, compares: bool) -> Sinks | None:
        """A copy of which it is not known what it is made of, if there is any.

        Args:
            compares: whether copies have to hold what their parameters hold, as those that a kernel
                scales do not. They need not again: an update that fails may part them.
        """
        for sinks in self.sinks():
            if sinks.source is None:
                return sinks
            if compares and sinks.kernel not in self._copying:
                if not torch.equal(sinks.kept, sinks.source.to(sinks.kept)):
                    return replace(sinks, source=None)
                self._copying.add(sinks.kernel)
        return None

    def renew(self) -> bool:
        """Make all copies of the parameters as they are now; what the device does may be under way.

        Returns:
            Whether there are any.

        Raises:
            ProofFailed: it is not known what a copy is made of.
        """
        found = bool(self._fourier)
        with torch.inference_mode():  # what a forward pass has made can be written only so
            for sinks in self.sinks():
                if sinks.source is None:
                    raise ProofFailed(sinks.name, sinks.reason)
                sinks.kept.copy_(sinks.source)
                found = True
            for rotary in self._fourier:
                rotary.cos_sin_cache.copy_(rotary._compute_cos_sin_cache())
        return found


def _impls(module: nn.Module) -> list[Any]:
    """What computes attention for a module; several where vLLM picks one for every batch."""
    impl = vars(module).get("impl")
    variants = getattr(impl, "get_impl_variants", None)
    return [] if impl is None else [impl, *(variants() if callable(variants) else ())]


def _nearest_sinks(model: nn.Module, name: str, kept: torch.Tensor) -> torch.Tensor | None:
    """The one parameter for sinks that hangs above a module, and is of the shape of its copy."""
    while name:
        name = name.rpartition(".")[0]
        found = [
            parameter
            for key, parameter in model.get_submodule(name)._parameters.items()
            if parameter is not None and "sink" in key and parameter.shape == kept.shape
        ]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _is_fourier(module: nn.Module) -> bool:
    """Whether a module computes its sines and cosines of parameters, once."""
    return (
        "cos_sin_cache" in module._buffers
        and any(parameter is not None for parameter in module._parameters.values())
        and hasattr(module, "_compute_cos_sin_cache")
    )

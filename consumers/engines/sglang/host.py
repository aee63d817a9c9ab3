"""What the reload machinery needs to know of one rank of SGLang. Does no I/O of its own.

Owns nothing of the engine: the model is its runner's, and is changed by `reload` only, in SGLang's
own lifecycle. Runs on the scheduler's main thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from weightbus.consumers.engines.sglang.coverage import LoadCoverage, on_one_thread
from weightbus.consumers.engines.sglang.lifecycle import (
    can_restore,
    load_checkpoint,
    reload_modules,
)
from weightbus.consumers.engines.sglang.scratch import build_scratch
from weightbus.consumers.errors import CheckpointRefused
from weightbus.consumers.reload.host import ModelHost, Weights
from weightbus.consumers.reload.memory import module_of

__all__ = ("SglangHost",)

_NAMED = 4
"""Parameters that a message names."""

_DISAGREES = (
    "exceeds dimension size",
    "must match",
    "is invalid for input of size",
    "out of range",
    "size mismatch",
    "split_with_sizes expects",
)
"""What torch says where shapes do not fit."""


class SglangHost(ModelHost):
    """One rank's model."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        build: Callable[[str], nn.Module] = build_scratch,
        load: Callable[[nn.Module, Weights, torch.device], None] = load_checkpoint,
    ) -> None:
        """
        Args:
            build: makes another model of this rank on `meta`, given the architecture's name.
            load: the mapping of checkpoint tensors to parameters.
        """
        self._model = model
        self._device = device
        self._build = build
        self._load = load
        self._derived: dict[str, str] = {}

    @property
    def name(self) -> str:
        return type(self._model).__name__

    @property
    def device(self) -> str:
        return str(self._device)

    def live_model(self) -> nn.Module:
        return self._model

    def scratch_model(self) -> nn.Module:
        return self._build(self.name)

    def load_weights(self, model: nn.Module, weights: Weights) -> None:
        self._check_can_load_again(model)
        reached: list[str] = []
        coverage = LoadCoverage(model)
        with _refusing(self.name, reached), on_one_thread(), coverage:
            self._load(model, _noted(weights, reached), self._device)
        lacking = coverage.lacking()
        if lacking:
            named = ", ".join(lacking[:_NAMED])
            more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
            raise CheckpointRefused(self.name, f"it leaves {named}{more} in part as they were")

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        derived = reload_modules(
            self._model, modules, lambda: self._load(self._model, weights, self._device)
        )
        if modules is None:
            self._derived = derived

    def derived(self) -> Mapping[str, str]:
        return self._derived

    def synchronize(self) -> None:
        """On a CPU nothing runs beside the calling thread."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def free_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def _check_can_load_again(self, scratch: nn.Module) -> None:
        """
        Raises:
            CheckpointRefused: what SGLang made of a parameter after it had loaded it is of another
                form, or has lost its loader, and SGLang does not say how to take that back.
        """
        live = dict(self._model.named_parameters())
        modules = dict(self._model.named_modules(remove_duplicate=False))
        for name, built in scratch.named_parameters():
            found = live.get(name)
            if found is not None and _loads_alike(built, found):
                continue
            module = modules.get(module_of(name))
            if module is None or not can_restore(module):
                raise CheckpointRefused(
                    self.name,
                    f"this engine can load no checkpoint a second time: SGLang has repacked {name} "
                    f"for {type(getattr(module, 'quant_method', None)).__name__}, for good",
                )


def _loads_alike(built: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether a parameter can be loaded as the one that was built, as far as can be seen."""
    return (
        found.shape == built.shape
        and found.dtype == built.dtype
        and hasattr(found, "weight_loader") == hasattr(built, "weight_loader")
    )


def _noted(weights: Weights, reached: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        reached[:] = [f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype}"]
        yield name, tensor
    reached.clear()


@contextmanager
def _refusing(model: str, reached: list[str]) -> Iterator[None]:
    """
    Raises:
        CheckpointRefused: SGLang finds no place for a tensor, or one of another shape.
    """
    try:
        yield
    except (KeyError, ValueError, AssertionError, IndexError, AttributeError) as error:
        raise _refused(model, reached, error) from error
    except RuntimeError as error:
        if not any(said in str(error) for said in _DISAGREES):
            raise
        raise _refused(model, reached, error) from error


def _refused(model: str, reached: list[str], error: Exception) -> CheckpointRefused:
    where = f"at {reached[0]}" if reached else "at the end"
    return CheckpointRefused(model, f"{where}: {type(error).__name__}: {error}")

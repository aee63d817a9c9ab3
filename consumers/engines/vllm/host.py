"""What the reload machinery needs to know of one rank of vLLM. Does no I/O of its own.

Owns nothing of the engine: the models are the runner's, and are changed by `reload` only, in vLLM's
own lifecycle. Runs on the worker's main thread. Written for vLLM 0.26 and 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config

from weightbus.consumers.engines.vllm.lifecycle import processes_itself, reload_layerwise
from weightbus.consumers.engines.vllm.scratch import build_scratch
from weightbus.consumers.errors import CheckpointRefused
from weightbus.consumers.reload.host import ModelHost, Weights

__all__ = ("VllmHost",)

_NOT_OF_A_CHECKPOINT = (
    "_q_scale",
    "_k_scale",
    "_v_scale",
    "_prob_scale",
    "_expert_map",
    "expert_mask",
    "expert_global_to_physical",
    "expert_physical_to_global",
    "expert_local_to_global",
    "cos_sin_cache",
    "inv_freq",
    "normalizer",
)
"""Last names of persistent buffers that vLLM computes when it makes a model."""

_DISAGREES = (
    "exceeds dimension size",
    "must match",
    "is invalid for input of size",
    "out of range",
    "size mismatch",
    "split_with_sizes expects",
)
"""What torch says where shapes do not fit."""


class VllmHost(ModelHost):
    """One rank's model, and its drafter's if that is made of the same checkpoint."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        device: torch.device,
        draft: tuple[nn.Module, ModelConfig] | None = None,
    ) -> None:
        """
        Args:
            model: the target, as the runner holds it.
            draft: a drafter that is made of the same checkpoint, and its config.
        """
        self._config = vllm_config
        self._model = model
        self._device = torch.device(device)
        self._draft = draft
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
        return build_scratch(self._config, self._config.model_config)

    def load_weights(self, model: nn.Module, weights: Weights) -> None:
        reached: list[str] = []
        with set_current_vllm_config(self._config), _refusing(self.name, reached):
            _load(model, _noted(weights, reached))

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        named = dict(self._model.named_modules(remove_duplicate=False))
        if modules is None:
            layers = list(dict.fromkeys(named.values()))
        else:
            layers = _with_attention(named, modules)
        with set_current_vllm_config(self._config), torch.device(self._device):
            processed = reload_layerwise(self._model, self._config.model_config, layers, weights)
        if modules is None:
            names = {id(module): name for name, module in self._model.named_modules()}
            self._derived = {
                names[number]: attribute for number, (_, attribute) in processed.derived.items()
            }

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

    def takes_device_tensors(self) -> bool:
        """vLLM keeps the tensors until their layer is complete, and copies from wherever they
        are."""
        return self._device.type == "cuda"

    def may_stay_uncovered(self, buffer: str, *, persistent: bool) -> bool:
        return not persistent or buffer.rpartition(".")[2] in _NOT_OF_A_CHECKPOINT


def _load(model: Any, weights: Weights) -> None:
    model.load_weights(weights)


def _with_attention(named: Mapping[str, nn.Module], modules: frozenset[str]) -> list[nn.Module]:
    """The modules of these names, and those above them that process what lies below them."""
    chosen = {id(named[name]): named[name] for name in modules}
    for name, module in named.items():
        if processes_itself(module):
            below = f"{name}." if name else ""
            if any(inner.startswith(below) for inner in modules):
                chosen[id(module)] = module
    return list(chosen.values())


def _noted(weights: Weights, reached: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        reached[:] = [f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype}"]
        yield name, tensor
    reached.clear()


@contextmanager
def _refusing(model: str, reached: list[str]) -> Iterator[None]:
    """
    Raises:
        CheckpointRefused: vLLM finds no place for a tensor, or one of another shape.
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

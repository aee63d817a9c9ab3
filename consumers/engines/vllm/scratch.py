"""Builds a model of vLLM once more, on `meta`, beside the one that serves.

Does no I/O. What building a model writes down elsewhere (layers by name in the compilation config,
operations that were used, rotary embeddings) is written into copies, or taken back. Invariant: what
is built shares no module and no tensor with a model that serves.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from weightbus.consumers.errors import TraceRefused

__all__ = ("build_scratch",)


def build_scratch(
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    *,
    model_class: type[nn.Module] | None = None,
    prefix: str = "",
) -> nn.Module:
    """A model as vLLM makes it before it loads, on `meta`.

    Raises:
        TraceRefused: it cannot be made there.
    """
    config = _apart(vllm_config, model_config)
    try:
        with (
            torch.device("meta"),
            set_default_torch_dtype(model_config.dtype),
            set_current_vllm_config(config),
            _rotary_embeddings_apart(),
        ):
            scratch: nn.Module = initialize_model(
                config, prefix=prefix, model_class=model_class, model_config=model_config
            )
            return scratch
    except Exception as error:
        name = ", ".join(getattr(model_config.hf_config, "architectures", None) or ["?"])
        reason = f"it cannot be built on meta: {type(error).__name__}: {error}"
        raise TraceRefused(name, reason) from error


def _apart(vllm_config: VllmConfig, model_config: ModelConfig) -> VllmConfig:
    """A config that can be written to by modules which are being made.

    Nothing is compiled of a scratch model. `SupportsQuant` maps the names in a quant config when a
    model is made, so every model needs one of its own.
    """
    config = copy.copy(vllm_config)
    compilation = copy.copy(vllm_config.compilation_config)
    compilation.static_forward_context = {}
    compilation.static_all_moe_layers = []
    compilation.enabled_custom_ops = Counter()
    compilation.disabled_custom_ops = Counter()
    compilation.mode = CompilationMode.NONE
    config.compilation_config = compilation
    if vllm_config.quant_config is not None:
        config.quant_config = VllmConfig.get_quantization_config(
            model_config, vllm_config.load_config
        )
    return config


@contextmanager
def _rotary_embeddings_apart() -> Iterator[None]:
    """vLLM shares rotary embeddings between layers, and models: none on `meta` may stay, and none
    that serves may become a part of what is made, of which vLLM notes that it is loaded on `meta`.
    """
    shared = rotary_embedding._ROPE_DICT
    before = dict(shared)
    shared.update({key: _on_meta(module) for key, module in before.items()})
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)


def _on_meta(module: nn.Module) -> nn.Module:
    """A module like this one, whose tensors are on `meta`."""
    made = copy.copy(module)
    held = vars(made)
    held.update({name: _tensor_on_meta(value) for name, value in held.items()})
    for kind in ("_parameters", "_buffers"):
        held[kind] = {name: _tensor_on_meta(tensor) for name, tensor in held[kind].items()}
    held["_modules"] = {
        name: None if child is None else _on_meta(child) for name, child in held["_modules"].items()
    }
    held["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return made


def _tensor_on_meta(value: Any) -> Any:
    return to_meta_tensor(value) if isinstance(value, torch.Tensor) else value

"""Builds a model of SGLang once more, on `meta`, beside the one that serves.

Does no I/O of its own: SGLang reads the model's config file again. Quantisation configs are made
anew, too, since models write to them; rotary embeddings on `meta` are taken out of SGLang's cache.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from weightbus.consumers.engines.vllm.refusing import Origin
from weightbus.consumers.errors import TraceRefused

__all__ = ("build_scratch", "keeps_graphs", "started_from")

_ROTARY = (
    "sglang.srt.layers.rotary_embedding.factory",
    "sglang.srt.layers.rotary_embedding",
)
"""Where the cache of rotary embeddings is, the newer place first."""

_PHASES = ("decode", "prefill")
"""Of which graphs are captured."""


def build_scratch(name: str) -> nn.Module:
    """A model as SGLang makes it before it loads, on `meta`; of this rank.

    Args:
        name: of its architecture, for messages.

    Raises:
        TraceRefused: it cannot be made there.
    """
    try:
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_loader import loader
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        model_config = ModelConfig.from_server_args(_server_args())
        arguments: list[Any] = [model_config, LoadConfig()]
        if "quant_config" in inspect.signature(loader._initialize_model).parameters:
            arguments.append(loader._get_quantization_config(*arguments))
        with (
            torch.device("meta"),
            set_default_torch_dtype(model_config.dtype),
            _rotary_embeddings_kept(),
        ):
            model = loader._initialize_model(*arguments)
    except Exception as error:
        reason = f"it cannot be built on meta: {type(error).__name__}: {error}"
        raise TraceRefused(name, reason) from error
    if not isinstance(model, nn.Module):
        raise TraceRefused(name, f"SGLang made a {type(model).__name__} of it, not a module")
    return model


def started_from() -> Origin:
    """Where the checkpoint is that the server was started with."""
    args = _server_args()
    return Origin(
        str(args.model_path),
        revision=getattr(args, "revision", None),
        download_dir=getattr(args, "download_dir", None),
    )


def keeps_graphs() -> bool:
    """Whether something may have been compiled or captured of the model: unless it is known that
    SGLang was told to do neither (0.5.23 tells of graphs by phase)."""
    args = _server_args()
    if getattr(args, "enable_torch_compile", False):
        return True
    if getattr(args, "disable_cuda_graph", False):
        return False
    phases = getattr(args, "cuda_graph_config", None)
    backends = {getattr(getattr(phases, name, None), "backend", "") for name in _PHASES}
    return backends != {"disabled"}


def _server_args() -> Any:
    """What the server was started with, as SGLang publishes it in every process."""
    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:
        from sglang.srt.server_args import get_global_server_args as get_server_args
    return get_server_args()


@contextmanager
def _rotary_embeddings_kept() -> Iterator[None]:
    """SGLang shares rotary embeddings between layers, and models: none on `meta` may stay."""
    shared = next(
        (
            found
            for place in _ROTARY
            if isinstance(found := getattr(_module(place), "_ROPE_DICT", None), dict)
        ),
        {},
    )
    before = dict(shared)
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)


def _module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None

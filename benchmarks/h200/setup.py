"""What is measured with what: the model, the devices, the names. Does no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from msgspec import Struct

from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.shapes import DEEPSEEK_V3, QWEN3_30B_A3B, QWEN3_32B

__all__ = (
    "ARCHITECTURE",
    "MODELS",
    "TINY",
    "EngineSetup",
    "Setup",
    "Source",
    "need_bytes_of",
    "sources_of",
)

ARCHITECTURE: Final = "shapes"

MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen3-32b": QWEN3_32B,
    "deepseek-v3": DEEPSEEK_V3,
}

TINY: Final[Mapping[str, Any]] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}
"""For the flow alone, on CPUs."""


class Source(Struct, frozen=True):
    """One tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class EngineSetup(Struct, frozen=True, kw_only=True):
    """One engine."""

    name: str
    tp: int
    first_device: int
    """Its ranks are on this GPU and those that follow."""


class Setup(Struct, frozen=True, kw_only=True):
    """One run of the benchmark; every process is told it."""

    model: str
    """Under which its trainers publish; those of parts of it are made from this."""
    config: dict[str, Any]
    """Of the architecture."""
    devices: int
    """GPUs, and trainer ranks."""
    cpu: bool = False
    """Everything in host memory, as a test of the flow."""
    fsdp: bool = False
    """Trainers hold a slice of every tensor, as FSDP2 cuts it, instead of a quarter of the tensors:
    then most bytes that an engine's rank needs are on its own GPU already."""

    def device(self, number: int) -> torch.device:
        return torch.device("cpu") if self.cpu else torch.device("cuda", number)


def sources_of(config: Mapping[str, Any]) -> list[Source]:
    """The checkpoint of a model, in its order."""
    model = build_meta(config, 0, 1)
    return [
        Source(name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.checkpoint_tensors().items()
    ]


def need_bytes_of(config: Mapping[str, Any], tp: int) -> int:
    """The most that one rank of `tp` takes of a checkpoint."""
    return max(
        sum(
            part.parameter.checkpoint_view(part.shard).nbytes
            for part in build_meta(config, rank, tp).checkpoint_parts()
        )
        for rank in range(tp)
    )


def build_meta(config: Mapping[str, Any], rank: int, ranks: int) -> ServedModel:
    """One rank of the model, without memory."""
    with torch.device("meta"):
        return build_model(ARCHITECTURE, config, rank, ranks)

"""The model that the engines of these tests serve: small, and other weights for every version.

Does no I/O. What an engine must hold is computed here without any of the code under test but the
model's own loader, and compared by SHA-256 (`fingerprint`).
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import torch

from weightbus.consumers.engines.torch.fingerprint import fingerprint
from weightbus.consumers.engines.torch.models import build_model, initialise

__all__ = ("ARCHITECTURE", "CONFIG", "fingerprints_of", "weights_of")

ARCHITECTURE = "decoder"
CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def weights_of(model: str, version: int) -> dict[str, torch.Tensor]:
    """The checkpoint that a trainer of `model` publishes as `version`."""
    whole = build_model(ARCHITECTURE, CONFIG)
    initialise(whole, zlib.crc32(f"{model}/{version}".encode()))
    return {name: tensor.detach() for name, tensor in whole.checkpoint_tensors().items()}


@cache
def fingerprints_of(model: str, version: int, ranks: int) -> tuple[str, ...]:
    """What the ranks of an engine hold if they hold `version` of `model`, and nothing else."""
    return tuple(_fingerprint(model, version, rank, ranks) for rank in range(ranks))


def _fingerprint(model: str, version: int, rank: int, ranks: int) -> str:
    part = build_model(ARCHITECTURE, CONFIG, rank, ranks)
    part.load_weights(weights_of(model, version).items())
    return fingerprint(part)

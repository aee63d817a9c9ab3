"""What the demo and its trainer say to each other, as JSON lines. Does no I/O, needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

__all__ = ("DECODER_CONFIG", "Expected", "Publish")

DECODER_CONFIG: Mapping[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
}
"""A mixture of experts: its engine stacks the expert matrices and cuts them over its ranks."""


class Publish(Struct, frozen=True, tag_field="do", tag="publish"):
    """Train on, then publish the weights as this version."""

    model: str
    version: int


class Expected(Struct, frozen=True):
    """What was published, and what an engine that holds it must answer."""

    model: str
    version: int
    loss: float
    bytes: int
    weights_digest: str
    fingerprints: tuple[str, ...]
    """SHA-256 over what each rank of an engine holds, in rank order."""
    embedding: tuple[float, ...] = ()
    """Of `PROBE`."""

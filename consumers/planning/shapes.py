"""Models as families of equal tensors, and how many bytes of them one rank holds. Pure.

What a rank holds follows from a tensor's name, by the rule of large engines (vLLM's and SGLang's
tensor parallelism with fused parameters):

- experts (`.experts.`): cut like any projection, or, with expert parallelism, shared out whole;
- projections that widen (`q`, `k`, `v`, `q_b`, `kv_b`, `gate`, `up`), the embedding and the head:
  cut along their first dimension, and those that narrow (`o`, `down`) along their last;
- everything else, such as norms, routers and the low-rank `q_a` and `kv_a` of MLA: on every rank.

Block scales (`*_scale_inv`) are cut like their weights. Of a dimension that does not divide, the
largest part counts: it is what the largest rank holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Final

from msgspec import Meta, Struct

from weightbus.schemas.base import DtypeName, Name
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, Shape
from weightbus.schemas.limits import MAX_TENSORS

__all__ = (
    "MODELS",
    "Families",
    "Family",
    "families_of",
    "kimi_k2_fp8",
    "qwen3_30b_a3b",
    "rank_bytes",
    "whole_bytes",
)


class Family(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tensors of one dtype and shape, and of names that are alike."""

    name: Name
    """Of one of them."""
    dtype: DtypeName
    """A key of `DTYPE_BYTES`."""
    shape: Shape
    count: Annotated[int, Meta(ge=1, le=MAX_TENSORS)] = 1

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: there is no such dtype.
        """
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise ValueError(f"dtype of {self.name} is {self.dtype}: must be one of {known}")

    @property
    def bytes(self) -> int:
        return self.count * math.prod(self.shape) * DTYPE_BYTES[self.dtype]


Families = Annotated[tuple[Family, ...], Meta(min_length=1, max_length=MAX_TENSORS)]
"""Of one model."""

_FIRST = re.compile(
    r"(?:^|\.)(?:[qkv]_proj|q_b_proj|kv_b_proj|gate_proj|up_proj|embed_tokens|lm_head)\.[^.]+\Z"
)
_LAST = re.compile(r"(?:^|\.)(?:o_proj|down_proj)\.weight(?:_scale_inv)?\Z")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def whole_bytes(families: Iterable[Family]) -> int:
    return sum(family.bytes for family in families)


def rank_bytes(families: Iterable[Family], tp: int, *, expert_parallel: bool = False) -> int:
    """Bytes that the largest of `tp` ranks holds."""
    total = 0
    for family in families:
        count, shape = family.count, list(family.shape)
        if expert_parallel and _EXPERT.search(family.name):
            count = -(-count // tp)
        elif shape and _FIRST.search(family.name):
            shape[0] = -(-shape[0] // tp)
        elif shape and _LAST.search(family.name):
            shape[-1] = -(-shape[-1] // tp)
        total += count * math.prod(shape) * DTYPE_BYTES[family.dtype]
    return total


def families_of(layout: Layout) -> tuple[Family, ...]:
    """A layout's tensors: of names that differ in numbers only, those of one dtype and shape."""
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for tensor in layout.tensors:
        key = (_NUMBER.sub("0", tensor.name), tensor.dtype, tensor.shape)
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        Family(name=name, dtype=dtype, shape=shape, count=count)
        for (name, dtype, shape), count in counts.items()
    )


def kimi_k2_fp8() -> tuple[Family, ...]:
    """Kimi-K2 in FP8 with scales of blocks of 128 x 128, by its published configuration."""
    layers, dense, experts, hidden = 61, 1, 384, 7168
    width, dense_width, heads, vocabulary = 2048, 18_432, 64, 163_840
    q_rank, kv_rank, nope, rope, value = 1536, 512, 128, 64, 128
    sparse = layers - dense
    families: list[Family] = []

    def add(name: str, dtype: str, *shape: int, count: int = 1) -> None:
        families.append(Family(name=name, dtype=dtype, shape=shape, count=count))

    def project(name: str, rows: int, columns: int, count: int) -> None:
        add(f"{name}.weight", "F8_E4M3", rows, columns, count=count)
        scale = (-(-rows // 128), -(-columns // 128))
        add(f"{name}.weight_scale_inv", "F32", *scale, count=count)

    def mlp(name: str, inner: int, count: int) -> None:
        project(f"{name}.gate_proj", inner, hidden, count)
        project(f"{name}.up_proj", inner, hidden, count)
        project(f"{name}.down_proj", hidden, inner, count)

    add("model.embed_tokens.weight", "BF16", vocabulary, hidden)
    attention = "model.layers.0.self_attn"
    project(f"{attention}.q_a_proj", q_rank, hidden, layers)
    project(f"{attention}.q_b_proj", heads * (nope + rope), q_rank, layers)
    project(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden, layers)
    project(f"{attention}.kv_b_proj", heads * (nope + value), kv_rank, layers)
    project(f"{attention}.o_proj", hidden, heads * value, layers)
    add(f"{attention}.q_a_layernorm.weight", "BF16", q_rank, count=layers)
    add(f"{attention}.kv_a_layernorm.weight", "BF16", kv_rank, count=layers)
    add("model.layers.0.input_layernorm.weight", "BF16", hidden, count=layers)
    add("model.layers.0.post_attention_layernorm.weight", "BF16", hidden, count=layers)
    mlp("model.layers.0.mlp", dense_width, dense)
    mlp("model.layers.1.mlp.experts.0", width, sparse * experts)
    mlp("model.layers.1.mlp.shared_experts", width, sparse)
    add("model.layers.1.mlp.gate.weight", "BF16", experts, hidden, count=sparse)
    add("model.layers.1.mlp.gate.e_score_correction_bias", "F32", experts, count=sparse)
    add("model.norm.weight", "BF16", hidden)
    add("lm_head.weight", "BF16", vocabulary, hidden)
    return tuple(families)


def qwen3_30b_a3b() -> tuple[Family, ...]:
    """Qwen3-30B-A3B in BF16, by its published configuration."""
    layers, experts, hidden, width, vocabulary = 48, 128, 2048, 768, 151_936
    heads, kv_heads, head = 32, 4, 128
    families: list[Family] = []

    def add(name: str, *shape: int, count: int = layers) -> None:
        families.append(Family(name=name, dtype="BF16", shape=shape, count=count))

    add("model.embed_tokens.weight", vocabulary, hidden, count=1)
    attention = "model.layers.0.self_attn"
    add(f"{attention}.q_proj.weight", heads * head, hidden)
    add(f"{attention}.k_proj.weight", kv_heads * head, hidden)
    add(f"{attention}.v_proj.weight", kv_heads * head, hidden)
    add(f"{attention}.o_proj.weight", hidden, heads * head)
    add(f"{attention}.q_norm.weight", head)
    add(f"{attention}.k_norm.weight", head)
    add("model.layers.0.input_layernorm.weight", hidden)
    add("model.layers.0.post_attention_layernorm.weight", hidden)
    add("model.layers.0.mlp.gate.weight", experts, hidden)
    expert = "model.layers.0.mlp.experts.0"
    add(f"{expert}.gate_proj.weight", width, hidden, count=layers * experts)
    add(f"{expert}.up_proj.weight", width, hidden, count=layers * experts)
    add(f"{expert}.down_proj.weight", hidden, width, count=layers * experts)
    add("model.norm.weight", hidden, count=1)
    add("lm_head.weight", vocabulary, hidden, count=1)
    return tuple(families)


MODELS: Final = {"kimi-k2-fp8": kimi_k2_fp8, "qwen3-30b-a3b": qwen3_30b_a3b}
"""Models that are described here, by name."""

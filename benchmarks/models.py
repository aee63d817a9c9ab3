"""Shapes of real public models, for layouts and needs of their true size. Does no I/O.

Needs are those of a tensor-parallel engine with the parameters that large engines fuse: qkv,
gate_up, and stacks of experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Needs, ParameterSpec

__all__ = ("kimi_k2_experts", "layout_of", "needs_of_qwen3_moe", "qwen3_moe")

ALIGNMENT_BYTES = 256

QWEN3_LAYERS = 48
QWEN3_EXPERTS = 128
QWEN3_HIDDEN = 2048
QWEN3_EXPERT_WIDTH = 768
QWEN3_HEADS = 32
QWEN3_KV_HEADS = 4
QWEN3_HEAD_DIM = 128
QWEN3_VOCABULARY = 151_936

Tensor = tuple[str, str, tuple[int, ...]]
"""(name, dtype, shape)"""


def qwen3_moe(layers: int = QWEN3_LAYERS) -> Iterator[Tensor]:
    """Qwen3-30B-A3B in BF16: 18,867 tensors, 61.06 GB."""
    hidden, width = QWEN3_HIDDEN, QWEN3_EXPERT_WIDTH
    query, key = QWEN3_HEADS * QWEN3_HEAD_DIM, QWEN3_KV_HEADS * QWEN3_HEAD_DIM
    yield "model.embed_tokens.weight", "BF16", (QWEN3_VOCABULARY, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", "BF16", (hidden,)
        yield prefix + "post_attention_layernorm.weight", "BF16", (hidden,)
        yield prefix + "self_attn.q_proj.weight", "BF16", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", "BF16", (key, hidden)
        yield prefix + "self_attn.v_proj.weight", "BF16", (key, hidden)
        yield prefix + "self_attn.o_proj.weight", "BF16", (hidden, query)
        yield prefix + "self_attn.q_norm.weight", "BF16", (QWEN3_HEAD_DIM,)
        yield prefix + "self_attn.k_norm.weight", "BF16", (QWEN3_HEAD_DIM,)
        yield prefix + "mlp.gate.weight", "BF16", (QWEN3_EXPERTS, hidden)
        for expert in range(QWEN3_EXPERTS):
            of_expert = prefix + f"mlp.experts.{expert}."
            yield of_expert + "gate_proj.weight", "BF16", (width, hidden)
            yield of_expert + "up_proj.weight", "BF16", (width, hidden)
            yield of_expert + "down_proj.weight", "BF16", (hidden, width)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (QWEN3_VOCABULARY, hidden)


def kimi_k2_experts(layers: int = 61, experts: int = 384) -> Iterator[Tensor]:
    """The experts of a model like Kimi-K2 in FP8 with block scales: 140,544 tensors."""
    hidden, width, block = 7168, 2048, 128
    for layer in range(layers):
        for expert in range(experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            for name, shape in (
                ("gate_proj", (width, hidden)),
                ("up_proj", (width, hidden)),
                ("down_proj", (hidden, width)),
            ):
                yield f"{prefix}{name}.weight", "F8_E4M3", shape
                scale = tuple(extent // block for extent in shape)
                yield f"{prefix}{name}.weight_scale_inv", "F32", scale


def layout_of(tensors: Iterator[Tensor], segments: int) -> Layout:
    """A layout of whole tensors, in order, spread evenly over `segments` as a publisher does."""
    specs = [TensorSpec(name, dtype, shape) for name, dtype, shape in tensors]
    sizes = [math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in specs]
    total, placed = sum(sizes), 0
    ends = [0] * segments
    shards = []
    for number, (spec, size) in enumerate(zip(specs, sizes, strict=True)):
        segment = min(segments - 1, placed * segments // total)
        starts = (0,) * len(spec.shape)
        shards.append(ShardSpec(number, starts, spec.shape, segment, ends[segment]))
        ends[segment] += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        placed += size
    return Layout(tuple(specs), tuple(shards), tuple(SegmentSpec(end) for end in ends))


class _NeedsBuilder:
    """Parameters and copies of one rank of `ranks`."""

    def __init__(self, layout: Layout, rank: int, ranks: int) -> None:
        self._numbers = {tensor.name: number for number, tensor in enumerate(layout.tensors)}
        self._shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        self._rank, self._ranks = rank, ranks
        self._parameters: list[ParameterSpec] = []
        self._copies: list[Copy] = []

    def needs(self) -> Needs:
        return Needs(tuple(self._parameters), tuple(self._copies))

    def add_stack(self, name: str, stacks: list[list[str]], cut_dim: int | None) -> None:
        """A parameter of one matrix (or vector) per stack, each its tensors one below the other.

        Of every tensor the rank takes its share of `cut_dim`, or all of it.
        """
        parameter, offset = len(self._parameters), 0
        shape: tuple[int, ...] = ()
        for tensors in stacks:
            rows = 0
            for tensor in tensors:
                whole = self._shapes[tensor]
                starts, sizes = [0] * len(whole), list(whole)
                if cut_dim is not None:
                    sizes[cut_dim] //= self._ranks
                    starts[cut_dim] = self._rank * sizes[cut_dim]
                strides = tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
                number = self._numbers[tensor]
                self._copies.append(
                    Copy(number, tuple(starts), tuple(sizes), parameter, offset, strides)
                )
                offset += math.prod(sizes)
                rows += sizes[0]
            shape = (rows, *sizes[1:])
        if len(stacks) > 1:
            shape = (len(stacks), *shape)
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        self._parameters.append(ParameterSpec(name, "BF16", shape, strides))


def needs_of_qwen3_moe(layout: Layout, rank: int, ranks: int, layers: int = QWEN3_LAYERS) -> Needs:
    """What one rank of a tensor-parallel engine needs of `layout_of(qwen3_moe(layers))`."""
    builder = _NeedsBuilder(layout, rank, ranks)
    builder.add_stack("embed_tokens", [["model.embed_tokens.weight"]], 0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            builder.add_stack(prefix + name, [[f"{prefix}{name}.weight"]], None)
        heads = [f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"]
        builder.add_stack(prefix + "qkv_proj", [heads], 0)
        builder.add_stack(prefix + "o_proj", [[f"{prefix}self_attn.o_proj.weight"]], 1)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "mlp.gate"):
            builder.add_stack(prefix + name, [[f"{prefix}{name}.weight"]], None)
        experts = [f"{prefix}mlp.experts.{expert}." for expert in range(QWEN3_EXPERTS)]
        gates = [[e + "gate_proj.weight", e + "up_proj.weight"] for e in experts]
        builder.add_stack(prefix + "w13", gates, 0)
        builder.add_stack(prefix + "w2", [[e + "down_proj.weight"] for e in experts], 1)
    builder.add_stack("norm", [["model.norm.weight"]], None)
    builder.add_stack("lm_head", [["lm_head.weight"]], 0)
    return builder.needs()

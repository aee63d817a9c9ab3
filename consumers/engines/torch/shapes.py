"""Large public models as an engine holds them, of parameters only: nothing here computes.

Does no I/O. Names, shapes, dtypes and cuts are those of vLLM's tensor parallelism: fused
projections, stacked experts, a padded vocabulary; with `kv_lora_rank` the low-rank attention of
DeepSeek-V3 (MLA), and with `quantized` its FP8 weights with scales of 128 x 128 blocks. It exists
to be updated at full size; it answers no request.

Sources: Qwen3 Technical Report (2025); DeepSeek-V3 Technical Report (2024); their checkpoints on
Hugging Face.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import torch
from msgspec import Meta, Struct
from torch import nn

from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.engines.torch.layers import (
    ColumnParallelLinear,
    FusedExperts,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from weightbus.consumers.engines.torch.messages import Inputs, Outputs
from weightbus.consumers.engines.torch.model import CheckpointPart, ServedModel
from weightbus.consumers.engines.torch.parallel import TensorParallel
from weightbus.consumers.engines.torch.parameter import Shard, ShardedParameter, Window
from weightbus.consumers.errors import PlanError
from weightbus.consumers.reload.dtypes import TORCH_DTYPES

__all__ = ("DEEPSEEK_V3", "QWEN3_30B_A3B", "QWEN3_32B", "Shapes", "ShapesConfig")

BLOCK: Final = 128
"""Rows and columns of a quantised weight that share a scale: `weight_block_size` of DeepSeek-V3."""

Size = Annotated[int, Meta(ge=1, le=2**20)]
Count = Annotated[int, Meta(ge=0, le=2**20)]


class ShapesConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes, by the names of Hugging Face's `config.json`; the defaults are Qwen3-32B's."""

    vocab_size: Size = 151_936
    hidden_size: Size = 5_120
    intermediate_size: Size = 25_600
    num_hidden_layers: Size = 64
    num_attention_heads: Size = 64
    num_key_value_heads: Size = 8
    head_dim: Size = 128
    qk_norm: bool = True
    """A norm for the heads of queries, and one for those of keys; not with MLA."""
    num_experts: Count = 0
    """0: a dense model. `n_routed_experts` of DeepSeek."""
    moe_intermediate_size: Count = 0
    n_shared_experts: Count = 0
    first_k_dense_replace: Count = 0
    """So many layers are dense, whatever the others are."""
    expert_bias: bool = False
    """The router corrects its scores: `e_score_correction_bias`."""
    expert_parallel: bool = False
    """Every rank holds some experts whole, instead of a slice of each."""
    q_lora_rank: Count = 0
    kv_lora_rank: Count = 0
    """Above 0: MLA, which the sizes around this one are for."""
    qk_nope_head_dim: Count = 0
    qk_rope_head_dim: Count = 0
    v_head_dim: Count = 0
    tie_word_embeddings: bool = False
    quantized: bool = False
    """Linear layers but the router and the head are FP8, with scales of blocks in F32."""
    dtype: Literal["F32", "BF16"] = "BF16"


QWEN3_32B: Final[Mapping[str, Any]] = {"num_hidden_layers": 64}
"""707 tensors, 65.5 GB."""

QWEN3_30B_A3B: Final[Mapping[str, Any]] = {
    "hidden_size": 2_048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 768,
}
"""18,867 tensors, 61.1 GB."""

DEEPSEEK_V3: Final[Mapping[str, Any]] = {
    "vocab_size": 129_280,
    "hidden_size": 7_168,
    "intermediate_size": 18_432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_experts": 256,
    "moe_intermediate_size": 2_048,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "expert_bias": True,
    "q_lora_rank": 1_536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "quantized": True,
}
"""Without the module that predicts several tokens. Fewer layers make a model that fits anywhere."""


class _Builder:
    """What all layers of one model are built with."""

    def __init__(self, config: ShapesConfig, parallel: TensorParallel) -> None:
        self.config, self.parallel = config, parallel
        self.dtype = TORCH_DTYPES[config.dtype]
        """Of what is not quantised."""
        self.linear_dtype = TORCH_DTYPES["F8_E4M3"] if config.quantized else self.dtype

    def norm(self, size: int) -> RMSNorm:
        return RMSNorm(size, 1e-6, dtype=self.dtype)

    def column(self, input_size: int, output_size: int) -> nn.Module:
        return self.scaled(
            ColumnParallelLinear(
                input_size, output_size, bias=False, dtype=self.linear_dtype, parallel=self.parallel
            )
        )

    def merged(
        self, input_size: int, *output_sizes: int, parallel: TensorParallel | None = None
    ) -> nn.Module:
        return self.scaled(
            MergedColumnParallelLinear(
                input_size,
                output_sizes,
                bias=False,
                dtype=self.linear_dtype,
                parallel=parallel or self.parallel,
            )
        )

    def row(self, input_size: int, output_size: int) -> nn.Module:
        return self.scaled(
            RowParallelLinear(
                input_size, output_size, bias=False, dtype=self.linear_dtype, parallel=self.parallel
            )
        )

    def scaled(self, layer: nn.Module, *names: str) -> nn.Module:
        """A layer with the scales of its quantised parameters, by default of its weight."""
        for name in (names or ("weight",)) if self.config.quantized else ():
            weight = layer.get_parameter(name)
            assert isinstance(weight, ShardedParameter), "as every layer here makes it"
            windows = {shard: _in_blocks(window) for shard, window in weight.windows.items()}
            shape = (*weight.shape[:-2], *map(_blocks, weight.shape[-2:]))
            scales = ShardedParameter.of(shape, torch.float32, windows)
            layer.register_parameter(f"{name}_scale_inv", scales)
        return layer


def _blocks(extent: int) -> int:
    return -(-extent // BLOCK)


def _in_blocks(window: Window) -> Window:
    """The window of the scales of a weight's window.

    Raises:
        PlanError: it is cut inside a block.
    """
    for start in (window.source, window.start):
        if start % BLOCK:
            raise PlanError("cut of a quantised weight", start, f"must be a multiple of {BLOCK}")
    ends_inside = window.source + window.size < window.total and window.size % BLOCK
    if ends_inside:
        raise PlanError("part of a quantised weight", window.size, f"a multiple of {BLOCK}")
    return window._replace(
        total=_blocks(window.total),
        source=window.source // BLOCK,
        start=window.start // BLOCK,
        size=_blocks(window.size),
    )


def _parts(
    prefix: str, layer: nn.Module, shards: Mapping[str, Shard], parameter: str = "weight"
) -> Iterator[CheckpointPart]:
    """The checkpoint tensors that make one parameter of a layer, each with its scales if any."""
    for name in (parameter, f"{parameter}_scale_inv"):
        held = layer._parameters.get(name)
        if isinstance(held, ShardedParameter):
            suffix = "weight" + name.removeprefix(parameter)
            for tensor, shard in shards.items():
                yield CheckpointPart(f"{prefix}{tensor}.{suffix}", held, shard)


class GroupedAttention(nn.Module):
    """Grouped-query attention, as in Qwen3."""

    def __init__(self, build: _Builder) -> None:
        super().__init__()
        config = build.config
        self.qkv_proj = build.scaled(
            QKVParallelLinear(
                config.hidden_size,
                config.head_dim,
                config.num_attention_heads,
                config.num_key_value_heads,
                bias=False,
                dtype=build.linear_dtype,
                parallel=build.parallel,
            )
        )
        self.o_proj = build.row(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.norms = ("q_norm", "k_norm") if config.qk_norm else ()
        for name in self.norms:
            self.add_module(name, build.norm(config.head_dim))

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        yield from _parts(prefix, self.qkv_proj, {f"{shard}_proj": shard for shard in "qkv"})
        for name in ("o_proj", *self.norms):
            yield from _parts(prefix, self.get_submodule(name), {name: None})


class LatentAttention(nn.Module):
    """Multi-head latent attention, as in DeepSeek-V3: the narrow projections are on every rank."""

    def __init__(self, build: _Builder) -> None:
        super().__init__()
        config, heads = build.config, build.config.num_attention_heads
        if not config.q_lora_rank:
            raise PlanError("q_lora_rank", 0, "must be above 0 if kv_lora_rank is")
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.fused_qkv_a_proj = build.merged(
            config.hidden_size,
            config.q_lora_rank,
            config.kv_lora_rank + config.qk_rope_head_dim,
            parallel=TensorParallel(),
        )
        self.q_a_layernorm = build.norm(config.q_lora_rank)
        self.q_b_proj = build.column(config.q_lora_rank, heads * head)
        self.kv_a_layernorm = build.norm(config.kv_lora_rank)
        self.kv_b_proj = build.column(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.o_proj = build.row(heads * config.v_head_dim, config.hidden_size)

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        fused: dict[str, Shard] = {"q_a_proj": 0, "kv_a_proj_with_mqa": 1}
        yield from _parts(prefix, self.fused_qkv_a_proj, fused)
        for name in ("q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj", "o_proj"):
            yield from _parts(prefix, self.get_submodule(name), {name: None})


class Dense(nn.Module):
    """A SwiGLU layer."""

    def __init__(self, build: _Builder, intermediate_size: int) -> None:
        super().__init__()
        hidden = build.config.hidden_size
        self.gate_up_proj = build.merged(hidden, intermediate_size, intermediate_size)
        self.down_proj = build.row(intermediate_size, hidden)

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        yield from _parts(prefix, self.gate_up_proj, {"gate_proj": 0, "up_proj": 1})
        yield from _parts(prefix, self.down_proj, {"down_proj": None})


class Mixture(nn.Module):
    """Experts behind a router, and those that every token meets."""

    def __init__(self, build: _Builder) -> None:
        super().__init__()
        config = build.config
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_experts, bias=False, dtype=build.dtype
        )
        if config.expert_bias:
            bias = ShardedParameter.of((config.num_experts,), torch.float32)
            self.gate.register_parameter("e_score_correction_bias", bias)
        self.experts = FusedExperts(
            config.num_experts,
            1,
            config.hidden_size,
            config.moe_intermediate_size,
            dtype=build.linear_dtype,
            parallel=build.parallel,
            expert_parallel=config.expert_parallel,
        )
        build.scaled(self.experts, "w13_weight", "w2_weight")
        self.shared_experts: Dense | None = None
        if config.n_shared_experts:
            size = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = Dense(build, size)

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        yield from _parts(prefix, self.gate, {"gate": None})
        bias = self.gate._parameters.get("e_score_correction_bias")
        if isinstance(bias, ShardedParameter):
            yield CheckpointPart(f"{prefix}gate.e_score_correction_bias", bias)
        for expert in self.experts.held:
            names: dict[str, Shard] = {"gate_proj": ("w1", expert), "up_proj": ("w3", expert)}
            at = f"{prefix}experts.{expert}."
            yield from _parts(at, self.experts, names, "w13_weight")
            yield from _parts(at, self.experts, {"down_proj": ("w2", expert)}, "w2_weight")
        if self.shared_experts is not None:
            yield from self.shared_experts.checkpoint_parts(f"{prefix}shared_experts.")


class Layer(nn.Module):
    def __init__(self, build: _Builder, number: int) -> None:
        super().__init__()
        config = build.config
        self.input_layernorm = build.norm(config.hidden_size)
        self.self_attn = LatentAttention(build) if config.kv_lora_rank else GroupedAttention(build)
        self.post_attention_layernorm = build.norm(config.hidden_size)
        is_dense = not config.num_experts or number < config.first_k_dense_replace
        self.mlp = Dense(build, config.intermediate_size) if is_dense else Mixture(build)

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _parts(prefix, self.get_submodule(name), {name: None})
        yield from self.self_attn.checkpoint_parts(f"{prefix}self_attn.")
        yield from self.mlp.checkpoint_parts(f"{prefix}mlp.")


class Shapes(ServedModel):
    """One rank's parameters of a large model."""

    def __init__(self, config: ShapesConfig, parallel: TensorParallel) -> None:
        super().__init__(parallel)
        build = _Builder(config, parallel)
        vocab, hidden, dtype = config.vocab_size, config.hidden_size, build.dtype
        if config.num_experts and not config.moe_intermediate_size:
            raise PlanError("moe_intermediate_size", 0, "must be above 0 if num_experts is")
        self.embed_tokens = VocabParallelEmbedding(vocab, hidden, dtype=dtype, parallel=parallel)
        self.layers = nn.ModuleList(
            Layer(build, number) for number in range(config.num_hidden_layers)
        )
        self.norm = build.norm(hidden)
        self.lm_head = ParallelLMHead(vocab, hidden, dtype=dtype, parallel=parallel)
        self._tied = config.tie_word_embeddings
        if self._tied:
            self.lm_head.weight = self.embed_tokens.weight

    def infer(self, inputs: Inputs) -> Outputs:
        del inputs
        raise RequestRefused("model", "one of shapes", "it holds parameters and computes nothing")

    def checkpoint_parts(self) -> Iterator[CheckpointPart]:
        yield from _parts("model.", self.embed_tokens, {"embed_tokens": None})
        for number, layer in enumerate(self._layers()):
            yield from layer.checkpoint_parts(f"model.layers.{number}.")
        yield from _parts("model.", self.norm, {"norm": None})
        if not self._tied:
            yield from _parts("", self.lm_head, {"lm_head": None})

    def _layers(self) -> Iterable[Layer]:
        return (layer for layer in self.layers if isinstance(layer, Layer))

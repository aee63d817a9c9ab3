"""A small decoder of the Qwen and Llama kind, with SwiGLU layers or a mixture of experts.

Does no I/O. It exists to be updated: its parameters are fused, sliced, padded and tied as in the
large engines, and its greedy answers depend on every one of them. There is no key-value cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from msgspec import Meta, Struct
from torch import nn

from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.engines.torch.layers import (
    FusedExperts,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RepackedRowParallelLinear,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from weightbus.consumers.engines.torch.messages import Inputs, Outputs
from weightbus.consumers.engines.torch.model import CheckpointPart, ServedModel
from weightbus.consumers.engines.torch.parallel import TensorParallel
from weightbus.consumers.reload.dtypes import TORCH_DTYPES

__all__ = ("Decoder", "DecoderConfig")

Size = Annotated[int, Meta(ge=1, le=2**20)]


class DecoderConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes, by the names of Hugging Face's `config.json`."""

    vocab_size: Size = 500
    hidden_size: Annotated[int, Meta(ge=2, le=2**20, multiple_of=2)] = 64
    intermediate_size: Size = 128
    num_hidden_layers: Size = 2
    num_attention_heads: Size = 4
    num_key_value_heads: Size = 2
    head_dim: Annotated[int, Meta(ge=2, multiple_of=2)] = 16
    max_position_embeddings: Size = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: Annotated[int, Meta(ge=0)] = 0
    """0: one SwiGLU MLP per layer; else a mixture of experts."""
    num_experts_per_tok: Size = 2
    expert_parallel: bool = False
    """Every rank holds some experts whole, instead of a slice of each."""
    dtype: Literal["F32", "BF16"] = "F32"
    repacked_down_proj: bool = False
    """Keep `down_proj` repacked after loading, as some kernels do."""


class Rotary(nn.Module):
    """Rotary position embedding; its tables are computed, not loaded."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, head_dim: int, positions: int, theta: float) -> None:
        super().__init__()
        # Computed on a CPU and then moved: the tables have the same bits on every device.
        step = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        position = torch.arange(positions, dtype=torch.float32, device="cpu")
        angle = torch.outer(position, theta ** (-step / head_dim))
        device = torch.get_default_device()
        self.register_buffer("cos", angle.cos().to(device), persistent=False)
        self.register_buffer("sin", angle.sin().to(device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, head], at positions 0, 1, ..."""
        cos = self.cos[: x.shape[0], None, :].to(x.dtype)
        sin = self.sin[: x.shape[0], None, :].to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: torch.dtype, parallel: TensorParallel) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            dtype=dtype,
            parallel=parallel,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            dtype=dtype,
            parallel=parallel,
        )
        self.rotary = Rotary(config.head_dim, config.max_position_embeddings, config.rope_theta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_proj.attention_inputs(x)
        query, key = self.rotary(query), self.rotary(key)
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            is_causal=True,
            enable_gqa=True,
        )
        output: torch.Tensor = self.o_proj(mixed.transpose(0, 1).flatten(1))
        return output

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        for shard in ("q", "k", "v"):
            yield CheckpointPart(f"{prefix}.{shard}_proj.weight", self.qkv_proj.weight, shard)
            if self.qkv_proj.bias is not None:
                yield CheckpointPart(f"{prefix}.{shard}_proj.bias", self.qkv_proj.bias, shard)
        yield CheckpointPart(f"{prefix}.o_proj.weight", self.o_proj.weight)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: torch.dtype, parallel: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            (config.intermediate_size, config.intermediate_size),
            bias=False,
            dtype=dtype,
            parallel=parallel,
        )
        down = RepackedRowParallelLinear if config.repacked_down_proj else RowParallelLinear
        self.down_proj = down(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            dtype=dtype,
            parallel=parallel,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        output: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return output

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        yield CheckpointPart(f"{prefix}.gate_proj.weight", self.gate_up_proj.weight, 0)
        yield CheckpointPart(f"{prefix}.up_proj.weight", self.gate_up_proj.weight, 1)
        yield CheckpointPart(f"{prefix}.down_proj.weight", self.down_proj.weight)


class SparseMLP(nn.Module):
    """A mixture of SwiGLU experts behind a router."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, parallel: TensorParallel) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_experts, bias=False, dtype=dtype
        )
        self.experts = FusedExperts(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            dtype=dtype,
            parallel=parallel,
            expert_parallel=config.expert_parallel,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.experts(x, self.gate(x))
        return output

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        yield CheckpointPart(f"{prefix}.gate.weight", self.gate.weight)
        experts = self.experts
        for n in experts.held:
            expert = f"{prefix}.experts.{n}"
            yield CheckpointPart(f"{expert}.gate_proj.weight", experts.w13_weight, ("w1", n))
            yield CheckpointPart(f"{expert}.up_proj.weight", experts.w13_weight, ("w3", n))
            yield CheckpointPart(f"{expert}.down_proj.weight", experts.w2_weight, ("w2", n))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: torch.dtype, parallel: TensorParallel) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps, dtype=dtype)
        self.self_attn = Attention(config, dtype, parallel)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps, dtype=dtype)
        mlp = SparseMLP if config.num_experts else MLP
        self.mlp: SparseMLP | MLP = mlp(config, dtype, parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        output: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        yield CheckpointPart(f"{prefix}.input_layernorm.weight", self.input_layernorm.weight)
        yield from self.self_attn.checkpoint_parts(f"{prefix}.self_attn")
        yield CheckpointPart(
            f"{prefix}.post_attention_layernorm.weight", self.post_attention_layernorm.weight
        )
        yield from self.mlp.checkpoint_parts(f"{prefix}.mlp")


class Decoder(ServedModel):
    """Token ids in, greedy token ids out."""

    def __init__(self, config: DecoderConfig, parallel: TensorParallel) -> None:
        super().__init__(parallel)
        dtype = TORCH_DTYPES[config.dtype]
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, dtype=dtype, parallel=parallel
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, dtype, parallel) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, dtype=dtype, parallel=parallel
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens] ids -> [tokens, vocabulary] scores of the token that follows each."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        scores: torch.Tensor = self.lm_head(self.norm(x))
        return scores

    def generate(self, prompt: tuple[int, ...], new_tokens: int) -> tuple[int, ...]:
        """The `new_tokens` tokens that greedily follow a prompt.

        Raises:
            RequestRefused: the prompt is empty, too long, or has a token outside the vocabulary.
        """
        limit = self.config.max_position_embeddings
        if not 1 <= len(prompt) <= limit - new_tokens:
            raise RequestRefused(
                "tokens of a prompt", len(prompt), f"1 to {limit} with {new_tokens} new ones"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
            raise RequestRefused("token", prompt, f"must be below {self.config.vocab_size}")
        tokens = torch.tensor(prompt, dtype=torch.int64)
        for _ in range(new_tokens):
            following = self(tokens)[-1].argmax().reshape(1)
            tokens = torch.cat((tokens, following))
        return tuple(tokens[len(prompt) :].tolist())

    def infer(self, inputs: Inputs) -> Outputs:
        if inputs.sentences:
            raise RequestRefused("sentences", len(inputs.sentences), "a decoder takes token ids")
        return Outputs(
            tokens=tuple(self.generate(prompt, inputs.new_tokens) for prompt in inputs.prompts)
        )

    def checkpoint_parts(self) -> Iterator[CheckpointPart]:
        yield CheckpointPart("model.embed_tokens.weight", self.embed_tokens.weight)
        for n, layer in enumerate(self.layers):
            if isinstance(layer, DecoderLayer):
                yield from layer.checkpoint_parts(f"model.layers.{n}")
        yield CheckpointPart("model.norm.weight", self.norm.weight)
        if not self.config.tie_word_embeddings:
            yield CheckpointPart("lm_head.weight", self.lm_head.weight)

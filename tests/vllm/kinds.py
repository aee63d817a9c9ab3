"""Tiny checkpoints of the kinds that vLLM repacks, derives from, or loads in a way of its own:
block-quantised FP8, BF16 that it quantises itself, MLA, attention sinks; another for every version.

Does no I/O but to write the folders that vLLM loads. Names and shapes are those that Hugging Face's
checkpoints of these architectures have.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from tests.vllm.checkpoints import FILE, LENGTH, VOCABULARY, tokenizer, tokenizer_config

__all__ = ("KINDS", "Kind", "tensors_of", "write_checkpoint")

Shapes = dict[str, tuple[int, ...]]

HIDDEN: Final = 256
INTERMEDIATE: Final = 512
EXPERT_INTERMEDIATE: Final = 256
EXPERTS: Final = 8
LAYERS: Final = 2
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 64
MLA_HEADS: Final = 16
LATENT: Final = 512
NOPE, ROPE, VALUE = 128, 64, 128
BLOCK: Final = 128
"""Rows and columns that share a scale."""
SPREAD: Final = 0.2
NORM_SPREAD: Final = 0.05

_LINEAR: Final = ("_proj.weight", "_with_mqa.weight")
"""What is quantised ends so."""

_COMMON: Final[Mapping[str, Any]] = {
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INTERMEDIATE,
    "hidden_act": "silu",
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN3: Final = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_QWEN3_MOE: Final = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": EXPERT_INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
_DEEPSEEK: Final = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_attention_heads": MLA_HEADS,
    "num_key_value_heads": MLA_HEADS,
    "moe_intermediate_size": EXPERT_INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
}
_GPT_OSS: Final = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": EXPERT_INTERMEDIATE,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_bias": True,
}
_FP8: Final = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": [f"model.layers.{number}.mlp.gate" for number in range(LAYERS)],
}


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint, and what vLLM is told of it."""

    config: Mapping[str, Any]
    blocks: bool = False
    """Linear layers are FP8 with a scale for each block."""
    online: bool = False
    """vLLM makes FP8 of BF16."""
    on_cpu: bool = False
    """vLLM has kernels for it on a CPU."""


KINDS: Final[Mapping[str, Kind]] = {
    "fp8-blocks": Kind(_QWEN3, blocks=True, on_cpu=True),
    "fp8-blocks-experts": Kind(_QWEN3_MOE, blocks=True, on_cpu=True),
    "fp8-online": Kind(_QWEN3, online=True),
    "fp8-online-experts": Kind(_QWEN3_MOE, online=True),
    "mla": Kind(_DEEPSEEK),
    "mla-fp8-blocks": Kind(_DEEPSEEK, blocks=True),
    "sinks": Kind(_GPT_OSS, on_cpu=True),
}


def tensors_of(name: str, version: int) -> dict[str, torch.Tensor]:
    """The checkpoint that a trainer publishes as `version`."""
    kind = KINDS[name]
    random = torch.Generator().manual_seed(zlib.crc32(f"{name}/{version}".encode()))
    tensors: dict[str, torch.Tensor] = {}
    for tensor, shape in _shapes(kind.config["model_type"]).items():
        values = torch.randn(shape, generator=random)
        values = 1 + values * NORM_SPREAD if tensor.endswith("norm.weight") else values * SPREAD
        if kind.blocks and tensor.endswith(_LINEAR):
            tensors |= _in_blocks(tensor, values)
        else:
            tensors[tensor] = values.to(torch.bfloat16)
    return tensors


def write_checkpoint(folder: Path, name: str, version: int) -> Path:
    """Make a folder that vLLM can serve; returns it."""
    kind = KINDS[name]
    config = {**_COMMON, **kind.config, **({"quantization_config": _FP8} if kind.blocks else {})}
    folder.mkdir(parents=True)
    save_file(tensors_of(name, version), folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return folder


def _in_blocks(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix of FP8 and the scale of each of its blocks."""
    rows, columns = (-(-size // BLOCK) for size in values.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    scaled = (blocks / scales[:, None, :, None]).reshape(padded.shape)
    quantised = scaled[: values.shape[0], : values.shape[1]].to(torch.float8_e4m3fn)
    return {name: quantised.contiguous(), f"{name}_scale_inv": scales}


def _shapes(model_type: str) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        match model_type:
            case "deepseek_v2":
                shapes |= _latent(attention)
                if number == 0:
                    shapes |= _gated(mlp, INTERMEDIATE)
                else:
                    shapes |= _experts(mlp) | _gated(f"{mlp}.shared_experts", EXPERT_INTERMEDIATE)
            case "gpt_oss":
                shapes |= _with_sinks(attention) | _fused_experts(mlp)
            case "qwen3_moe":
                shapes |= _attention(attention) | _experts(mlp)
            case _:
                shapes |= _attention(attention) | _gated(mlp, INTERMEDIATE)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def _projections(prefix: str) -> Shapes:
    return {
        f"{prefix}.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"{prefix}.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{prefix}.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{prefix}.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    }


def _attention(prefix: str) -> Shapes:
    norms = {f"{prefix}.{norm}.weight": (HEAD_DIM,) for norm in ("q_norm", "k_norm")}
    return _projections(prefix) | norms


def _with_sinks(prefix: str) -> Shapes:
    projections = _projections(prefix)
    biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in projections.items()}
    return projections | biases | {f"{prefix}.sinks": (HEADS,)}


def _latent(prefix: str) -> Shapes:
    return {
        f"{prefix}.q_proj.weight": (MLA_HEADS * (NOPE + ROPE), HIDDEN),
        f"{prefix}.kv_a_proj_with_mqa.weight": (LATENT + ROPE, HIDDEN),
        f"{prefix}.kv_a_layernorm.weight": (LATENT,),
        f"{prefix}.kv_b_proj.weight": (MLA_HEADS * (NOPE + VALUE), LATENT),
        f"{prefix}.o_proj.weight": (HIDDEN, MLA_HEADS * VALUE),
    }


def _gated(prefix: str, width: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (width, HIDDEN),
        f"{prefix}.up_proj.weight": (width, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, width),
    }


def _experts(prefix: str) -> Shapes:
    shapes: Shapes = {f"{prefix}.gate.weight": (EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        shapes |= _gated(f"{prefix}.experts.{expert}", EXPERT_INTERMEDIATE)
    return shapes


def _fused_experts(prefix: str) -> Shapes:
    return {
        f"{prefix}.router.weight": (EXPERTS, HIDDEN),
        f"{prefix}.router.bias": (EXPERTS,),
        f"{prefix}.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * EXPERT_INTERMEDIATE),
        f"{prefix}.experts.gate_up_proj_bias": (EXPERTS, 2 * EXPERT_INTERMEDIATE),
        f"{prefix}.experts.down_proj": (EXPERTS, EXPERT_INTERMEDIATE, HIDDEN),
        f"{prefix}.experts.down_proj_bias": (EXPERTS, HIDDEN),
    }

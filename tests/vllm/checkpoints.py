"""Tiny checkpoints of real architectures, another one for every version, written on the fly.

Does no I/O but to write the folders that vLLM loads. Names and shapes are those that Hugging Face's
checkpoints of these architectures have; weights are seeded by architecture and version, large
enough for greedy output to differ between versions, and no tensor is the same in two versions.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file

__all__ = (
    "FILE",
    "LENGTH",
    "SPECULATIVE",
    "VOCABULARY",
    "Architecture",
    "tensors_of",
    "tokenizer",
    "tokenizer_config",
    "write_checkpoint",
)

Architecture = Literal["qwen3", "qwen3_moe", "mimo"]
"""`mimo` has a layer that proposes the next token but one: see `SPECULATIVE`."""

FILE: Final = "model.safetensors"
VOCABULARY: Final = 512
HIDDEN: Final = 128
INTERMEDIATE: Final = 256
EXPERT_INTERMEDIATE: Final = 64
EXPERTS: Final = 8
LAYERS: Final = 2
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 32
LENGTH: Final = 1024
"""Most tokens of a request."""
SPREAD: Final = 0.2
"""Standard deviation of the weights: so much that logits are far from each other."""
NORM_SPREAD: Final = 0.05
SPECIAL: Final = ("<pad>", "<s>", "</s>", "<unk>")

SPECULATIVE: Final[dict[Architecture, dict[str, Any]]] = {
    "mimo": {"method": "mtp", "num_speculative_tokens": 1}
}
"""How engines speculate that are started from a checkpoint which has a drafter."""

_CLASSES: Final = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mimo": "MiMoForCausalLM",
}
_DRAFTER: Final = "model.mtp_layers.0"


def tensors_of(architecture: Architecture, version: int) -> dict[str, torch.Tensor]:
    """The checkpoint that a trainer publishes as `version`, in BF16."""
    seed = zlib.crc32(f"{architecture}/{version}".encode())
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(architecture).items():
        values = torch.randn(shape, generator=random)
        values = 1 + values * NORM_SPREAD if len(shape) == 1 else values * SPREAD
        tensors[name] = values.to(torch.bfloat16)
    return tensors


def write_checkpoint(folder: Path, architecture: Architecture, version: int) -> Path:
    """Make a folder that vLLM can serve; returns it."""
    folder.mkdir(parents=True)
    save_file(tensors_of(architecture, version), folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(architecture)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return folder


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        shapes |= _attention_shapes(layer, architecture)
        if architecture == "qwen3_moe":
            shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                shapes |= _mlp_shapes(f"{layer}.mlp.experts.{expert}", EXPERT_INTERMEDIATE)
        else:
            shapes |= _mlp_shapes(f"{layer}.mlp", INTERMEDIATE)
    if architecture == "mimo":
        shapes |= _attention_shapes(_DRAFTER, architecture)
        shapes |= _mlp_shapes(f"{_DRAFTER}.mlp", INTERMEDIATE)
        for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            shapes[f"{_DRAFTER}.{norm}.weight"] = (HIDDEN,)
        shapes[f"{_DRAFTER}.input_proj.weight"] = (HIDDEN, 2 * HIDDEN)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def _attention_shapes(layer: str, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Of a layer's attention, and of the norms before and after it."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    }
    if architecture == "mimo":
        shapes |= {
            f"{layer}.self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
            f"{layer}.self_attn.k_proj.bias": (KV_HEADS * HEAD_DIM,),
            f"{layer}.self_attn.v_proj.bias": (KV_HEADS * HEAD_DIM,),
        }
    else:
        shapes |= {
            f"{layer}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"{layer}.self_attn.k_norm.weight": (HEAD_DIM,),
        }
    return shapes


def _mlp_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, HIDDEN),
        f"{prefix}.up_proj.weight": (width, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, width),
    }


def _config(architecture: Architecture) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": "qwen2" if architecture == "mimo" else architecture,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if architecture == "mimo":
        config["num_nextn_predict_layers"] = 1
    if architecture == "qwen3_moe":
        config |= {
            "moe_intermediate_size": EXPERT_INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        }
    return config


def tokenizer() -> dict[str, Any]:
    """One word per token: `t<id>`."""
    words = {word: number for number, word in enumerate(SPECIAL)}
    words |= {f"t{number}": number for number in range(len(SPECIAL), VOCABULARY)}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": word, "special": True, **added}
            for number, word in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }


def tokenizer_config() -> dict[str, Any]:
    pad, bos, eos, unknown = SPECIAL
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unknown,
        "model_max_length": LENGTH,
    }

"""What vLLM is started with: the model's folder, options and environment. Does no I/O but to write
the folder, which has no weights: the server starts with random ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.h200.processes import ROOT

__all__ = (
    "ADDRESS",
    "MODEL",
    "TINY",
    "config_of",
    "server_environment",
    "server_options",
    "tokenizer_of",
    "write_folder",
)

ADDRESS: Final = "127.0.0.1"
MODEL: Final = "model"
"""By what name requests ask for it."""

TINY: Final[Mapping[str, Any]] = {
    "vocab_size": 500,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "moe_intermediate_size": 64,
}
"""For the flow alone. Sizes that vLLM's kernels for CPUs take, and a vocabulary that it pads."""

MAX_TOKENS: Final = 4096
EXPERTS_PER_TOKEN: Final = 8
KV_CACHE_BYTES: Final = 2 * 2**30
"""Of each GPU: requests here are few and short."""
UTILIZATION: Final = 0.05
"""Asked for at the start only: the cache's size is given. Trainers take the rest."""
SPECIAL: Final = ("<pad>", "<s>", "</s>", "<unk>")

GRAPHS: Final = (
    '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}'
)
EXTENSION: Final = "benchmarks.vllm_h200.extension.Extension"


def config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of Qwen3-MoE with these sizes."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": 151_936,
        "num_experts_per_tok": min(EXPERTS_PER_TOKEN, config["num_experts"] // 2),
        "head_dim": 128,
        "intermediate_size": 3 * config["hidden_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }


def tokenizer_of(vocab_size: int) -> dict[str, Any]:
    """`tokenizer.json` with one word per token: `t<id>`."""
    words = {word: number for number, word in enumerate(SPECIAL)}
    words |= {f"t{number}": number for number in range(len(SPECIAL), vocab_size)}
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
        "model": {"type": "WordLevel", "vocab": words, "unk_token": SPECIAL[-1]},
    }


def write_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """What vLLM reads of a model before its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    said = config_of(config)
    pad, begin, end, unknown = SPECIAL
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": begin,
        "eos_token": end,
        "unk_token": unknown,
        "model_max_length": MAX_TOKENS,
    }
    for name, content in (
        ("config.json", said),
        ("tokenizer.json", tokenizer_of(said["vocab_size"])),
        ("tokenizer_config.json", tokenizer),
    ):
        (folder / name).write_bytes(msgspec.json.encode(content))


def server_options(
    folder: Path, port: int, tp: int, *, cpu: bool, graphs: bool = False
) -> list[str]:
    """Of `vllm.entrypoints.openai.api_server`.

    Args:
        graphs: decode by CUDA graphs, not eagerly. Nothing is compiled either way.
    """
    options = [
        *("--model", str(folder), "--served-model-name", MODEL, "--load-format", "dummy"),
        *("--host", ADDRESS, "--port", str(port), "--uvicorn-log-level", "warning"),
        *("--tensor-parallel-size", str(tp), "--dtype", "bfloat16"),
        *("--max-model-len", "256" if cpu else "1024", "--max-num-seqs", "16"),
        *("--worker-extension-cls", EXTENSION),
        *("--weight-transfer-config", '{"backend": "weightbus"}'),
    ]
    options += ["--compilation-config", GRAPHS] if graphs else ["--enforce-eager"]
    if not cpu:
        options += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
        options += ["--gpu-memory-utilization", str(UTILIZATION), "--disable-custom-all-reduce"]
    return options


def server_environment(tp: int, *, cpu: bool, path: str = "") -> dict[str, str]:
    """Beside this process's own.

    Args:
        path: PYTHONPATH of this process; vLLM's workers must find this package by it.
    """
    said = {
        "VLLM_SERVER_DEV_MODE": "1",  # without it there are no endpoints to pause and update by
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), path))),
    }
    if cpu:
        binding = "|".join(map(str, range(tp))) if tp > 1 else "nobind"
        said |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": binding}
    return said

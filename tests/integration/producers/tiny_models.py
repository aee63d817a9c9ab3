"""Models of transformers that train in milliseconds, and what a `Trainer` needs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
)

__all__ = ("Tokens", "arguments", "saved", "tiny_model", "tiny_moe")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def tiny_model() -> PreTrainedModel:
    """A dense decoder with tied embeddings."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def tiny_moe() -> PreTrainedModel:
    """A decoder whose experts are one tensor in the module, and one each in a checkpoint."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Seeded random sequences."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, SIZES["vocab_size"], (16,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def arguments(directory: Path, steps: int, **others: Any) -> TrainingArguments:
    """Of a trainer on the CPU that says nothing; steps large enough to be seen in BF16."""
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "no"} | others,
    )


def saved(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    """What `save_pretrained` makes of it: the names that engines load."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")

"""Models of shapes: true to the public checkpoints, cut like a large engine cuts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

from tests.unit.reload.models import layout_of, random_tensor, replay, same_bits
from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.messages import Inputs
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.shapes import DEEPSEEK_V3, QWEN3_30B_A3B, QWEN3_32B
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.shapes import families_of, kimi_k2_fp8, rank_bytes
from weightbus.consumers.reload.tracer import trace_needs

SMALL_MIXTURE = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "moe_intermediate_size": 32,
}
SMALL_LATENT = {
    "vocab_size": 200,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_experts": 4,
    "moe_intermediate_size": 512,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "expert_bias": True,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "quantized": True,
}
SMALL: Mapping[str, dict[str, Any]] = {
    "mixture": SMALL_MIXTURE,
    "mixture-expert-parallel": {**SMALL_MIXTURE, "expert_parallel": True},
    "latent": SMALL_LATENT,
    "latent-expert-parallel": {**SMALL_LATENT, "expert_parallel": True},
    "dense-tied": {**SMALL_MIXTURE, "num_experts": 0, "tie_word_embeddings": True},
}


def whole_checkpoint(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Names, dtypes and shapes of all tensors; there is no memory behind them."""
    with torch.device("meta"):
        return build_model("shapes", config).checkpoint_tensors()


@pytest.mark.parametrize(
    ("config", "tensors", "size_bytes"),
    [
        pytest.param(QWEN3_30B_A3B, 18_867, 61_064_245_248, id="Qwen3-30B-A3B"),
        pytest.param(QWEN3_32B, 707, 65_524_246_528, id="Qwen3-32B"),
    ],
)
def test_tensors_are_those_of_the_public_checkpoint(
    config: Mapping[str, Any], tensors: int, size_bytes: int
) -> None:
    checkpoint = whole_checkpoint(config)
    assert len(checkpoint) == tensors
    assert sum(tensor.nbytes for tensor in checkpoint.values()) == size_bytes


def test_tensors_of_latent_attention_are_those_of_the_public_checkpoint() -> None:
    """Kimi-K2 is of DeepSeek-V3's architecture, and described a second time for the planner."""
    config = {
        **DEEPSEEK_V3,
        "vocab_size": 163_840,
        "num_attention_heads": 64,
        "num_experts": 384,
        "first_k_dense_replace": 1,
    }
    found, expected = Counter[tuple[str, tuple[int, ...]]](), Counter[tuple[str, tuple[int, ...]]]()
    for tensor in layout_of(whole_checkpoint(config)).tensors:
        found[tensor.dtype, tensor.shape] += 1
    for family in kimi_k2_fp8():
        expected[family.dtype, family.shape] += family.count
    assert found == expected


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize(
    ("config", "ranks"), [(QWEN3_30B_A3B, 4), (QWEN3_30B_A3B, 2), (QWEN3_32B, 4), (DEEPSEEK_V3, 4)]
)
def test_rank_holds_what_the_planner_expects(
    config: Mapping[str, Any], ranks: int, expert_parallel: bool
) -> None:
    """Two descriptions of one rule, in `planning.shapes` and here; without padding."""
    config = {**config, "num_hidden_layers": 5, "vocab_size": 2**17}
    config["expert_parallel"] = expert_parallel
    layout = layout_of(whole_checkpoint(config))
    with torch.device("meta"):
        rank = build_model("shapes", config, 0, ranks)
    held = sum(parameter.nbytes for parameter in rank.parameters())
    expected = rank_bytes(families_of(layout), ranks, expert_parallel=expert_parallel)
    assert held == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_traced_needs_make_the_parameters_that_the_loader_makes(
    config: Mapping[str, Any], ranks: int
) -> None:
    checkpoint = {
        name: random_tensor(tuple(tensor.shape), tensor.dtype, seed)
        for seed, (name, tensor) in enumerate(whole_checkpoint(config).items())
    }
    layout = layout_of(checkpoint)
    held = set()
    for rank in range(ranks):
        build = partial(build_model, "shapes", config, rank, ranks)
        live = build()
        live.requires_grad_(False)
        live.load_checkpoint(checkpoint.items())
        needs = trace_needs(TorchModelHost("shapes", build, live), layout).needs
        held |= {copy.tensor for copy in needs.copies}
        made = replay(needs, list(checkpoint.values()))
        assert made.keys() == dict(live.named_parameters()).keys()
        for name, parameter in live.named_parameters():
            assert same_bits(parameter, made[name]), (rank, name)
    assert held == set(range(len(checkpoint)))


def test_model_is_refused_when_a_cut_would_part_a_block_of_scales() -> None:
    with pytest.raises(PlanError, match="must be a multiple of 128"):
        build_model("shapes", {**SMALL_LATENT, "moe_intermediate_size": 256}, 1, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 4}, "moe_intermediate_size"),
        ({"kv_lora_rank": 128}, "q_lora_rank"),
        ({"hiden_size": 64}, "hiden_size"),
    ],
)
def test_model_is_refused_when_configuration_does_not_fit(
    config: dict[str, Any], message: str
) -> None:
    small = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, **config}
    with pytest.raises(PlanError, match=message), torch.device("meta"):
        build_model("shapes", small)


def test_request_is_refused_when_model_only_holds_parameters() -> None:
    model = build_model("shapes", SMALL_MIXTURE)
    with pytest.raises(RequestRefused, match="computes nothing"):
        model.infer(Inputs(prompts=((1, 2),), new_tokens=1))

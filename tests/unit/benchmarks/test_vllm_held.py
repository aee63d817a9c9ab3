"""What finds out which version a rank of vLLM holds, by the layout of vLLM's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks.h200.setup import ARCHITECTURE, build_meta, sources_of
from benchmarks.h200.weights import fill
from benchmarks.vllm_h200.held import bind, holding, plain_name
from benchmarks.vllm_h200.setup import TINY
from weightbus.consumers.engines.torch.models import build_model

CONFIG: Mapping[str, Any] = {**TINY, "num_hidden_layers": 1}


def parameters_of(version: int, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """As vLLM names them, holding a version."""

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for source in sources_of(CONFIG):
            tensor = torch.empty(source.shape, dtype=source.dtype)
            fill(tensor, source.name, version)
            yield source.name, tensor

    model = build_model(ARCHITECTURE, CONFIG, rank, ranks)
    model.requires_grad_(False)
    model.load_checkpoint(weights())
    named = {}
    for name, parameter in model.named_parameters():
        full = name if name.startswith("lm_head") else f"model.{name}"
        named[full.replace("mlp.experts.", "mlp.experts.routed_experts.")] = parameter.data
    return named


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_version_is_named_when_every_bit_is_its_own(rank: int, ranks: int) -> None:
    named = parameters_of(5, rank, ranks)
    shapes = build_meta(CONFIG, rank, ranks)
    bind(shapes, named.items())
    size_bytes = sum(parameter.nbytes for parameter in named.values())
    assert holding(shapes) == f"version 5, {size_bytes} bytes"


@pytest.mark.parametrize(
    ("vocab_size", "ranks", "rows"), [(151_936, 4, 37_984), (151_936, 1, 151_936), (500, 2, 256)]
)
def test_vocabulary_is_padded_and_cut_as_by_vllm(vocab_size: int, ranks: int, rows: int) -> None:
    shapes = build_meta({**CONFIG, "vocab_size": vocab_size}, ranks - 1, ranks)
    assert shapes.get_parameter("embed_tokens.weight").shape[0] == rows


def test_one_wrong_bit_is_found_in_vllm_s_own_memory() -> None:
    named = parameters_of(5)
    shapes = build_meta(CONFIG, 0, 1)
    bind(shapes, named.items())
    experts = named["model.layers.0.mlp.experts.routed_experts.w13_weight"]
    experts.view(torch.int16)[3, 70, 9] ^= 1
    found = holding(shapes)
    assert "1 elements of model.layers.0.mlp.experts.3.up_proj.weight" in found, found


def test_parameters_that_were_replaced_are_compared_when_they_are_bound_again() -> None:
    shapes = build_meta(CONFIG, 0, 1)
    bind(shapes, parameters_of(5).items())
    bind(shapes, parameters_of(6).items())
    assert holding(shapes).startswith("version 6, ")


def test_parameter_that_is_missing_is_named() -> None:
    named = parameters_of(5)
    del named["model.norm.weight"]
    with pytest.raises(ValueError, match=r"vLLM has no parameter norm\.weight"):
        bind(build_meta(CONFIG, 0, 1), named.items())


def test_parameter_of_no_checkpoint_is_named() -> None:
    named = parameters_of(5) | {"model.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"of no checkpoint: extra"):
        bind(build_meta(CONFIG, 0, 1), named.items())


def test_parameter_of_another_shape_is_named() -> None:
    named = parameters_of(5)
    named["model.norm.weight"] = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"norm\.weight is \(3,\) of torch\.bfloat16 in vLLM"):
        bind(build_meta(CONFIG, 0, 1), named.items())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        (
            "model.layers.1.mlp.experts.routed_experts.w2_weight",
            "layers.1.mlp.experts.w2_weight",
        ),
        ("model.layers.1.mlp.experts.w2_weight", "layers.1.mlp.experts.w2_weight"),
    ],
)
def test_names_lose_what_vllm_puts_around_modules(name: str, plain: str) -> None:
    assert plain_name(name) == plain

"""What finds out whether a rank holds a version: it must see one wrong byte, wherever it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks.h200.held import holding
from benchmarks.h200.setup import ARCHITECTURE, TINY, sources_of
from benchmarks.h200.weights import fill
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model

QUANTIZED: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "quantized": True,
}


def loaded(config: Mapping[str, Any], version: int, rank: int, ranks: int) -> ServedModel:
    """A rank that holds a version, by its own loader."""

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for source in sources_of(config):
            tensor = torch.empty(source.shape, dtype=source.dtype)
            fill(tensor, source.name, version)
            yield source.name, tensor

    model = build_model(ARCHITECTURE, config, rank, ranks)
    model.requires_grad_(False)
    model.load_checkpoint(weights())
    return model


@pytest.mark.parametrize("config", [TINY, QUANTIZED], ids=["moe", "fp8"])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_version_is_named_when_every_byte_is_its_own(
    config: Mapping[str, Any], rank: int, ranks: int
) -> None:
    config = {**config, "num_hidden_layers": 1}
    model = loaded(config, 7, rank, ranks)
    held_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert holding(model) == f"version 7, {held_bytes} bytes"


def test_any_parameter_is_named_when_one_bit_of_its_last_element_is_wrong() -> None:
    config = {**TINY, "num_hidden_layers": 1}
    model = loaded(config, 3, 1, 2)
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(-1).view(torch.int16)
        bits[-1] ^= 1
        assert holding(model).startswith("no version: of 3 but for 1 elements of "), name
        bits[-1] ^= 1
    assert holding(model).startswith("version 3, ")


def test_mix_is_told_when_one_tensor_is_of_the_version_before() -> None:
    model, older = loaded(TINY, 3, 0, 2), loaded(TINY, 2, 0, 2)
    model.get_parameter("layers.1.mlp.experts.w2_weight").copy_(
        older.get_parameter("layers.1.mlp.experts.w2_weight")
    )
    assert "experts.0.down_proj.weight" in holding(model)


def test_nothing_is_held_when_parameters_are_unset() -> None:
    model = build_model(ARCHITECTURE, TINY)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert holding(model) == "no version: its first tensor is of none"

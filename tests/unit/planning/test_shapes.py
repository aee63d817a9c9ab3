"""Bytes per rank follow from the names of the tensors."""

from __future__ import annotations

import pytest

from weightbus.consumers.planning.shapes import (
    Family,
    families_of,
    kimi_k2_fp8,
    qwen3_30b_a3b,
    rank_bytes,
    whole_bytes,
)
from weightbus.schemas.layout import Layout, TensorSpec


@pytest.mark.parametrize(
    ("name", "shape", "bytes_of_four"),
    [
        ("model.embed_tokens.weight", (8, 6), 24),
        ("lm_head.weight", (8, 6), 24),
        ("model.layers.3.self_attn.q_proj.weight", (8, 6), 24),
        ("model.layers.3.self_attn.q_proj.bias", (8,), 4),
        ("model.layers.3.self_attn.kv_b_proj.weight", (8, 6), 24),
        ("model.layers.3.self_attn.o_proj.weight", (6, 8), 24),
        ("model.layers.3.self_attn.o_proj.bias", (8,), 16),
        ("model.layers.3.mlp.down_proj.weight_scale_inv", (1, 8), 4),
        ("model.layers.3.mlp.experts.7.up_proj.weight", (8, 6), 24),
        ("model.layers.3.mlp.up_proj.weight", (9, 6), 36),
        ("model.layers.3.self_attn.q_a_proj.weight", (8, 6), 96),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", (8, 6), 96),
        ("model.layers.3.mlp.gate.weight", (8, 6), 96),
        ("model.layers.3.input_layernorm.weight", (8,), 16),
    ],
)
def test_rank_holds_its_cut_when_the_name_is_a_projection_s(
    name: str, shape: tuple[int, ...], bytes_of_four: int
) -> None:
    family = Family(name=name, dtype="BF16", shape=shape)
    assert rank_bytes([family], 4) == bytes_of_four
    assert rank_bytes([family], 1) == whole_bytes([family])


def test_rank_holds_whole_experts_when_they_are_shared_out() -> None:
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    experts = Family(name=name, dtype="U8", shape=(10, 10), count=6)
    assert rank_bytes([experts], 4, expert_parallel=True) == 200
    assert rank_bytes([experts], 4) == 180


def test_families_hold_every_tensor_of_a_layout() -> None:
    names = ["a.0.w", "a.1.w", "a.2.w", "b"]
    shapes = [(2, 3), (2, 3), (4,), (4,)]
    specs = tuple(TensorSpec(name, "F32", shape) for name, shape in zip(names, shapes, strict=True))
    families = families_of(Layout(specs, (), ()))
    assert [(one.name, one.count) for one in families] == [("a.0.w", 2), ("a.0.w", 1), ("b", 1)]
    assert whole_bytes(families) == 2 * 24 + 16 + 16


def test_kimi_k2_is_of_its_published_size() -> None:
    families = kimi_k2_fp8()
    assert sum(one.count for one in families) == 139_583
    assert whole_bytes(families) == 1_029_173_249_888


def test_qwen3_30b_a3b_is_of_its_published_size() -> None:
    families = qwen3_30b_a3b()
    assert sum(family.count for family in families) == 18_867
    assert whole_bytes(families) == 61_064_245_248
    assert rank_bytes(families, 4) == 15_285_252_096

"""The host of a rank of vLLM, without a consumer: what it refuses, and how it leaves the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm.hosted import Hosted, check_fresh, running_hosted
from tests.vllm.oracle import Oracle

pytestmark = pytest.mark.timeout(1200)

LAYER = "model.layers.0"
EXPERT = f"{LAYER}.mlp.experts.3"


@pytest.fixture(scope="module")
def engine(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """One with experts."""
    with running_hosted(oracle, "qwen3_moe", tmp_path_factory.mktemp("hosting")) as engine:
        yield engine


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (
            {"without": [f"{LAYER}.self_attn.v_proj.weight"]},
            f"lacks {LAYER}.self_attn.v_proj.weight",
        ),
        ({"without": [f"{LAYER}.input_layernorm.weight"]}, f"lacks {LAYER}.input_layernorm.weight"),
        ({"without": ["lm_head.weight"]}, "lacks lm_head.weight"),
        ({"without": [f"{EXPERT}.up_proj.weight"]}, f"lacks {EXPERT}.up_proj.weight"),
        ({"reshaped": {"other.weight": [3, 3]}}, "other"),
        (
            {"reshaped": {f"{LAYER}.self_attn.o_proj.weight": [128, 64]}},
            f"{LAYER}.self_attn.o_proj.weight of shape (128, 64)",
        ),
        (
            {"reshaped": {f"{LAYER}.self_attn.q_proj.weight": [192, 128]}},
            f"{LAYER}.self_attn.q_proj.weight",
        ),
        ({"reshaped": {f"{EXPERT}.down_proj.weight": [128, 70]}}, f"{EXPERT}.down_proj.weight"),
        ({"reshaped": {"lm_head.weight": [600, 128]}}, "lm_head.weight of shape (600, 128)"),
    ],
)
def test_layout_is_refused_before_anything_is_written_when_it_does_not_make_the_model(
    engine: Hosted, oracle: Oracle, order: dict[str, Any], said: str
) -> None:
    before = engine.carry_out(version=1)
    report = engine.carry_out(version=2, **order)
    assert report.error.startswith("CheckpointRefused: not a checkpoint of Qwen3MoeForCausalLM: ")
    assert said in report.error
    assert (report.sums, report.outputs) == (before.sums, before.outputs)


def test_versions_are_as_in_fresh_engines(engine: Hosted, oracle: Oracle) -> None:
    """The second is partly written directly, and partly loaded again, of some modules only."""
    check_fresh(engine.carry_out(version=1), oracle, "qwen3_moe", 1)
    report = engine.carry_out(version=2)
    check_fresh(report, oracle, "qwen3_moe", 2)
    assert 0 < report.processed < len(report.sums)


def test_tensors_that_vllm_skips_do_no_harm(engine: Hosted, oracle: Oracle) -> None:
    skipped = {f"{LAYER}.self_attn.rotary_emb.inv_freq": [16]}
    check_fresh(engine.carry_out(version=1, reshaped=skipped), oracle, "qwen3_moe", 1)


def test_copies_in_closures_are_found_though_the_weight_is_the_checkpoints(engine: Hosted) -> None:
    """`lm_head.weight` holds the very bytes; what is computed with is a packed copy of it."""
    derived = engine.carry_out(version=1).derived
    assert derived["lm_head"] == "cpu_linear"
    assert derived[f"{LAYER}.self_attn.qkv_proj"] == "cpu_linear"


@pytest.mark.parametrize("after", [0, 1, 9, 40])
def test_next_update_is_whole_when_the_checkpoint_was_gone_in_the_middle(
    engine: Hosted, oracle: Oracle, after: int
) -> None:
    assert engine.carry_out(version=1, stops_after=after).on_meta == []
    check_fresh(engine.carry_out(version=2), oracle, "qwen3_moe", 2)


def test_scratch_models_leave_vllms_registries_as_they_are(engine: Hosted) -> None:
    first = engine.carry_out(version=1)
    again = engine.carry_out(version=2, without=["lm_head.weight"])
    assert first.registered == again.registered > 0
    assert (again.shared, again.on_meta) == ([], [])

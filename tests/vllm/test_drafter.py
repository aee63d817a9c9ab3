"""A drafter made of the same checkpoint as its target: it is updated with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.vllm.hosted import Hosted, check_fresh, running_hosted
from tests.vllm.oracle import Oracle
from tests.vllm.probe import DRAFTER

pytestmark = pytest.mark.timeout(1800)

LAYER = "model.mtp_layers."
KEPT = ("(packed)", "norm.weight", "input_proj.weight")
"""A CPU packs the weights of vLLM's linear layers, and keeps nothing else of them."""
OWN = {
    "2.input_proj.weight",
    "2.final_layernorm.weight",
    "2.mtp_block.self_attn.qkv_proj (packed)",
    "2.mtp_block.mlp.down_proj (packed)",
}
"""Some of what the drafter alone has."""


@pytest.fixture(scope="module")
def engine(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with running_hosted(oracle, "mimo", tmp_path_factory.mktemp("hosting")) as engine:
        yield engine


def test_versions_of_target_and_drafter_are_as_in_fresh_engines(
    engine: Hosted, oracle: Oracle
) -> None:
    """The first is loaded as a whole, the second partly written directly. What is generated does
    not depend on the drafter; what it proposed does."""
    sums = [oracle.generates("mimo", 0, 1).sums[0]]
    for version in (1, 2):
        report = engine.carry_out(version=version)
        check_fresh(report, oracle, "mimo", version)
        assert report.drafted
        sums.append(report.sums)
    own = [
        {name: one[name] for name in one if name.startswith(DRAFTER) and name.endswith(KEPT)}
        for one in sums
    ]
    assert {name.rpartition(LAYER)[2] for name in own[0]} >= OWN
    for before, after in itertools.pairwise(own):
        assert not [name for name in before if before[name] == after[name]]


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("input_proj.weight", "input_proj"),
        ("self_attn.v_proj.bias", "mtp_block.self_attn.qkv_proj"),
    ],
)
def test_layout_is_refused_before_anything_is_written_when_it_does_not_make_the_drafter(
    engine: Hosted, lacking: str, said: str
) -> None:
    before = engine.carry_out(version=1)
    report = engine.carry_out(version=2, without=[f"{LAYER}0.{lacking}"])
    assert report.error.startswith("CheckpointRefused: ")
    assert f"the checkpoint lacks a tensor of {LAYER}2.{said}, or" in report.error
    assert (report.sums, report.outputs) == (before.sums, before.outputs)

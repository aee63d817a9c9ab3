"""What does not make a model of vLLM, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightbus.consumers.engines.vllm.refusing import (
    Origin,
    Reached,
    check_dtypes,
    check_sizes,
    half_there,
    lacking,
    lacking_quantised,
    names_on_disk,
    near,
    padding_of,
    refusing,
)
from weightbus.consumers.errors import CheckpointRefused
from weightbus.schemas.layout import Layout, TensorSpec
from weightbus.schemas.needs import Copy, Needs, ParameterSpec

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def needs_of(*sizes: tuple[int, ...], dtype: str = "BF16") -> Needs:
    """One copy of the first tensor for each of `sizes`, from its first element on."""
    copies = tuple(Copy(0, (0,) * len(size), size, 0, 0, (1,) * len(size)) for size in sizes)
    return Needs((ParameterSpec("w", dtype, (4, 4), (4, 1)),), copies)


def layout_of(dtype: str = "BF16") -> Layout:
    return Layout((TensorSpec("t", dtype, (4, 4)),), (), ())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("layers.0.mlp.extra"), "layers.0.mlp.extra"),
        (AssertionError(), "the engine expects another shape"),
        (RuntimeError("start (0) + length (9) exceeds dimension size (3)."), "dimension size"),
    ],
)
def test_tensor_is_named_when_vllm_finds_no_place_for_it(error: Exception, said: str) -> None:

    def load(reached: Reached) -> None:
        with refusing("M", reached):
            for name, _ in reached.noted(iter([("a", torch.zeros(1)), ("b", torch.zeros(2, 3))])):
                if name == "b":
                    raise error

    with pytest.raises(CheckpointRefused, match="at b of shape") as raised:
        load(Reached())
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("Tensor.item() cannot be called on meta tensors"), NotImplementedError()]
)
def test_other_errors_are_not_the_checkpoints_fault(error: Exception) -> None:
    with pytest.raises(type(error)), refusing("M", Reached()):
        raise error


@pytest.mark.parametrize(
    ("parameter", "names", "said"),
    [
        (
            "model.layers.1.attn.qkv_proj.weight",
            ["language.layers.1.attn.q_proj.weight", "language.layers.1.attn.k_proj.weight"],
            "lacks model.layers.1.attn.v_proj.weight",
        ),
        ("lm_head.weight", ["model.embed_tokens.weight"], "lacks lm_head.weight"),
        (
            "model.layers.0.experts.w2_weight",
            [f"model.layers.0.experts.{n}.{part}" for n, part in ((0, "a"), (1, "a"), (0, "b"))],
            "lacks model.layers.0.experts.1.b",
        ),
        ("model.layers.0.experts.w2_weight", [], "lacks a tensor of model.layers.0.experts"),
        (
            "model.layers.1.attn.qkv_proj.weight",
            [f"model.layers.1.attn.{part}.weight" for part in PACKED["qkv_proj"]],
            "lacks a tensor of model.layers.1.attn.qkv_proj, or has a smaller one",
        ),
    ],
)
def test_missing_tensor_is_named(parameter: str, names: list[str], said: str) -> None:
    assert said in lacking(parameter, names, PACKED)


def test_only_what_vllm_says_is_larger_than_its_checkpoints_is_padded() -> None:
    model = nn.Module()
    model.whole, model.padded = (nn.Parameter(torch.zeros(2, 4)) for _ in range(2))
    for parameter, numel in ((model.whole, 8), (model.padded, 6)):
        vars(parameter)["weight_loader_numel"] = numel
    model.plain = nn.Parameter(torch.zeros(3))
    assert padding_of(model) == {"padded": 2 * 4}


def test_padded_parameter_is_not_refused_unless_a_tensor_is_known_to_be_missing() -> None:
    parameter = "model.layers.0.experts.w2_weight"
    names = [f"model.layers.0.experts.{number}.down_proj.weight" for number in (0, 1)]
    assert lacking(parameter, names, PACKED, is_padded=True) == ""
    said = lacking(parameter, [*names, "model.layers.0.experts.1.up"], PACKED, is_padded=True)
    assert said == "the checkpoint lacks model.layers.0.experts.0.up"


def test_no_tensor_is_named_when_the_checkpoint_numbers_the_layer_in_another_way() -> None:
    """vLLM counts the layers of a drafter from those of its target on: `2` is `mtp_layers.0`."""
    names = ["model.layers.0.self_attn.q_proj.bias", "model.mtp_layers.0.self_attn.q_proj.bias"]
    said = lacking("model.mtp_layers.2.mtp_block.self_attn.qkv_proj.bias", names, PACKED)
    assert said.startswith(
        "the checkpoint lacks a tensor of model.mtp_layers.2.mtp_block.self_attn"
    )
    assert "q_proj.bias" not in said


def test_tensor_is_refused_when_the_last_rank_does_not_read_to_its_end() -> None:
    check_sizes("M", needs_of((2, 4), (4, 2)), layout_of())
    with pytest.raises(CheckpointRefused, match=r"t has shape \(4, 4\): the engine takes \(4, 3\)"):
        check_sizes("M", needs_of((2, 3), (4, 2)), layout_of())


def test_values_are_cast_to_values_only() -> None:
    check_dtypes("M", needs_of((4, 4), dtype="F32"), layout_of("BF16"))
    check_dtypes("M", needs_of((4, 4), dtype="I64"), layout_of("I64"))
    with pytest.raises(CheckpointRefused, match="t is of F8_E4M3: w takes BF16"):
        check_dtypes("M", needs_of((4, 4)), layout_of("F8_E4M3"))


def test_names_are_those_of_every_file_of_a_checkpoint(tmp_path: Path) -> None:
    for name in ("layers.0.a", "layers.1.b"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    found = names_on_disk(Origin(str(tmp_path)))
    assert found == {"layers.0.a", "layers.1.b"}
    assert near("model.layers.1.w", found) == ["layers.1.b"]
    assert names_on_disk(Origin(str(tmp_path / "absent"))) == frozenset()


@pytest.mark.parametrize("revision", [None, "tuned", "c" * 40])
def test_names_are_those_of_a_snapshot_when_the_engine_was_started_by_a_name(
    tmp_path: Path, revision: str | None
) -> None:
    """Though a repository has more than engines download."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "models--some--one"
    (repository / "refs").mkdir(parents=True)
    for ref, commit in (("main", "a" * 40), ("tuned", "b" * 40), ("", "c" * 40)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save_file({f"layers.0.{ref}": torch.zeros(1)}, snapshot / "model.safetensors")
        if ref:
            (repository / "refs" / ref).write_text(commit)
    name = {None: "layers.0.main", "tuned": "layers.0.tuned"}.get(revision, "layers.0.")
    origin = Origin("some/one", revision=revision, download_dir=str(tmp_path))
    assert names_on_disk(origin) == {name}
    assert names_on_disk(origin._replace(revision="absent")) == frozenset()
    assert names_on_disk(origin._replace(name="some/other")) == frozenset()
    assert names_on_disk(origin._replace(name="/no/such/directory")) == frozenset()


def test_parameter_of_a_quantised_model_is_needed_unless_the_engine_was_started_without() -> None:
    on_disk, origin = ["layers.0.w", "layers.0.w_scale"], Origin("some/one")
    assert lacking_quantised("layers.0.made", on_disk, on_disk, origin) == ""
    said = lacking_quantised("layers.0.w_scale", on_disk[:1], on_disk, origin)
    assert said == "the checkpoint lacks layers.0.w_scale, which the engine started with"
    said = lacking_quantised("layers.0.made", on_disk, [], origin)
    assert "no safetensors file of some/one, which the engine was started with, is found" in said


def test_layers_that_are_half_there_are_told_from_layers_of_a_drafter() -> None:
    on_disk = ["model.layers.0.q", "model.layers.0.q_scale", "model.layers.1.q", "lm_head.weight"]
    assert half_there({"model.layers.0.q"}, on_disk) == ["model.layers.0.q_scale"]
    assert half_there({"model.layers.0.q", "model.layers.0.q_scale"}, on_disk) == []
    assert half_there({"model.layers.0.q"}, []) == []

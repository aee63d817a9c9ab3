"""Real models of transformers are published as `save_pretrained` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.integration.producers.tiny_models import tiny_model, tiny_moe
from tests.unit.producers.assembling import assemble
from weightbus.producers.errors import TensorInvalid, TrainerInvalid
from weightbus.producers.huggingface import split_of
from weightbus.producers.modules import plan_module
from weightbus.producers.sealing import plan_seal
from weightbus.producers.shards import Part, Shard

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}


def tied() -> Any:
    """One tensor, two names."""
    return tiny_model()


def experts() -> Any:
    """Cut by expert, gate and up."""
    return tiny_moe()


def renamed_experts() -> Any:
    """Cut, and modules renamed: `mlp` is `block_sparse_moe`, gate `w1`."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def experts_with_buffers() -> Any:
    """A correction bias that is a buffer; dense layers before those with experts."""
    config = transformers.DeepseekV3Config(
        **{**SIZES, **MLA, "num_key_value_heads": 4},
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_experts_per_tok=2,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def all_renamed() -> Any:
    """A model for text and images, whose parts have other names in its checkpoint."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 4},
        vision_config={**vision, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def turned_experts() -> Any:
    """Whose experts transformers writes turned, other than they are published on the hub."""
    heads = {"num_heads": 2, "depth": 1, "deepstack_visual_indexes": [0]}
    vision = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "patch_size": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**SIZES, **experts, "head_dim": 4}, vision_config={**vision, **heads}
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


MODELS = (tied, experts, renamed_experts, experts_with_buffers, all_renamed)


def named(function: Callable[[], Any]) -> str:
    return function.__name__


def saved(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(directory)
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def shards_of(part: Part) -> list[Shard]:
    layout = part.layout
    return [
        Shard(layout.tensors[box.tensor].name, source, layout.tensors[box.tensor].shape, box.starts)
        for box, source in zip(layout.shards, part.sources, strict=True)
    ]


def check(parts: list[Part], expected: dict[str, torch.Tensor]) -> None:
    plan_seal([part.layout for part in parts])
    found = assemble(shard for part in parts for shard in shards_of(part))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("build", MODELS, ids=named)
def test_parts_of_a_model_are_what_it_saves_when_split(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    model = build()
    expected = saved(model, tmp_path)
    split = split_of(model)
    for ranks in (1, 3):
        parts = [plan_module(model, rank=r, world_size=ranks, split=split) for r in range(ranks)]
        check(parts, expected)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for part in parts:
        assert all(source.untyped_storage().data_ptr() in storages for source in part.sources)


@pytest.fixture
def become() -> Iterator[Callable[[int, int], None]]:
    def become_rank(rank: int, ranks: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield become_rank
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("build", [experts, renamed_experts], ids=named)
def test_parts_of_ranks_are_what_the_model_saves_when_it_is_sharded_by_fsdp(
    build: Callable[[], Any], become: Callable[[int, int], None], tmp_path: Path
) -> None:
    expected = saved(build(), tmp_path)
    parts = []
    for rank in range(3):
        become(rank, 3)
        model = build()
        # torch remembers what it knows of a mesh by its value: another name, another mesh
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=(f"of_rank_{rank}",))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parts.append(plan_module(model, rank=rank, world_size=3, split=split_of(model)))
    check(parts, expected)


def test_split_is_the_same_when_the_model_is_wrapped() -> None:
    model = experts()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = (4, 32, 32)
    windows = split_of(model)(name, shape)
    assert windows is not None
    assert len(windows) == 8
    assert split_of(adapted)(name, shape) == windows
    assert split_of(torch.compile(model))(name, shape) == windows  # type: ignore[arg-type]


def test_names_are_those_of_the_checkpoint_when_the_model_was_loaded(tmp_path: Path) -> None:
    expected = saved(all_renamed(), tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    check([plan_module(model, split=split_of(model))], expected)


def test_names_are_those_that_were_loaded_when_the_loader_was_told_to_rename(
    tmp_path: Path,
) -> None:
    state = saved(experts(), tmp_path)
    state["model.last.weight"] = state.pop("model.norm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, key_mapping={r"model\.last": "model.norm"}
    )
    check([plan_module(model, split=split_of(model))], state)


def test_split_needs_no_memory_when_the_model_is_larger_than_the_host() -> None:
    with torch.device("meta"):
        config = transformers.Qwen3MoeConfig(**{**SIZES, "vocab_size": 10**12})
        model = transformers.Qwen3MoeForCausalLM(config)
    assert split_of(model)("model.embed_tokens.weight", (10**12, 16)) is None


@pytest.mark.parametrize("loaded", [False, True])
def test_experts_are_turned_as_on_the_hub_when_transformers_would_not(
    loaded: bool, tmp_path: Path
) -> None:
    model = turned_experts()
    expected = saved(model, tmp_path)
    names = [name for name in expected if ".experts." in name]
    assert len(names) == 4
    for name in names:
        expected[name] = expected[name].transpose(1, 2)
    if loaded:
        model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    check([plan_module(model, split=split_of(model))], expected)


def test_splitting_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = experts()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    split_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_own_tensors_are_published_as_they_are_when_the_class_lacks_them() -> None:
    model = experts()
    split = split_of(model)
    assert split("value_head.weight", (1, 32)) is None
    assert split("model.norm.weight", (32,)) is None


def test_tensor_is_left_out_when_its_class_does_not_save_it() -> None:
    class Forgetful(type(tied())):  # type: ignore[misc]
        _keys_to_ignore_on_save = ("model.norm.weight",)

    assert split_of(Forgetful(tied().config))("model.norm.weight", (32,)) == ()


def test_renamed_tensor_keeps_its_own_shape_when_the_config_says_another() -> None:
    split = split_of(all_renamed())
    (window,) = split("model.language_model.embed_tokens.weight", (64, 16)) or ()
    assert (window.name, window.shape) == ("language_model.model.embed_tokens.weight", (64, 16))


def test_fused_tensor_is_refused_when_the_config_says_another_shape() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(TensorInvalid, match=r"of shape \(5, 32, 16\): .* says \(4, 32, 16\)"):
        split_of(experts())(name, (5, 32, 16))


def test_model_is_refused_when_it_is_none_of_transformers() -> None:
    with pytest.raises(TrainerInvalid, match="of type Linear: must be a PreTrainedModel"):
        split_of(torch.nn.Linear(1, 1))


def test_model_is_refused_when_it_lies_in_a_module_that_is_no_wrapper() -> None:
    with pytest.raises(TrainerInvalid, match=r"of type Sequential: .* wrappers that are known"):
        split_of(torch.nn.Sequential(experts()))


def test_model_is_refused_when_it_is_quantized() -> None:
    model = experts()
    model.hf_quantizer = object()
    with pytest.raises(TrainerInvalid, match="quantized"):
        split_of(model)


def test_model_is_refused_with_the_way_out_when_its_config_alone_does_not_make_it() -> None:
    class Headed(type(tied())):  # type: ignore[misc]
        def __init__(self, config: Any, labels: int) -> None:
            super().__init__(config)
            self.labels = labels

    model = Headed(tied().config, 3)
    with pytest.raises(TrainerInvalid, match=r"Headed.*'labels'.*split_of=lambda model: None"):
        split_of(model)

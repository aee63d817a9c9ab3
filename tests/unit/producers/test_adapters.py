"""PEFT's modules as a part: what a layer computes is published, and nothing is merged in place."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from weightbus.producers.copying import CPU_PIECE_BYTES, copy_shard
from weightbus.producers.errors import TensorInvalid
from weightbus.producers.fused import Window
from weightbus.producers.modules import plan_module
from weightbus.producers.shards import Part, torch_dtype

TINY: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.turned = Conv1D(8, 6)
        self.linear = nn.Linear(8, 5)
        self.conv = nn.Conv1d(5, 5, 1)
        self.head = nn.Linear(5, 9, bias=False)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(self.turned(self.embed(indices)))
        return self.head(hidden)  # type: ignore[no-any-return]


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {"target_modules": ["embed", "turned", "linear"], "r": 3, "lora_alpha": 7} | settings
    model = peft.get_peft_model(Net().to(dtype), peft.LoraConfig(**settings))
    fill(model, 1)
    return model


def fill(model: nn.Module, seed: int) -> None:
    """As training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_()


def published(part: Part) -> dict[str, torch.Tensor]:
    """What a version holds now."""
    part.prepare()
    data = torch.zeros(part.layout.segments[0].size_bytes, dtype=torch.uint8)
    found = {}
    for number, shard in enumerate(part.layout.shards):
        copy_shard(data, part, number)
        spec, dtype = part.layout.tensors[shard.tensor], torch_dtype(part.layout, shard)
        size_bytes = part.sources[number].numel() * dtype.itemsize
        place = data[shard.offset_bytes : shard.offset_bytes + size_bytes]
        found[spec.name] = place.view(dtype).view(spec.shape)
    return found


def merged(model: Any) -> dict[str, torch.Tensor]:
    """By PEFT itself."""
    merged: dict[str, torch.Tensor] = copy.deepcopy(model).merge_and_unload().state_dict()
    return merged


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["linear", "turned"], "modules_to_save": ["head", "embed"]},
    ],
    ids=["plain", "rslora", "modules_to_save"],
)
def test_layers_are_published_bit_for_bit_as_peft_merges_them(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled: Any = torch.compile(model)
    part = plan_module(compiled)
    assert_same(published(part), merged(model))
    fill(model, 2)
    assert_same(published(part), merged(model))
    base = {name: t for name, t in model.state_dict().items() if "base_layer" in name}
    assert base
    for name, tensor in base.items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"


def test_sum_is_rounded_once_when_the_weights_have_16_bits() -> None:
    model = adapted(torch.bfloat16, target_modules=["linear", "turned"])
    assert model.base_model.model.linear.lora_A["default"].weight.dtype == torch.float32
    assert_same(published(plan_module(model)), merged(model))
    halves = adapted(torch.bfloat16, target_modules=["linear"]).to(torch.bfloat16)
    assert_same(published(plan_module(halves)), merged(halves))


def test_sum_is_cast_after_it_is_made_when_a_dtype_is_given() -> None:
    model = adapted()
    found = published(plan_module(model, dtype=torch.bfloat16))
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert_same(found, merged(model))


def test_sum_is_whole_when_it_is_made_in_pieces() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"linear": nn.Linear(700, 1900), "turned": Conv1D(500, 1300)})
    assert all(t.nbytes > 2 * CPU_PIECE_BYTES for t in net.parameters() if t.ndim == 2)
    model = peft.get_peft_model(net, peft.LoraConfig(r=5, target_modules=["linear", "turned"]))
    fill(model, 1)
    found = published(plan_module(model))
    for name, tensor in merged(model).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_adapters_count_as_the_layers_use_them_at_each_publish() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["linear"]))
    fill(model, 3)
    part = plan_module(model)
    first = published(part)
    assert_same(first, merged(model))
    model.set_adapter("second")
    second = published(part)
    assert not torch.equal(second["linear.weight"], first["linear.weight"])
    assert_same(second, merged(model))
    model.base_model.set_adapter(["default", "second"])
    assert_same(published(part), merged(model))
    model.base_model.disable_adapter_layers()
    assert_same(published(part), Net().state_dict())
    model.base_model.enable_adapter_layers()
    expected = merged(model)
    model.merge_adapter()
    assert_same(published(part), expected)


def test_part_is_to_be_planned_anew_when_an_adapter_was_added() -> None:
    model = adapted()
    part = plan_module(model)
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["linear"]))
    model.set_adapter("late")
    with pytest.raises(TensorInvalid, match="linear is adapted by late: plan the module again"):
        part.prepare()
    assert_same(published(plan_module(model)), merged(model))


def test_replicas_are_dealt_to_ranks_with_their_adapters() -> None:
    model = adapted()
    found: dict[str, torch.Tensor] = {}
    for rank in range(3):
        part = plan_module(model, rank=rank, world_size=3)
        assert len(part.prepared) == 3
        mine = published(part)
        assert not found.keys() & mine.keys()
        found |= mine
    assert_same(found, merged(model))


def test_adapted_weights_have_another_name_when_the_split_gives_them_one() -> None:
    def split(name: str, shape: tuple[int, ...]) -> list[Window] | None:
        zeros = (0,) * len(shape)
        return [] if name == "embed.weight" else [Window(f"m.{name}", shape, zeros, shape)]

    model = adapted()
    expected = {f"m.{name}": tensor for name, tensor in merged(model).items()}
    del expected["m.embed.weight"]
    assert_same(published(plan_module(model, split=split)), expected)


def test_layer_is_refused_when_it_is_split_and_has_an_adapter() -> None:
    def split(name: str, shape: tuple[int, ...]) -> list[Window] | None:
        half = (shape[0] // 2, *shape[1:])
        return [Window("half", half, (0,) * len(shape), half)] if name == "turned.weight" else None

    with pytest.raises(TensorInvalid, match=r"turned.weight is split, and has an adapter: what an"):
        plan_module(adapted(), split=split)


def test_bases_are_one_layer_when_a_module_has_two_names() -> None:
    net: Any = Net()
    net.again = net.linear
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["linear"], r=2))
    layer: Any = model.base_model.model
    layer.again = layer.linear
    fill(model, 1)
    part = plan_module(model)
    names = [spec.name for spec in part.layout.tensors]
    assert "linear.weight" in names
    assert not any(name.startswith("again.") for name in names)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: adapted(use_dora=True, target_modules=["linear"]), "linear is adapted .* DoRA"),
        (lambda: adapted(lora_bias=True, target_modules=["linear"]), "linear .* has a bias"),
        (lambda: adapted(target_modules=["conv"]), r"conv is adapted by .*lora.layer.Conv1d"),
        (
            lambda: adapted(target_modules=["linear"], trainable_token_indices={"embed": [1]}),
            "embed is (adapted by|wrapped in) .*TrainableTokens",
        ),
        (
            lambda: adapted(target_modules=["linear"], target_parameters=["head.weight"]),
            "head is adapted by .*ParamWrapper",
        ),
        (
            lambda: peft.get_peft_model(Net(), peft.LoHaConfig(target_modules=["linear"])),
            "linear is adapted by peft.tuners.loha",
        ),
        (
            lambda: peft.get_peft_model(Tied(), peft.LoraConfig(target_modules=["head"])),
            "head.weight is tied to embed.weight, and one of them has an adapter",
        ),
    ],
    ids=["dora", "bias", "conv", "tokens", "parameters", "loha", "tied"],
)
@pytest.mark.filterwarnings("ignore")
def test_layer_is_refused_by_name_when_its_adapter_is_not_known(model: Any, named: str) -> None:
    with pytest.raises(TensorInvalid, match=named):
        plan_module(model())


def test_model_is_refused_when_its_prompt_is_learned() -> None:
    model = peft.get_peft_model(
        Qwen3ForCausalLM(Qwen3Config(**TINY)),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(TensorInvalid, match=r"\(the model\) is adapted by PromptTuningConfig"):
        plan_module(model)


def test_layer_is_refused_when_it_was_merged_and_then_disabled() -> None:
    model = adapted()
    part = plan_module(model)
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module._disable_adapters = True
    with pytest.raises(TensorInvalid, match="embed is merged with adapters that are disabled"):
        part.prepare()

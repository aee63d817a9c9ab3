"""Every rank of a Megatron grid gives its boxes: together they are the checkpoint, each once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.producers.assembling import assemble
from tests.unit.producers.megatron_trainer import (
    HEAD,
    HIDDEN,
    VOCABULARY,
    Case,
    checkpoint,
    grids,
    held,
)
from weightbus.producers.errors import TensorInvalid, TrainerInvalid
from weightbus.producers.megatron import MegatronGrid, megatron_shards
from weightbus.producers.sealing import plan_seal
from weightbus.producers.shards import Shard, plan_part

CASES = {
    "alone": Case(),
    "tp": Case(tp=4),
    "fewer groups than ranks": Case(groups=2, tp=4),
    "one group": Case(groups=1, tp=4),
    "no groups": Case(groups=8, tp=2),
    "dp": Case(dp=3),
    "tp dp pp": Case(tp=2, dp=2, pp=2),
    "transformer engine": Case(tp=2, grouped=True),
    "experts": Case(experts=4),
    "ep": Case(experts=4, ep=2, tp=2),
    "ep in dp": Case(experts=4, ep=2, dp=4),
    "etp": Case(experts=6, ep=3, etp=2, tp=2, dp=3),
    "etp over tp": Case(experts=4, etp=4, tp=2, dp=2),
    "everything": Case(
        groups=2, experts=4, tp=4, dp=4, pp=2, ep=2, etp=2, grouped=True, shared=True
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ranks_give_the_checkpoint_once_when_they_stand_in_a_grid(case: Case) -> None:
    whole = checkpoint(case)
    ranks = [
        megatron_shards(held(case, whole, grid, stage), grid, skip=())
        for grid, stage in grids(case)
    ]
    found = assemble(shard for shards in ranks for shard in shards)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name
    plan_seal([plan_part(shards).layout for shards in ranks])


def test_replicas_share_the_bytes_when_there_are_several() -> None:
    case = Case(dp=4, experts=4, ep=2)
    whole = checkpoint(case)
    shards = [megatron_shards(held(case, whole, grid, stage), grid) for grid, stage in grids(case)]
    sizes = [sum(shard.tensor.nbytes for shard in rank) for rank in shards]
    largest = max(tensor.nbytes for tensor in whole.values())
    assert max(sizes) - min(sizes) <= 2 * largest, sizes
    assert sum(sizes) == sum(tensor.nbytes for tensor in whole.values())


def test_shards_alias_the_parameters_when_they_are_planned() -> None:
    tensors = held(Case(), checkpoint(Case()), GRID, 0)
    shards = megatron_shards(tensors, GRID)
    for tensor in tensors.values():
        tensor.fill_(3)
    assert all(bool((shard.tensor == 3).all()) for shard in shards)


GRID = MegatronGrid(query_heads=8, kv_heads=4, head_dim=HEAD, vocab_size=VOCABULARY)


class Chunk(torch.nn.Module):
    """Of a pipeline: layers that know their numbers in the whole model."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.decoder = torch.nn.Module()
        layers = []
        for number in numbers:
            layer = torch.nn.Module()
            layer.layer_number = number  # type: ignore[assignment]
            layer.input_layernorm = torch.nn.RMSNorm(HIDDEN)
            torch.nn.init.constant_(layer.input_layernorm.weight, number)
            layer.mlp = torch.nn.Module()
            layer.mlp.router = torch.nn.Module()
            layer.mlp.router.register_buffer("expert_bias", torch.ones(4))
            layer.mlp.router.register_buffer("counts", torch.ones(4), persistent=False)
            layers.append(layer)
        self.decoder.layers = torch.nn.ModuleList(layers)


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_layers_have_their_own_numbers_when_chunks_of_a_pipeline_are_given() -> None:
    chunks = [Wrapper(Wrapper(Chunk(2, 3))), Wrapper(Chunk(6))]
    found = assemble(megatron_shards(chunks, GRID))
    norms = {f"model.layers.{n}.input_layernorm.weight": n + 1 for n in (1, 2, 5)}
    biases = {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2, 5)}
    assert found.keys() == norms.keys() | biases
    for name, value in norms.items():
        assert bool((found[name] == value).all()), name


def test_copy_of_the_embeddings_is_left_out_when_they_are_tied() -> None:
    embeddings = {"output_layer.weight": torch.zeros(24, HIDDEN)}
    assert megatron_shards(embeddings, replace(GRID, tied_embeddings=True)) == []
    embeddings["output_layer.weight"].shared_embedding = True  # type: ignore[attr-defined]
    assert megatron_shards(embeddings, GRID) == []


def test_names_are_the_callers_when_it_renames_or_skips() -> None:
    tensors = {
        "decoder.final_layernorm.weight": torch.zeros(HIDDEN),
        "mtp.layers.0.eh_proj.weight": torch.zeros(2, 2),
        "decoder.layers.0.self_attention.core_attention._extra_state": torch.zeros(1),
    }
    (shard,) = megatron_shards(tensors, GRID, skip="mtp.", rename=lambda name: f"language.{name}")
    assert isinstance(shard, Shard)
    assert shard.name == "language.model.norm.weight"


@pytest.mark.parametrize(
    ("name", "shape", "limit"),
    [
        ("decoder.layers.0.self_attention.linear_q_proj.weight", (4, 4), "not known"),
        ("decoder.layers.0.mlp.experts.weight1", (4, 4), "not known"),
        ("embedding.position_embeddings.weight", (4, 4), "skip="),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (16, 4), "32 in all"),
        ("decoder.layers.0.self_attention.linear_proj.weight", (4, 8), "16 in all"),
        ("decoder.layers.0.mlp.linear_fc1.weight", (7, 4), "gate and up"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight0", (8, 4), "this rank holds 0"),
        ("output_layer.weight", (20, 4), "21 or more"),
    ],
)
def test_tensor_is_refused_by_its_name_when_it_is_not_known_or_of_another_shape(
    name: str, shape: tuple[int, ...], limit: str
) -> None:
    with pytest.raises(TensorInvalid, match=limit) as caught:
        megatron_shards({name: torch.zeros(shape)}, GRID)
    assert caught.value.tensor == name


def test_model_is_refused_when_it_is_no_gpt_model() -> None:
    with pytest.raises(TrainerInvalid, match="of type Linear: must be a GPTModel"):
        megatron_shards(Wrapper(torch.nn.Linear(1, 1)), GRID)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"tp_rank": 2, "tp_size": 2}, "tp_rank of a Megatron grid is 2: 0 to 1"),
        ({"edp_rank": -1}, "edp_rank of a Megatron grid is -1"),
        ({"vocab_size": 0}, "vocab_size of a Megatron grid is 0: at least 1"),
        ({"kv_heads": 3}, "query_heads of a Megatron grid is 8: must divide by 3"),
        ({"tp_size": 5}, "is 32: must divide by 5"),
        ({"experts": 3, "ep_size": 2}, "experts of a Megatron grid is 3: must divide by 2"),
    ],
)
def test_grid_is_refused_when_it_does_not_add_up(changes: dict[str, int], limit: str) -> None:
    with pytest.raises(TrainerInvalid, match=limit):
        replace(GRID, **changes)  # type: ignore[arg-type]

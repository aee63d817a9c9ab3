"""Every rank of a Megatron grid gives its boxes: together they are the checkpoint, each once.

Its side is built here as its modules use it: `SelfAttention` views what `linear_qkv` makes as
(groups, heads of a group, head_dim), and `MLP` chunks what `linear_fc1` makes in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from tests.unit.producers.assembling import assemble
from weightbus.producers.errors import TensorInvalid, TrainerInvalid
from weightbus.producers.megatron import MegatronGrid, megatron_shards
from weightbus.producers.sealing import plan_seal
from weightbus.producers.shards import Shard, plan_part

HIDDEN, INNER, EXPERT_INNER, HEAD, VOCABULARY, LAYERS = 6, 24, 8, 2, 21, 2
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Case:
    queries: int = 8
    groups: int = 4
    experts: int = 0
    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    grouped: bool = False
    """Names of `TEGroupedMLP` and fused norms, as with Transformer Engine."""
    shared: bool = False


def checkpoint(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": random(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in NORMS:
            found[f"{prefix}{norm}.weight"] = random(HEAD if "attn" in norm else HIDDEN)
        for name, heads in (("q", case.queries), ("k", case.groups), ("v", case.groups)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = random(heads * HEAD, HIDDEN)
            found[f"{prefix}self_attn.{name}_proj.bias"] = random(heads * HEAD)
        found[f"{prefix}self_attn.o_proj.weight"] = random(HIDDEN, case.queries * HEAD)
        mlps = {f"{prefix}mlp.": INNER}
        if case.experts:
            mlps = {f"{prefix}mlp.experts.{n}.": EXPERT_INNER for n in range(case.experts)}
            found[f"{prefix}mlp.gate.weight"] = random(case.experts, HIDDEN)
            found[f"{prefix}mlp.gate.e_score_correction_bias"] = random(case.experts)
        if case.shared:
            mlps[f"{prefix}mlp.shared_expert."] = INNER
            found[f"{prefix}mlp.shared_expert_gate.weight"] = random(1, HIDDEN)
        for mlp, inner in mlps.items():
            found[f"{mlp}gate_proj.weight"] = random(inner, HIDDEN)
            found[f"{mlp}up_proj.weight"] = random(inner, HIDDEN)
            found[f"{mlp}down_proj.weight"] = random(HIDDEN, inner)
    return found


def grids(case: Case) -> Iterator[tuple[MegatronGrid, int]]:
    """(grid, pipeline stage) of every rank, in Megatron's order tp-dp-pp and etp-ep-edp-pp."""
    of_stage = case.tp * case.dp
    edp = of_stage // (case.etp * case.ep)
    assert edp * case.etp * case.ep == of_stage
    for stage in range(case.pp):
        for rank in range(of_stage):
            yield (
                MegatronGrid(
                    query_heads=case.queries,
                    kv_heads=case.groups,
                    head_dim=HEAD,
                    vocab_size=VOCABULARY,
                    experts=case.experts,
                    layer_offset=stage * LAYERS // case.pp,
                    tp_rank=rank % case.tp,
                    tp_size=case.tp,
                    dp_rank=rank // case.tp,
                    dp_size=case.dp,
                    etp_rank=rank % case.etp,
                    etp_size=case.etp,
                    ep_rank=rank // case.etp % case.ep,
                    ep_size=case.ep,
                    edp_rank=rank // (case.etp * case.ep),
                    edp_size=edp,
                ),
                stage,
            )


def gated(whole: dict[str, torch.Tensor], mlp: str, rank: int, size: int) -> torch.Tensor:
    halves = (whole[f"{mlp}{half}_proj.weight"].chunk(size)[rank] for half in ("gate", "up"))
    return torch.cat(tuple(halves))


def held(
    case: Case, whole: dict[str, torch.Tensor], grid: MegatronGrid, stage: int
) -> dict[str, torch.Tensor]:
    """What a rank has, by Megatron's names."""
    found: dict[str, torch.Tensor] = {}
    padded = -(-VOCABULARY // (8 * case.tp)) * 8 * case.tp

    def vocabulary(name: str) -> torch.Tensor:
        tail = torch.full((padded - VOCABULARY, HIDDEN), torch.nan)
        return torch.cat([whole[name], tail]).chunk(case.tp)[grid.tp_rank].clone()

    if stage == 0:
        found["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight")
    for layer in range(LAYERS // case.pp):
        here = f"decoder.layers.{layer}."
        there = f"model.layers.{layer + grid.layer_offset}."
        te = case.grouped
        for norm, name in (
            (
                NORMS[0],
                "self_attention.linear_qkv.layer_norm_weight" if te else f"{NORMS[0]}.weight",
            ),
            (
                NORMS[1],
                "mlp.linear_fc1.layer_norm_weight"
                if te and not case.experts
                else "pre_mlp_layernorm.weight",
            ),
            (NORMS[2], "self_attention.q_layernorm.weight"),
            (NORMS[3], "self_attention.k_layernorm.weight"),
        ):
            found[here + name] = whole[f"{there}{norm}.weight"]
        for kind in ("weight", "bias"):
            groups = [
                whole[f"{there}self_attn.{name}_proj.{kind}"].chunk(case.groups) for name in "qkv"
            ]
            mixed = torch.cat([part for group in zip(*groups, strict=True) for part in group])
            found[f"{here}self_attention.linear_qkv.{kind}"] = mixed.chunk(case.tp)[grid.tp_rank]
        found[f"{here}self_attention.linear_proj.weight"] = whole[
            f"{there}self_attn.o_proj.weight"
        ].chunk(case.tp, 1)[grid.tp_rank]
        mlps = {"mlp.": "mlp."} if not case.experts else {}
        if case.shared:
            mlps["mlp.shared_experts."] = "mlp.shared_expert."
            found[f"{here}mlp.shared_experts.gate_weight"] = whole[
                f"{there}mlp.shared_expert_gate.weight"
            ]
        for ours, theirs in mlps.items():
            found[f"{here}{ours}linear_fc1.weight"] = gated(
                whole, there + theirs, grid.tp_rank, case.tp
            )
            down = whole[f"{there}{theirs}down_proj.weight"].chunk(case.tp, 1)[grid.tp_rank]
            found[f"{here}{ours}linear_fc2.weight"] = down
        if case.experts:
            found[f"{here}mlp.router.weight"] = whole[f"{there}mlp.gate.weight"]
            bias = whole[f"{there}mlp.gate.e_score_correction_bias"]
            found[f"{here}mlp.router.expert_bias"] = bias
            number = case.experts // case.ep
            for expert in range(number):
                mlp = f"{there}mlp.experts.{grid.ep_rank * number + expert}."
                name = f"{here}mlp.experts.local_experts.{expert}.{{}}.weight"
                if te:
                    name = f"{here}mlp.experts.{{}}.weight{expert}"
                found[name.format("linear_fc1")] = gated(whole, mlp, grid.etp_rank, case.etp)
                down = whole[f"{mlp}down_proj.weight"].chunk(case.etp, 1)[grid.etp_rank]
                found[name.format("linear_fc2")] = down
    if stage == case.pp - 1:
        found["decoder.final_layernorm.weight"] = whole["model.norm.weight"]
        found["output_layer.weight"] = vocabulary("lm_head.weight")
    return found


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

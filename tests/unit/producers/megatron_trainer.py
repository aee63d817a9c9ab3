"""What the ranks of a Megatron trainer hold of a checkpoint, built from the checkpoint.

As its modules use it: `SelfAttention` views what `linear_qkv` makes as (groups, heads of a group,
head_dim), and `MLP` chunks what `linear_fc1` makes in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from weightbus.producers.megatron import MegatronGrid

__all__ = ("HEAD", "HIDDEN", "VOCABULARY", "Case", "checkpoint", "grids", "held")

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

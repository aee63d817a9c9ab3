"""Name and shape of a tensor of Megatron's GPT model -> where the checkpoint's lie in it. Pure.

Sources of the formulas: `SelfAttention.get_query_key_value_tensors` and `MLP.forward` of
megatron-core; models of it were compared with Qwen3 by their logits (docs/trainers.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import torch

from weightbus.producers.errors import TensorInvalid
from weightbus.producers.fused import Window
from weightbus.producers.megatron_grid import MegatronGrid
from weightbus.producers.shards import Shard

__all__ = ("LAYER", "boxes_of")

LAYER: Final = re.compile(r"decoder\.layers\.(\d+)\.")

_ALIKE: Final = {
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
"""What all tensor parallel ranks hold whole; of a layer without its prefix."""

_ROWS: Final = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Of the padded vocabulary, cut over tensor parallel ranks."""

_COLUMNS: Final = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight",
}

_QKV: Final = re.compile(r"self_attention\.linear_qkv\.(weight|bias)")
_GATED: Final = {"mlp.linear_fc1": "mlp", "mlp.shared_experts.linear_fc1": "mlp.shared_expert"}
_EXPERT: Final = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<one>\d+)\.(?P<a>linear_fc[12])\.weight"
    r"|(?P<b>linear_fc[12])\.weight(?P<grouped>\d+))"
)


def boxes_of(
    name: str, layer: int | None, tensor: torch.Tensor, grid: MegatronGrid
) -> tuple[Shard | None, Sequence[Window], bool]:
    """The rank's box of a tensor as all ranks hold it, the checkpoint's in it; is it an expert's?

    Args:
        layer: number of its layer in the whole model.

    Raises:
        TensorInvalid: the name is not known, or the shape is not what the grid says.
    """
    if type(tensor.data) is not torch.Tensor:
        value = f"of type {type(tensor.data).__qualname__}"
        raise TensorInvalid(name, value, "must be a plain tensor (no FP8 parameters, no DTensor)")
    prefix = "" if layer is None else f"model.layers.{layer}."
    local = name if layer is None else name[LAYER.match(name).end() :]  # type: ignore[union-attr]
    if local in _ALIKE:
        shape, zeros = tuple(tensor.shape), (0,) * tensor.ndim
        window = Window(prefix + _ALIKE[local], shape, zeros, shape)
        return (Shard(name, tensor) if grid.tp_rank == 0 else None), (window,), False
    tp = grid.tp_rank, grid.tp_size
    if local in _ROWS:
        return *_vocabulary(name, _ROWS[local], tensor, grid), False
    if local in _COLUMNS:
        columns = grid.query_heads * grid.head_dim if "attention" in local else None
        return *_columns(name, prefix + _COLUMNS[local], tensor, tp, columns), False
    if found := _QKV.fullmatch(local):
        return *_qkv(name, f"{prefix}self_attn", found[1], tensor, grid), False
    base, _, kind = local.rpartition(".")
    if base in _GATED and kind in ("weight", "bias"):
        return *_gated(name, prefix + _GATED[base], kind, tensor, tp), False
    if found := _EXPERT.fullmatch(local):
        here = grid.experts // grid.ep_size
        number = int(found["one"] or found["grouped"])
        if number >= here:
            raise TensorInvalid(name, f"of expert {number} here", f"this rank holds {here}")
        target = f"{prefix}mlp.experts.{grid.ep_rank * here + number}"
        etp = grid.etp_rank, grid.etp_size
        if (found["a"] or found["b"]) == "linear_fc1":
            return *_gated(name, target, "weight", tensor, etp), True
        return *_columns(name, f"{target}.down_proj.weight", tensor, etp, None), True
    limit = "give it as a Shard of your own, with its name in skip="
    raise TensorInvalid(name, f"{tuple(tensor.shape)}, of a kind that is not known here", limit)


def _vocabulary(
    name: str, target: str, tensor: torch.Tensor, grid: MegatronGrid
) -> tuple[Shard, Sequence[Window]]:
    rows, *rest = tensor.shape
    padded = rows * grid.tp_size
    if padded < grid.vocab_size:
        raise TensorInvalid(name, f"of {padded} rows on all ranks", f"{grid.vocab_size} or more")
    shape, zeros = (grid.vocab_size, *rest), (0,) * tensor.ndim
    return _of_rows(name, tensor, grid.tp_rank, padded), (Window(target, shape, zeros, shape),)


def _columns(
    name: str, target: str, tensor: torch.Tensor, place: tuple[int, int], columns: int | None
) -> tuple[Shard, Sequence[Window]]:
    rank, size = place
    rows, here = tensor.shape
    if columns not in (None, here * size):
        raise TensorInvalid(name, f"of {here} columns on {size} ranks", f"{columns} in all")
    shape = (rows, here * size)
    return Shard(name, tensor, shape, (0, rank * here)), (Window(target, shape, (0, 0), shape),)


def _qkv(
    name: str, target: str, kind: str, tensor: torch.Tensor, grid: MegatronGrid
) -> tuple[Shard, Sequence[Window]]:
    """Groups of heads one after the other, in each its queries, key and value; ranks cut the rows
    into equal runs, also through a group (fewer groups than ranks)."""
    rows, *rest = tensor.shape
    if rows * grid.tp_size != grid.qkv_rows:
        value = f"of {rows} rows on each of {grid.tp_size} ranks"
        raise TensorInvalid(name, value, f"{grid.qkv_rows} in all, by its heads")
    keys, queries = grid.head_dim, grid.query_heads // grid.kv_heads * grid.head_dim
    zeros = (0,) * len(rest)
    windows = []
    for group in range(grid.kv_heads):
        start = group * (queries + 2 * keys)
        for head, size in (("q", queries), ("k", keys), ("v", keys)):
            windows.append(
                Window(
                    f"{target}.{head}_proj.{kind}",
                    (grid.kv_heads * size, *rest),
                    (start, *zeros),
                    (size, *rest),
                    (group * size, *zeros),
                )
            )
            start += size
    return _of_rows(name, tensor, grid.tp_rank, grid.qkv_rows), windows


def _gated(
    name: str, target: str, kind: str, tensor: torch.Tensor, place: tuple[int, int]
) -> tuple[Shard, Sequence[Window]]:
    """Every rank holds its rows of gate, then its rows of up."""
    rank, size = place
    rows, *rest = tensor.shape
    if rows % 2:
        raise TensorInvalid(name, f"of {rows} rows", "must be gate and up, alike")
    half = rows // 2
    shape, zeros = (half * size, *rest), (0,) * len(rest)
    windows = [
        Window(
            f"{target}.{half_name}.{kind}",
            shape,
            (rank * rows + number * half, *zeros),
            (half, *rest),
            (rank * half, *zeros),
        )
        for number, half_name in enumerate(("gate_proj", "up_proj"))
    ]
    return _of_rows(name, tensor, rank, rows * size), windows


def _of_rows(name: str, tensor: torch.Tensor, rank: int, rows: int) -> Shard:
    here, *rest = tensor.shape
    return Shard(name, tensor, (rows, *rest), (rank * here, *(0,) * len(rest)))

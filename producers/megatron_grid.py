"""Where a rank of a Megatron trainer stands, and what its model measures. Talks to no rank."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from weightbus.producers.errors import TrainerInvalid

__all__ = ("MegatronGrid", "grid_of")


@dataclass(frozen=True, kw_only=True)
class MegatronGrid:
    """Where a rank stands, and what its model measures."""

    query_heads: int
    """`num_attention_heads`."""
    kv_heads: int
    """`num_query_groups`."""
    head_dim: int
    """`kv_channels`."""
    vocab_size: int
    """Of the checkpoint: Megatron pads its own."""
    experts: int = 0
    """Of a layer, on all ranks; 0: the model has none."""
    layer_offset: int = 0
    """Number of the first layer here, where only names are given; modules know their own."""
    tied_embeddings: bool = False
    """The last stage's `output_layer` is a copy of the first one's embeddings: left out."""
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    """Among the ranks that hold the same of all but experts: data and context parallel."""
    dp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    """Tensor parallelism within experts."""
    etp_size: int = 1
    edp_rank: int = 0
    """Among the ranks that hold the same of the same experts."""
    edp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "ep", "etp", "edp"):
            rank, size = getattr(self, f"{name}_rank"), getattr(self, f"{name}_size")
            if not 0 <= rank < size:
                raise TrainerInvalid(f"{name}_rank of a Megatron grid", rank, f"0 to {size - 1}")
        for field in fields(self)[:4]:
            if (value := getattr(self, field.name)) < 1:
                raise TrainerInvalid(f"{field.name} of a Megatron grid", value, "at least 1")
        for name, value, by in (
            ("query_heads", self.query_heads, self.kv_heads),
            ("rows of qkv", self.qkv_rows, self.tp_size),
            ("rows of all query heads", self.query_heads * self.head_dim, self.tp_size),
            ("experts", self.experts, self.ep_size),
        ):
            if value % by != 0:
                raise TrainerInvalid(f"{name} of a Megatron grid", value, f"must divide by {by}")

    @property
    def qkv_rows(self) -> int:
        """Of `linear_qkv` on all ranks."""
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim


_REFUSED: Final = (
    ("multi_latent_attention", "its projections are not known here"),
    ("attention_output_gate", "its rows are not known here"),
    ("rotary_interleaved", "the checkpoint's heads are in another order"),
    ("layernorm_zero_centered_gamma", "the checkpoint's norms are greater by one"),
    ("moe_mlp_glu_interleave_size", "gate and up are interleaved"),
    ("moe_shared_expert_glu_interleave_size", "gate and up are interleaved"),
    ("moe_single_grouped_weight", "experts are stacked"),
)


def grid_of(config: Any, *, vocab_size: int, tied_embeddings: bool = False) -> MegatronGrid:
    """The grid of this process, of megatron-core's `parallel_state`, which must be initialised.

    Args:
        config: the model's `TransformerConfig`.
        vocab_size: of the checkpoint, without padding.
        tied_embeddings: the model's `share_embeddings_and_output_weights`.

    Raises:
        TrainerInvalid: megatron-core is not there, or the model is of a kind that is not known.
    """
    try:
        from megatron.core import parallel_state as ranks
    except ImportError as error:
        raise TrainerInvalid("megatron-core", f"not usable ({error})", "0.16 or later") from error
    for option, reason in _REFUSED:
        if (value := getattr(config, option, None)) not in (None, False):
            raise TrainerInvalid(f"{option} of the model", value, f"not supported: {reason}")
    if getattr(config, "gtp_weight_remat_size", 1) not in (None, 1):
        value, limit = config.gtp_weight_remat_size, "not supported: weights are cut further"
        raise TrainerInvalid("gtp_weight_remat_size of the model", value, limit)
    if not config.gated_linear_unit:
        raise TrainerInvalid("gated_linear_unit of the model", False, "must be true: gate and up")
    return MegatronGrid(
        query_heads=config.num_attention_heads,
        kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=vocab_size,
        experts=config.num_moe_experts or 0,
        tied_embeddings=tied_embeddings,
        tp_rank=ranks.get_tensor_model_parallel_rank(),
        tp_size=ranks.get_tensor_model_parallel_world_size(),
        dp_rank=ranks.get_data_parallel_rank(with_context_parallel=True),
        dp_size=ranks.get_data_parallel_world_size(with_context_parallel=True),
        ep_rank=ranks.get_expert_model_parallel_rank(),
        ep_size=ranks.get_expert_model_parallel_world_size(),
        etp_rank=ranks.get_expert_tensor_parallel_rank(),
        etp_size=ranks.get_expert_tensor_parallel_world_size(),
        edp_rank=ranks.get_expert_data_parallel_rank(),
        edp_size=ranks.get_expert_data_parallel_world_size(),
    )

"""Tensor-parallel layers with the fused, sliced and padded parameters of the large engines.

Does no I/O but the collectives of `TensorParallel`. Sizes given to a layer are those of the whole
model; a layer keeps its rank's share. Parameters are created unset, on the current default device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from weightbus.consumers.engines.torch.parallel import TensorParallel
from weightbus.consumers.engines.torch.parameter import Shard, ShardedParameter, Window
from weightbus.consumers.errors import PlanError

__all__ = (
    "ColumnParallelLinear",
    "FusedExperts",
    "LayerNorm",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RMSNorm",
    "ReplicatedEmbedding",
    "ReplicatedLinear",
    "RepackedRowParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
)

VOCAB_PADDING = 64
"""The vocabulary is padded to a multiple of this, as in vLLM, and of the ranks."""


class _Linear(nn.Module):
    """y = x W^T + b with W of [output, input], cut by rows: `windows` holds for weight and bias."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        windows: Mapping[Shard, Window] | None,
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight = ShardedParameter.of((output_size, input_size), dtype, windows)
        self.bias = ShardedParameter.of((output_size,), dtype, windows) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class ReplicatedLinear(_Linear):
    """Every rank holds all of it."""

    def __init__(
        self, input_size: int, output_size: int, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(input_size, output_size, None, bias=bias, dtype=dtype)


class MergedColumnParallelLinear(_Linear):
    """Several linear layers over one input, fused and each cut by rows; shards are 0, 1, ..."""

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        parallel: TensorParallel,
    ) -> None:
        windows: dict[Shard, Window] = {}
        start = 0
        for shard, total in enumerate(output_sizes):
            size = parallel.share(total, "output size")
            windows[shard] = Window(0, total, parallel.rank * size, start, size)
            start += size
        super().__init__(input_size, start, windows, bias=bias, dtype=dtype)


class ColumnParallelLinear(_Linear):
    """Cut by rows: every rank computes its share of the outputs."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        parallel: TensorParallel,
    ) -> None:
        size = parallel.share(output_size, "output size")
        windows: dict[Shard, Window] = {None: Window(0, output_size, parallel.rank * size, 0, size)}
        super().__init__(input_size, size, windows, bias=bias, dtype=dtype)


class QKVParallelLinear(_Linear):
    """Query, key and value of grouped-query attention in one layer; shards are "q", "k", "v".

    With fewer key-value heads than ranks each of them is held by `ranks / kv heads` ranks.
    """

    def __init__(
        self,
        input_size: int,
        head_size: int,
        query_heads: int,
        kv_heads: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        parallel: TensorParallel,
    ) -> None:
        self.head_size = head_size
        self.query_heads = parallel.share(query_heads, "number of query heads")
        if kv_heads >= parallel.size:
            self.kv_heads, replicas = parallel.share(kv_heads, "number of kv heads"), 1
        elif parallel.size % kv_heads:
            raise PlanError("number of kv heads", kv_heads, f"must divide {parallel.size} ranks")
        else:
            self.kv_heads, replicas = 1, parallel.size // kv_heads
        query, kv = self.query_heads * head_size, self.kv_heads * head_size
        kv_source, kv_total = parallel.rank // replicas * kv, kv_heads * head_size
        windows: dict[Shard, Window] = {
            "q": Window(0, query_heads * head_size, parallel.rank * query, 0, query),
            "k": Window(0, kv_total, kv_source, query, kv),
            "v": Window(0, kv_total, kv_source, query + kv, kv),
        }
        super().__init__(input_size, query + 2 * kv, windows, bias=bias, dtype=dtype)

    def attention_inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., tokens, input] -> query, key and value of this rank: [..., tokens, heads, head]."""
        query, key, value = self(x).split(
            [n * self.head_size for n in (self.query_heads, self.kv_heads, self.kv_heads)], dim=-1
        )
        return (
            query.unflatten(-1, (self.query_heads, self.head_size)),
            key.unflatten(-1, (self.kv_heads, self.head_size)),
            value.unflatten(-1, (self.kv_heads, self.head_size)),
        )


class RowParallelLinear(nn.Module):
    """Cut by columns: every rank multiplies its share of the inputs; the products are summed."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        size = parallel.share(input_size, "input size")
        windows: dict[Shard, Window] = {None: Window(1, input_size, parallel.rank * size, 0, size)}
        self._parallel = parallel
        self.weight = ShardedParameter.of((output_size, size), dtype, windows)
        self.bias = ShardedParameter.of((output_size,), dtype) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._parallel.all_reduce(self._product(x))
        return y if self.bias is None else y + self.bias

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class RepackedRowParallelLinear(RowParallelLinear):
    """Keeps its weight in another order than it was loaded in, in the same shape: even rows first.

    It stands for the CPU and MoE kernels that do so: only the values tell the orders apart.
    """

    def process_weights_after_loading(self) -> None:
        """Turn the weight from the checkpoint's order into this layer's. Once after every load."""
        with torch.no_grad():
            self.weight.copy_(torch.cat((self.weight[0::2], self.weight[1::2])))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        even, odd = F.linear(x, self.weight).chunk(2, dim=-1)
        return torch.stack((even, odd), dim=-1).flatten(-2)


class VocabParallelEmbedding(nn.Module):
    """Cut by vocabulary; rows beyond the checkpoint's vocabulary are padding and hold 0."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, parallel: TensorParallel
    ) -> None:
        super().__init__()
        multiple = math.lcm(VOCAB_PADDING, parallel.size)
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // multiple) * multiple // parallel.size
        self.first = parallel.rank * self.rows
        held = max(0, min(self.rows, vocab_size - self.first))
        source = min(self.first, vocab_size)
        windows: dict[Shard, Window] = {
            None: Window(0, vocab_size, source, 0, held, padding=self.rows - held)
        }
        self._parallel = parallel
        self.weight = ShardedParameter.of((self.rows, hidden_size), dtype, windows)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[...] token ids -> [..., hidden]."""
        if self._parallel.size == 1:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.first) | (tokens >= self.first + self.rows)
        here = (tokens - self.first).masked_fill(elsewhere, 0)
        hidden = F.embedding(here, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self._parallel.all_reduce(hidden)


class ParallelLMHead(VocabParallelEmbedding):
    """Scores every token of the vocabulary; its weight may be tied to an embedding's."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., vocabulary], on every rank."""
        scores = self._parallel.all_gather(F.linear(hidden, self.weight))
        return scores[..., : self.vocab_size]


class ReplicatedEmbedding(nn.Module):
    """A small table that every rank holds whole."""

    def __init__(self, rows: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = ShardedParameter.of((rows, hidden_size), dtype)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return F.embedding(index, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self._eps = eps
        self.weight = ShardedParameter.of((hidden_size,), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class LayerNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self._eps = eps
        self.weight = ShardedParameter.of((hidden_size,), dtype)
        self.bias = ShardedParameter.of((hidden_size,), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)


class FusedExperts(nn.Module):
    """All experts of a mixture in two stacked parameters, as vLLM keeps them.

    `w13_weight` is [experts, gate and up rows, hidden], `w2_weight` [experts, hidden, columns],
    each expert cut like a `MergedColumnParallelLinear` and a `RowParallelLinear`. Shards are (name,
    expert) with the names "w1" (gate), "w3" (up) and "w2" (down).

    With `expert_parallel` every rank holds its share of the experts, each of them whole.
    """

    def __init__(
        self,
        experts: int,
        experts_per_token: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        dtype: torch.dtype,
        parallel: TensorParallel,
        expert_parallel: bool = False,
    ) -> None:
        super().__init__()
        if experts_per_token > experts:
            raise PlanError("experts per token", experts_per_token, f"at most {experts}")
        self.held = range(experts)
        """Numbers of the experts that this rank holds something of."""
        self._experts_per_token = experts_per_token
        self._parallel = parallel
        if expert_parallel:
            count = parallel.share(experts, "number of experts")
            self.held = range(parallel.rank * count, (parallel.rank + 1) * count)
            first, size = 0, intermediate_size
        else:
            size = parallel.share(intermediate_size, "intermediate size of an expert")
            first = parallel.rank * size
        w13: dict[Shard, Window] = {}
        w2: dict[Shard, Window] = {}
        for place, expert in enumerate(self.held):
            w13["w1", expert] = Window(0, intermediate_size, first, 0, size, place=place)
            w13["w3", expert] = Window(0, intermediate_size, first, size, size, place=place)
            w2["w2", expert] = Window(1, intermediate_size, first, 0, size, place=place)
        self.w13_weight = ShardedParameter.of((len(self.held), 2 * size, hidden_size), dtype, w13)
        self.w2_weight = ShardedParameter.of((len(self.held), hidden_size, size), dtype, w2)

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] and the router's [tokens, experts] -> [tokens, hidden]."""
        shares, chosen = scores.softmax(dim=-1).topk(self._experts_per_token, dim=-1)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(x)
        for place, expert in enumerate(self.held):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.w13_weight[place]).chunk(2, dim=-1)
            down = F.linear(F.silu(gate) * up, self.w2_weight[place])
            y = y.index_add(0, token, down * shares[token, slot].unsqueeze(-1))
        return self._parallel.all_reduce(y)

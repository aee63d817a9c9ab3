"""A trainer of several ranks: trains a small decoder with FSDP2, and publishes it as it goes.

    torchrun --nproc-per-node 2 examples/fsdp_trainer.py [VERSIONS [MODEL]]

needs nothing else: rank 0 starts a bus and two engines that follow (`followers.py`), and shows each
version in both, proven. Where WEIGHTBUS_NATS_URL names a bus, the engines on that bus follow; these
are started, and watched, in other terminals by

    weightbus consume --model fsdp --engine-id a --architecture decoder \\
        --config "$(python examples/fsdp_trainer.py --config)"
    weightbus watch

Every rank publishes the rows that it holds, FP32 cast to BF16 on the way; nothing is gathered. Kill
a rank (each says its process id): the others give up the version that was under way, and
`weightbus watch` shows which, and who is missing.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from followers import running_followers
from msgspec import structs
from torch import nn
from torch.distributed.fsdp import fully_shard

from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.ending import Ending
from weightbus.producers.modules import plan_module
from weightbus.producers.publisher import PublisherOptions

STEPS = 30
"""Between two versions."""
COLLECTIVE_S = 300.0
"""After it a collective fails: other ranks wait while rank 0 starts engines."""
SEAL_S = 20.0
OWN_BUS_S = 5.0

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, GROUPS, HEAD = 100, 64, 128, 2, 4, 2, 16
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "dtype": "BF16",
}
"""Of the engines that follow."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(HIDDEN, GROUPS * HEAD, bias=False)
        self.v_proj = nn.Linear(HIDDEN, GROUPS * HEAD, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, HEAD)).transpose(-2, -3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            rotated(query), rotated(key), value, is_causal=True, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(-2, -3).flatten(-2))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [..., tokens, head]."""
    step = torch.arange(0, HEAD, 2) / HEAD
    angle = torch.outer(torch.arange(x.shape[-2]), 10_000.0**-step)
    left, right = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.mlp = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Of the Qwen and Llama kind, with their names, by which engines load it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(VOCABULARY, HIDDEN),
                "layers": nn.ModuleList(Layer() for _ in range(LAYERS)),
                "norm": nn.RMSNorm(HIDDEN, eps=1e-6),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., tokens] ids -> [..., tokens, vocabulary] scores of the token that follows each."""
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        return self.lm_head(self.model["norm"](x))


def train(network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Some steps on sequences that count: 3 7 11 15 ..., with other ones on every rank."""
    loss = torch.zeros(())
    for _ in range(STEPS):
        start, step = torch.randint(1, 20, (2, 16, 1))
        tokens = (start + step * torch.arange(24)) % VOCABULARY
        loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def agreed(url: str) -> str:
    """Rank 0's, on every rank."""
    text = torch.zeros(4096, dtype=torch.uint8)
    encoded = torch.tensor(list(url.encode()), dtype=torch.uint8)
    text[: len(encoded)] = encoded
    dist.broadcast(text, 0)
    return bytes(text.tolist()).rstrip(b"\0").decode()


def main(versions: int = 5, model: str = "fsdp") -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_S))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank} of {world_size} is process {os.getpid()}", flush=True)
    torch.manual_seed(0)  # every rank begins with the same weights ...
    network = Decoder()
    for layer in network.model["layers"]:
        fully_shard(layer)
    fully_shard(network)  # ... and keeps its rows of them
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    torch.manual_seed(rank)

    with ExitStack() as stack:
        url, followers = os.environ.get("WEIGHTBUS_NATS_URL", ""), None
        if rank == 0:
            followers = stack.enter_context(running_followers(model, CONFIG, url))
            url = followers.url
        settings = BusSettings.from_env(os.environ)
        if settings.url is None:  # what rank 0 runs ends with it: no use to wait for long
            settings = structs.replace(settings, url=agreed(url), reconnect_for_s=OWN_BUS_S)
        options = PublisherOptions(seal_timeout_s=SEAL_S)
        publisher = BlockingPublisher(
            settings, model, rank=rank, world_size=world_size, options=options
        )
        with publisher, Ending(publisher) as ending:  # says so, too, when SIGTERM ends this rank
            part = plan_module(network, rank=rank, world_size=world_size, dtype=torch.bfloat16)
            ending.coming = max(publisher.newest_version(), 0) + 1  # started again, it goes on
            try:
                for _ in range(versions):
                    loss = train(network, optimizer)
                    ready = publisher.publish(part, ending.coming)
                    ending.coming += 1
                    if followers is not None:
                        print(f"version {ready.version}: loss {loss:.3f}, {ready.weights_digest}")
                        followers.show(ready)  # a real trainer does not wait for that
            except BaseException as error:
                print(f"rank {rank} does not come to version {ending.coming}: {error}", flush=True)
                ending.give_up(f"{type(error).__name__}: {error}")
                raise
        dist.barrier()  # no rank needs the bus any more
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] == ["--config"]:
        print(json.dumps(CONFIG))
    else:
        main(*map(int, sys.argv[1:2]), *sys.argv[2:3])

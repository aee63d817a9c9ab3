"""One rank of a real FSDP2 trainer for tests: shards a model, takes a step, publishes its part.

Arguments: bus URL, model, rank, world size, file of the rendezvous. Prints `ready` when the version
is sealed and ends when stdin does. Rank 0 first writes the whole tensors beside the rendezvous.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher


def main() -> None:
    url, model, rank, world_size, rendezvous = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world_size)
    )
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(7, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)]
    network = torch.nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer)
    fully_shard(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.arange(7)).sum().backward()
    optimizer.step()
    state = network.state_dict()
    whole = {name: tensor.full_tensor() for name, tensor in state.items()}
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    if rank == "0":
        save_file(whole, Path(rendezvous).with_suffix(".safetensors"))
    with BlockingPublisher(
        BusSettings(url=url), model, rank=int(rank), world_size=int(world_size)
    ) as publisher:
        publisher.publish(state, 1)
        print("ready", flush=True)
        sys.stdin.read()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

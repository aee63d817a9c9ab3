"""One rank of a trainer for tests: the same small network, held in each of the ways there are.

Arguments: bus URL, model, rank, world size, folder. For each line on stdin, the name of a way, it
makes the network, trains a step, publishes version 1, 2, ... as BF16, and prints one line of JSON.
Rank 0 writes what the version should be, gathered, as FP32 to `<way>-<step>.safetensors` before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import peft
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.modules import plan_module

STEPS: Final = 2
"""Published from one plan, for each way."""


class Network(nn.Module):
    """Rows that no number of ranks divides, a tie, a buffer, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 10)
        self.up, self.down = nn.Linear(10, 9), nn.Linear(9, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(7))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.down(self.up(self.embed(indices)).relu()))
        return self.head(hidden)  # type: ignore[no-any-return]


def shard(network: Network, mesh: DeviceMesh | None = None) -> nn.Module:
    for layer in (network.up, network.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def ddp() -> nn.Module:
    return DistributedDataParallel(Network())


def fsdp() -> nn.Module:
    return shard(Network())


def hsdp() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    return shard(Network(), mesh)


def fsdp_over_tp() -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    network = Network()
    parallelize_module(network, mesh["tp"], {"up": ColwiseParallel(output_layouts=Replicate())})
    return shard(network, mesh["dp"])


def adapted() -> Any:
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"])
    model = peft.get_peft_model(Network(), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    return model


def lora_ddp() -> nn.Module:
    return DistributedDataParallel(adapted())


def lora_fsdp() -> nn.Module:
    model = adapted()
    shard(model.base_model.model)
    return model  # type: ignore[no-any-return]


def lora_hsdp() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    model = adapted()
    shard(model.base_model.model, mesh)
    return model  # type: ignore[no-any-return]


WAYS: Final[dict[str, Callable[[], nn.Module]]] = {
    way.__name__: way for way in (ddp, fsdp, hsdp, fsdp_over_tp, lora_ddp, lora_fsdp, lora_hsdp)
}


def main() -> None:
    url, model, rank, world_size, folder = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(world_size)
    )
    version = 0
    settings = BusSettings(url=url)
    with BlockingPublisher(
        settings, model, rank=int(rank), world_size=int(world_size)
    ) as publisher:
        for line in sys.stdin:
            way, step = line.split()
            if step == "0":
                network = WAYS[way]()
                optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
                look(network)
                with counted() as planning:
                    part = plan_module(
                        network, rank=int(rank), world_size=int(world_size), dtype=torch.bfloat16
                    )
            train(network, optimizer, int(rank))
            expected = dict(whole(network))
            if rank == "0":
                save_file(expected, f"{folder}/{way}-{step}.safetensors")
            version += 1
            with counted() as publishing:
                publisher.publish(part, version)
            said = {
                "version": version,
                "planning": planning.get_total_counts(),
                "publishing": publishing.get_total_counts(),
                "size_bytes": part.size_bytes,
            }
            print(json.dumps(said), flush=True)
    dist.destroy_process_group()


def counted() -> Any:
    """Counts the collectives of torch within."""
    return CommDebugMode()  # type: ignore[no-untyped-call]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """A step. Two ranks see the same data: they may be tensor parallel."""
    optimizer.zero_grad()
    network((torch.arange(5) + rank // 2) % 11).square().mean().backward()
    optimizer.step()
    look(network)


def look(network: nn.Module) -> None:
    """It leaves parameters of FSDP gathered."""
    with torch.no_grad():
        network(torch.arange(3))


def whole(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Gathered, adapters added, under the names of `Network`."""
    state = {
        name: t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in network.state_dict().items()
    }
    clean = {
        name.replace("module.", "").replace("base_model.model.", ""): t for name, t in state.items()
    }
    for name in Network().state_dict():
        stem, _, leaf = name.partition(".")
        base = f"{stem}.base_layer.{leaf}"
        tensor = clean[base if base in clean else name].clone()
        if f"{stem}.lora_A.default.weight" in clean and leaf == "weight":
            a, b = clean[f"{stem}.lora_A.default.weight"], clean[f"{stem}.lora_B.default.weight"]
            tensor += b @ a * (5 / 3)
        if name != "head.weight":
            yield name, tensor


if __name__ == "__main__":
    main()

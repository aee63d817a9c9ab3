"""The first version on a GPU: made, digested and proven there, within its memory, as on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.gpu.test_shapes import tensors_of
from tests.unit.engines.test_shapes import SMALL_MIXTURE
from tests.unit.reload.test_maker import bits_of, said
from tests.unit.reload.test_worker import Client
from tests.unit.transfer.publishing import Kind, Trainer, cut_layout, open_trainer
from weightbus.consumers.engines.torch.device import computing_on, open_device
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.reload.making import MADE_BYTES, SLACK_BYTES
from weightbus.consumers.reload.worker import ReloadWorker

CONFIG = {**SMALL_MIXTURE, "vocab_size": 100_000, "hidden_size": 2048, "num_experts": 64}
"""Some 0.8 GB, more than is made at once."""


class MainMemoryHost(TorchModelHost):
    """Its loader wants tensors in main memory, and its GPU has no room for anything."""

    def takes_device_tensors(self) -> bool:
        return False

    def free_bytes(self) -> int:
        return 0


@pytest.fixture(params=["memory", "files"])
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trainer]:
    kind: Kind = request.param
    with open_trainer(cut_layout(tensors_of(CONFIG, 0), 3), kind, tmp_path) as trainer:
        yield trainer


def client_of(trainer: Trainer, kind: type[TorchModelHost], device: str) -> Client:
    place = open_device(device)
    build = partial(build_model, "shapes", CONFIG, 0, 1)
    with computing_on(place):
        live = build()
    live.requires_grad_(False)
    client = Client(ReloadWorker(kind("shapes", build, live, place), 0, 1), trainer)
    client.live = live  # type: ignore[attr-defined]
    client.attach()
    return client


def test_first_version_is_what_a_cpu_makes_of_it_and_the_memory_is_given_back(
    trainer: Trainer,
) -> None:
    clients = [
        client_of(trainer, TorchModelHost, "cuda:0"),
        client_of(trainer, MainMemoryHost, "cuda:0"),
        client_of(trainer, TorchModelHost, "cpu"),
    ]
    tensors = tensors_of(CONFIG, 1)
    largest = max(tensor.nbytes for tensor in tensors.values())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, free_before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    on_device = clients[0].apply(tensors, 1)
    taken = torch.cuda.max_memory_allocated() - before
    assert largest <= taken <= MADE_BYTES + largest + SLACK_BYTES, f"{taken:,} bytes"
    left = free_before - torch.cuda.mem_get_info()[0]
    assert left <= 128 * 2**20, f"{left:,} bytes were not given back"
    found = [said(on_device, clients[0])]
    found += [said(client.apply(tensors, 1), client) for client in clients[1:]]
    assert found[0] == found[1] == found[2]
    models = [client.live.cpu() for client in clients]  # type: ignore[attr-defined]
    assert bits_of(models[0]) == bits_of(models[1]) == bits_of(models[2])
    for client in clients:
        client.worker.close()

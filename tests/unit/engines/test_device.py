"""Where an engine's ranks are put."""

from __future__ import annotations

import msgspec
import pytest
import torch

from weightbus.consumers.engines.torch.device import computing_on, open_device
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.errors import PlanError


@pytest.mark.parametrize(
    ("device", "ranks"),
    [
        ("cpu", ["cpu", "cpu", "cpu"]),
        ("cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:0", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:5", ["cuda:5", "cuda:6", "cuda:7"]),
    ],
)
def test_every_rank_has_a_device_of_its_own_when_they_are_gpus(
    device: str, ranks: list[str]
) -> None:
    spec = TorchEngineSpec.from_json(
        TorchEngineSpec(architecture="decoder", tp=3, device=device).to_json()
    )
    assert [spec.device_of(rank) for rank in range(3)] == ranks


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:-1", "cuda:0\n", "meta", "CUDA:0"])
def test_device_is_refused_when_no_engine_can_be_there(device: str) -> None:
    document = {"architecture": "decoder", "device": device}
    with pytest.raises(msgspec.ValidationError, match="device"):
        TorchEngineSpec.from_json(msgspec.json.encode(document).decode())


def test_device_is_cpu_when_nothing_is_said() -> None:
    assert TorchEngineSpec.from_json('{"architecture": "decoder"}').device_of(3) == "cpu"


def test_rank_refuses_a_gpu_that_is_not_there() -> None:
    beyond = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(PlanError, match=f"device is {beyond}"):
        open_device(beyond)


def test_cpu_engine_computes_without_a_device_mode() -> None:
    device = open_device("cpu")
    with computing_on(device) as mode:
        assert mode is None


def test_tensors_are_made_on_the_device_while_it_computes() -> None:
    with computing_on(torch.device("meta")):
        assert torch.tensor([1, 2]).is_meta
    assert not torch.tensor([1, 2]).is_meta


def test_host_of_a_cpu_has_nothing_to_wait_for() -> None:
    model = build_model("decoder", {"vocab_size": 10})
    host = TorchModelHost("decoder", lambda: build_model("decoder", {"vocab_size": 10}), model)
    host.synchronize()
    assert host.device == "cpu"
    assert host.free_bytes() > 0

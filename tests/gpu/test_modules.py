"""Modules on a real GPU: what is cast, and what adapters add, in slots of every kind."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.producers.fakes import FakeBus
from weightbus.bus.digest import combine, digest_hex, digest_tensor
from weightbus.producers.modules import plan_module
from weightbus.producers.publisher import PublisherOptions, open_publisher
from weightbus.producers.shards import plan_part
from weightbus.producers.writers import SlotsIn

pytestmark = pytest.mark.anyio

SLOTS: tuple[SlotsIn, ...] = ("device", "host", "both")

SLEEP_CYCLES = 200_000_000
"""Some 0.1 s of a GPU."""


@pytest.fixture
def model() -> Iterator[str]:
    name = f"m{uuid.uuid4().hex[:12]}"
    yield name
    assert list(Path("/dev/shm").glob(f"weightbus-{name}.*")) == []


def digest_of(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """Of what is published of floating-point tensors."""
    sums = []
    for tensor in tensors.values():
        plain = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        raw = plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        sums.append(digest_tensor(raw))
    return digest_hex(combine(np.array(sums, dtype=np.uint64)))


def busy() -> None:
    """The trainer's stream, for a while."""
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]


def options(slots: SlotsIn) -> PublisherOptions:
    return PublisherOptions(slots=slots, slot_wait_s=0.0, close_wait_s=0.0)


@pytest.mark.parametrize("slots", SLOTS)
async def test_slots_hold_what_torch_casts_when_a_dtype_is_given(
    model: str, slots: SlotsIn
) -> None:
    """Beside what is not cast, which the kernel copies; and while the trainer changes it all."""
    generator = torch.Generator("cuda").manual_seed(1)
    weights = {
        "single": torch.randn(3000, 1100, device="cuda", generator=generator),
        "turned": torch.randn(130, 70, device="cuda", generator=generator).t(),
        "brain": torch.randn(70_001, device="cuda", generator=generator).bfloat16(),
        "specials": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45], device="cuda"),
        "whole": torch.arange(99, device="cuda"),
        "here": torch.randn(999),
    }
    part = plan_part(weights, dtype=torch.bfloat16)

    def go_on() -> None:
        for name in ("single", "turned"):
            weights[name].mul_(2.0)

    async with open_publisher(FakeBus().as_bus(), model, options=options(slots)) as publisher:
        for version in range(4):
            busy()
            for name in ("single", "turned"):
                weights[name].add_(1.0)
            expected = {name: tensor.clone() for name, tensor in weights.items()}
            ready = await publisher.publish(part, version, copied=go_on)
            assert ready.weights_digest == digest_of(expected, torch.bfloat16)


@pytest.mark.parametrize("slots", SLOTS)
async def test_slots_hold_the_sum_of_weights_and_adapters_when_layers_have_them(
    model: str, slots: SlotsIn
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(97, 256), nn.Linear(256, 512), nn.Linear(512, 64)).cuda()
    settings = peft.LoraConfig(r=8, lora_alpha=3, target_modules=["0", "1"])
    adapted: Any = peft.get_peft_model(net, settings)
    part = plan_module(adapted, dtype=torch.bfloat16)
    async with open_publisher(FakeBus().as_bus(), model, options=options(slots)) as publisher:
        for version in range(4):
            busy()
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora" in name:
                        parameter.normal_()
            expected = copy.deepcopy(adapted).merge_and_unload().state_dict()
            ready = await publisher.publish(part, version)
            assert ready.weights_digest == digest_of(expected, torch.bfloat16)

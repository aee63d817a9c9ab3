"""Copies of attention sinks that a host of vLLM does not take for those of a parameter."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from weightbus.consumers.errors import CheckpointRefused, ProofFailed
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

SAID = r"layers\.0\.attn\W.*keeps a copy of its attention sinks"


def model_of(scale: float) -> Any:
    """A kernel that keeps the sinks of its layer times `scale`."""
    layer: Any = nn.Module()
    layer.sinks = nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
    layer.attn = nn.Module()
    layer.attn.impl = SimpleNamespace(sinks=layer.sinks.float() * scale)
    model: Any = nn.Module()
    model.layers = nn.ModuleList([layer])
    return model


def host_of(model: nn.Module) -> Any:
    from weightbus.consumers.engines.vllm.host import VllmHost

    config: Any = SimpleNamespace(quant_config=object())
    return VllmHost(config, model, torch.device("cpu"))


def check(host: Any) -> None:
    host.check_needs(Needs((), ()), Layout((), (), ()))


def test_layout_is_refused_when_a_kernel_scales_its_copy() -> None:
    check(host_of(model_of(1.0)))
    with pytest.raises(CheckpointRefused, match=SAID):
        check(host_of(model_of(1.5)))


def test_copies_are_not_compared_when_weights_were_discarded() -> None:
    host = host_of(model_of(1.5))
    host.note_discarded()
    check(host)


def test_copies_that_sleep_are_compared_before_the_first_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asleep = SimpleNamespace(tag="weights", is_asleep=True, cpu_backup_tensor=torch.ones(1))
    module = ModuleType("vllm.device_allocator.cumem")
    allocator = SimpleNamespace(pointer_to_data={0: asleep})
    vars(module)["CuMemAllocator"] = SimpleNamespace(instance=allocator)
    host = host_of(model := model_of(1.5))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    check(host)
    asleep.is_asleep = False
    given: list[str] = []

    def weights() -> Any:
        given.append("asked for")
        yield "layers.0.sinks", torch.zeros(4)

    with pytest.raises(ProofFailed, match=SAID):
        host.reload(weights(), None)
    assert not given
    assert model.layers[0].sinks.tolist() == [1.0] * 4

"""vLLM's reload lifecycle on single layers, as it would run on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.timeout(300)

ELSEWHERE = torch.device("meta")
"""Stands for a GPU as torch's default device."""


class _Attention(nn.Module):
    """Makes its constants anew whenever it is processed, as vLLM's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_k_scale", torch.ones(()))
        self.process_weights_after_loading(torch.bfloat16)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self._k_scale_cpu = torch.tensor(1.0, dtype=torch.float32)
        self._v_scale_cpu = torch.tensor(1.0, dtype=torch.float32)


def test_constants_stay_where_they_are_when_the_default_device_is_another() -> None:
    """vLLM makes them in main memory when it starts; whatever is elsewhere then is not what was
    captured, and an engine with graphs could take no update."""
    from vllm.model_executor.layers.attention.attention import set_default_quant_scales

    from weightbus.consumers.engines.vllm import lifecycle

    class Real(_Attention):
        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            set_default_quant_scales(self, register_buffer="_k_scale_cpu" not in vars(self))

    for layer in (_Attention(), Real()):
        any_layer: Any = layer
        before = any_layer._k_scale_cpu
        processed = lifecycle.Processed()
        with ELSEWHERE, lifecycle._watched([layer], frozenset(), processed):
            any_layer.process_weights_after_loading(torch.bfloat16)
        assert processed.moved == []
        assert any_layer._k_scale_cpu is before
        assert before.device.type == "cpu"

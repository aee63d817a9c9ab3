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


def test_kernel_keeps_the_scales_that_are_written_when_it_is_made_anew() -> None:
    """As FP8 experts: processing replaces the kernel, bound to what the layer was loaded into,
    which is then copied to where the scales were, and let go of."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    from weightbus.consumers.engines.vllm import lifecycle

    class Kernel:
        def __init__(self, scale: torch.Tensor) -> None:
            self.scale = scale

    class Method(QuantizeMethodBase):  # type: ignore[misc]
        def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...

        def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.kernel.scale

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            self.kernel = Kernel(layer.get_parameter("scale"))

    layer: Any = nn.Module()
    layer.quant_method = method = Method()
    layer.scale = served = nn.Parameter(torch.ones(2), requires_grad=False)
    method.process_weights_after_loading(layer)
    processed = lifecycle.Processed()
    state = frozenset({served.untyped_storage().data_ptr()})
    with lifecycle._watched([layer], state, processed):
        layer.scale = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
        method.process_weights_after_loading(layer)
        served.copy_(layer.scale)
        layer.scale = served
    assert method.kernel.scale is served
    assert (processed.moved, processed.derived) == ([], {})


def test_copy_is_not_lost_when_the_parameter_itself_stood_in_its_place() -> None:
    from weightbus.consumers.engines.vllm import lifecycle
    from weightbus.consumers.engines.vllm.captured import bound_attributes

    layer: Any = _Attention()
    served = torch.ones(2)
    layer.sinks = [served]
    layer.process_weights_after_loading = lambda: vars(layer).update(sinks=[served.double()])
    processed = lifecycle.Processed()
    state = frozenset({served.untyped_storage().data_ptr()})
    before = bound_attributes(layer)
    layer.process_weights_after_loading()
    lifecycle._note(layer, layer, before, state, processed)
    assert layer.sinks[0].dtype == torch.float64
    assert processed.moved == ["_Attention.sinks"]
    assert [attribute for _, attribute in processed.derived.values()] == ["sinks"]

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


def _fourier() -> Any:
    """vLLM's own rotary embedding with learned coefficients."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import fope

    with set_current_vllm_config(VllmConfig()):
        made: Any = fope.FourierRotaryEmbedding(
            head_size=16,
            rotary_dim=16,
            max_position_embeddings=32,
            base=10000.0,
            is_neox_style=True,
            dtype=torch.float32,
            init_cache=False,
            num_key_value_heads=2,
            num_inv_freq=6,
            fope_sep_head=True,
            fope_init_factor=0.1,
        )
    for coefficients in (made.cos_coef, made.sin_coef):
        coefficients.data.fill_(1.0)
    return made


def _rotated(rotary: Any) -> torch.Tensor:
    query = torch.arange(2 * 32.0).reshape(2, 32)
    with torch.inference_mode():
        turned, _ = rotary.forward_native(torch.tensor([3, 5]), query, query.clone())
    return turned.clone()  # type: ignore[no-any-return]


class _Rotating(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def load_weights(self, weights: Any) -> None:
        parameters: dict[str, Any] = dict(self.named_parameters())
        for name, weight in weights:
            parameters[name].weight_loader(parameters[name], weight)


def test_fourier_embeddings_are_as_new_after_a_scratch_model_and_a_reload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are shared by all models of a process: one on `meta` must not be made of them, or vLLM
    would load those that serve on `meta`, too."""
    from vllm.config import VllmConfig
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.rotary_embedding import fope
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    from weightbus.consumers.engines.vllm.lifecycle import reload_layerwise
    from weightbus.consumers.engines.vllm.renewing import Renewer
    from weightbus.consumers.engines.vllm.scratch import _rotary_embeddings_apart

    monkeypatch.setattr(fope, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(fope, "get_tensor_model_parallel_rank", lambda: 0)
    rotary = _fourier()
    monkeypatch.setitem(rotary_embedding._ROPE_DICT, ("fourier",), rotary)
    model: Any = _Rotating(rotary)
    record_metadata_for_reloading(model)
    first = _rotated(rotary)
    served = {name: tensor.data_ptr() for name, tensor in rotary.state_dict(keep_vars=True).items()}
    with _rotary_embeddings_apart(), torch.device("meta"):
        scratch = _Rotating(rotary_embedding._ROPE_DICT["fourier",])
        record_metadata_for_reloading(scratch)
    assert rotary_embedding._ROPE_DICT["fourier",] is rotary
    assert scratch.rotary is not rotary
    tensors = (*scratch.parameters(), *scratch.buffers())
    assert len(tensors) == 4
    assert all(tensor.is_meta for tensor in tensors)
    assert scratch.rotary.cos_coef.shape == rotary.cos_coef.shape
    assert get_layerwise_info(rotary).restore_device.type == "cpu"
    coefficients = {
        f"rotary.{name}": torch.full((2, 6, 6), value)
        for name, value in (("cos_coef", 2.0), ("sin_coef", 3.0))
    }
    config: Any = VllmConfig().model_config
    reload_layerwise(model, config, list(model.modules()), coefficients.items())
    assert {n: t.data_ptr() for n, t in rotary.state_dict(keep_vars=True).items()} == served
    assert torch.equal(_rotated(rotary), first), "what is computed once is the old"
    assert Renewer(model).renew()
    fresh = _fourier()
    _Rotating(fresh).load_weights(coefficients.items())
    assert torch.equal(_rotated(rotary), _rotated(fresh))
    assert not torch.equal(_rotated(rotary), first)

"""Loading a model again as SGLang does: what quantisation does to it, and where it ends up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from weightbus.consumers.engines.sglang.lifecycle import can_restore, reload_modules
from weightbus.consumers.errors import ProofFailed


class QuantizeMethodBase:
    """As SGLang's."""

    def process_weights_after_loading(self, layer: Any) -> None:
        pass

    def restore_weights_before_loading(self, layer: Any) -> None:
        pass


class Rebinding(QuantizeMethodBase):
    """Makes a new parameter every time, of the same form, without its loader."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = nn.Parameter(layer.weight.data * 2, requires_grad=False)


class Turning(QuantizeMethodBase):
    """Keeps the weight turned, and can take it back."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data = layer.weight.data.t().contiguous()

    def restore_weights_before_loading(self, layer: Any) -> None:
        layer.weight.data = layer.weight.data.t().contiguous()


class TurningForGood(Turning):
    """Would turn it back and forth."""

    def restore_weights_before_loading(self, layer: Any) -> None:
        pass


class Packing(QuantizeMethodBase):
    """Hangs a packed copy on the layer."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.data.flip(0).contiguous()


class Growing(QuantizeMethodBase):
    """Hangs a copy on the layer that has more rows each time."""

    def __init__(self) -> None:
        self.times = 0

    def process_weights_after_loading(self, layer: Any) -> None:
        self.times += 1
        layer.packed = layer.weight.data.repeat(self.times, 1)


class Writing(Packing):
    """Writes to its copy, and hangs a new view of it on the layer."""

    def process_weights_after_loading(self, layer: Any) -> None:
        packed = getattr(layer, "packed", None)
        if packed is None:
            super().process_weights_after_loading(layer)
        else:
            layer.packed = packed.copy_(layer.weight.data.flip(0)).view_as(packed)


class Layer(nn.Module):
    def __init__(self, method: QuantizeMethodBase | None, rows: int = 2) -> None:
        super().__init__()
        self.quant_method = method
        self.weight = nn.Parameter(torch.zeros(rows, 3), requires_grad=False)
        self.weight.weight_loader = len  # type: ignore[attr-defined]
        if method is not None:
            method.process_weights_after_loading(self)


def model_of(layer: Layer) -> nn.Module:
    return nn.ModuleDict({"layer": layer})


def loading(layer: Layer, value: float) -> Callable[[], None]:
    def load() -> None:
        layer.weight.data.copy_(value + torch.arange(layer.weight.numel()).view(layer.weight.shape))

    return load


def test_parameter_stays_the_object_and_the_memory_that_it_was_when_it_is_bound_anew() -> None:
    layer = Layer(Rebinding())
    vars(layer.weight)["weight_loader"] = len
    parameter, address = layer.weight, layer.weight.data_ptr()
    for value in (1.0, 5.0):
        reload_modules(model_of(layer), None, loading(layer, value))
        assert layer.weight is parameter
        assert layer.weight.data_ptr() == address
        assert vars(layer.weight)["weight_loader"] is len
        assert layer.weight.flatten().tolist() == [2 * (value + n) for n in range(6)]


def test_restored_parameter_is_loaded_and_turned_in_the_memory_that_it_had() -> None:
    layer = Layer(Turning())
    assert layer.weight.shape == (3, 2)
    address = layer.weight.data_ptr()
    reload_modules(model_of(layer), None, loading(layer, 1.0))
    assert layer.weight.data_ptr() == address
    assert layer.weight.tolist() == [[1, 4], [2, 5], [3, 6]]


def test_reload_fails_when_a_parameter_comes_out_in_another_form() -> None:
    layer = Layer(TurningForGood())
    with pytest.raises(ProofFailed, match=r"layer.weight"):
        reload_modules(model_of(layer), None, loading(layer, 1.0))


def test_packed_copy_is_renewed_in_its_own_memory_and_told() -> None:
    layer = Layer(Packing())
    captured = layer.packed
    assert isinstance(captured, torch.Tensor)
    reloaded = reload_modules(model_of(layer), None, loading(layer, 1.0))
    assert layer.packed is captured
    assert captured.tolist() == [[4, 5, 6], [1, 2, 3]]
    assert reloaded == ({"layer": "packed"}, ())


def test_packed_copy_is_told_to_have_moved_when_it_comes_out_in_another_form() -> None:
    layer = Layer(Growing())
    reloaded = reload_modules(model_of(layer), None, loading(layer, 1.0))
    assert reloaded == ({"layer": "packed"}, ("layer.packed",))


def test_packed_copy_has_not_moved_when_its_memory_was_written_and_is_looked_at_anew() -> None:
    layer = Layer(Writing())
    reloaded = reload_modules(model_of(layer), None, loading(layer, 1.0))
    assert reloaded == ({"layer": "packed"}, ())
    assert isinstance(layer.packed, torch.Tensor)
    assert layer.packed.tolist() == [[4, 5, 6], [1, 2, 3]]


def test_modules_that_are_not_named_are_left_alone() -> None:
    named, other = Layer(Rebinding()), Layer(Rebinding())
    other.weight.data.fill_(7)
    model = nn.ModuleDict({"named": named, "other": other})
    reload_modules(model, frozenset({"named"}), loading(named, 1.0))
    assert named.weight.flatten().tolist() == [2, 4, 6, 8, 10, 12]
    assert other.weight.flatten().tolist() == 6 * [7]


def test_layer_without_a_method_is_loaded_as_it_is() -> None:
    layer = Layer(None)
    assert reload_modules(model_of(layer), None, loading(layer, 1.0)) == ({}, ())
    assert layer.weight.flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("method", "expected"), [(Turning(), True), (TurningForGood(), True), (Packing(), False)]
)
def test_engine_can_restore_a_layer_only_if_its_method_says_how(
    method: QuantizeMethodBase, expected: bool
) -> None:
    assert can_restore(Layer(method)) is expected
    assert not can_restore(Layer(None))

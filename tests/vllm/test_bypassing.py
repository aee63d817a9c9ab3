"""Models that copy into their parameters past the weight loaders, as gpt-oss does: vLLM's own
reload loses that, and serves old weights with a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from weightbus.consumers.errors import ProofFailed

pytestmark = pytest.mark.timeout(300)

Weights = Iterable[tuple[str, torch.Tensor]]
Write = Callable[[torch.Tensor, torch.Tensor], object]


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(4), requires_grad=False)


class _Model(nn.Module):
    def __init__(self, write: Write) -> None:
        super().__init__()
        self.first, self.second = _Layer(), _Layer()
        self._write = write

    def load_weights(self, weights: Weights) -> None:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            self._write(parameters[name], weight)


def _checkpoint(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=random)
        for name, parameter in _Model(torch.Tensor.copy_).named_parameters()
    }


def _reload(model: nn.Module, weights: Weights) -> Any:
    from vllm.config import VllmConfig

    from weightbus.consumers.engines.vllm.lifecycle import reload_layerwise

    config: Any = VllmConfig().model_config
    return reload_layerwise(model, config, list(model.modules()), weights)


def _recorded(write: Write) -> nn.Module:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model = _Model(write)
    record_metadata_for_reloading(model)
    return model


def _by_loader(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    loader: Any = getattr(parameter, "weight_loader", default_weight_loader)
    loader(parameter, weight)


def _in_parts(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.data.zero_()
    parameter[1:].copy_(weight[1:])
    parameter.data[0] = weight[0]


def _zeros(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    if parameter.dim() == 1:
        parameter.zero_()
        weight.zero_()
    else:
        _by_loader(parameter, weight)


def _mixed(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    (torch.Tensor.copy_ if parameter.dim() == 1 else _by_loader)(parameter, weight)


@pytest.mark.parametrize("write", [torch.Tensor.copy_, _in_parts, _by_loader, _mixed, _zeros])
def test_all_that_is_written_is_there_and_where_it_was(write: Write) -> None:
    model = _recorded(write)
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    for seed in (1, 2):
        weights = _checkpoint(seed)
        processed = _reload(model, weights.items())
        found = dict(model.named_parameters())
        assert {name: tensor.data_ptr() for name, tensor in found.items()} == places
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert processed.empty == []


def test_layer_that_is_given_nothing_is_told_of() -> None:
    model: Any = _recorded(torch.Tensor.copy_)
    weights = _checkpoint(1)
    _reload(model, weights.items())
    newer = _checkpoint(2)
    given = [(name, newer[name]) for name in newer if name.startswith("first")]
    assert _reload(model, given).empty == [model.second]
    assert torch.equal(model.first.weight, newer["first.weight"])
    assert torch.equal(model.second.weight, weights["second.weight"])


def test_layer_that_is_filled_only_is_not_forgotten() -> None:
    model: Any = _recorded(lambda parameter, weight: parameter.fill_(2.0))
    assert _reload(model, _checkpoint(1).items()).empty == []
    assert torch.equal(model.first.weight, torch.full((4, 3), 2.0))


def test_layer_that_is_written_again_when_it_was_complete_is_refused() -> None:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model: Any = _Model(torch.Tensor.copy_)
    for layer in (model.first, model.second):
        del layer.bias
    record_metadata_for_reloading(model)
    weights = [(name, torch.ones(4, 3)) for name, _ in model.named_parameters()]
    with pytest.raises(ProofFailed, match=r"_Layer\.weight.*when it was complete"):
        _reload(model, weights * 2)
    assert not any(tensor.is_meta for tensor in model.parameters())


def test_rest_of_what_is_written_in_part_is_as_it_was() -> None:
    model: Any = _recorded(lambda parameter, weight: parameter[:2].copy_(weight[:2]))
    for parameter in model.parameters():
        parameter.fill_(float("-inf"))
    weights = _checkpoint(1)
    assert _reload(model, weights.items()).empty == []
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[:2], weights[name][:2])
        assert torch.isneginf(parameter[2:]).all()


class _Pair(_Model):
    """Of which one is copied twice past its loader before the other comes by its own."""

    def load_weights(self, weights: Weights) -> None:
        parameters = dict(self.named_parameters())
        for layer in ("first", "second"):
            given = dict(weights)
            for _ in range(2):
                parameters[f"{layer}.weight"].copy_(given[f"{layer}.weight"])
            _by_loader(parameters[f"{layer}.other"], given[f"{layer}.other"])


def test_what_is_copied_twice_does_not_make_its_layer_complete() -> None:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model: Any = _Pair(torch.Tensor.copy_)
    for layer in (model.first, model.second):
        del layer.bias
        layer.other = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    record_metadata_for_reloading(model)
    random = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(parameter.shape, generator=random)
        for name, parameter in model.named_parameters()
    }
    _reload(model, weights)
    assert all(torch.equal(held, weights[name]) for name, held in model.named_parameters())


def test_layer_of_one_element_that_is_filled_only_is_not_left_on_meta() -> None:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model: Any = _Model(lambda parameter, weight: parameter.fill_(2.0))
    for layer in (model.first, model.second):
        del layer.weight, layer.bias
        layer.scale = nn.Parameter(torch.zeros(1), requires_grad=False)
    record_metadata_for_reloading(model)
    _reload(model, [(name, torch.zeros(1)) for name, _ in model.named_parameters()])
    assert [parameter.item() for parameter in model.parameters()] == [2.0, 2.0]


def test_layer_that_vllm_loads_in_its_place_is_not_empty() -> None:
    """A router's correction bias, which vLLM never takes away."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model: Any = _Model(_by_loader)
    for layer in (model.first, model.second):
        del layer.weight, layer.bias
        layer.e_score_correction_bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    record_metadata_for_reloading(model)
    weights = {name: torch.ones(4) for name, _ in model.named_parameters()}
    assert _reload(model, weights.items()).empty == []
    assert all(torch.equal(parameter, torch.ones(4)) for parameter in model.parameters())


def test_write_by_another_dtype_is_refused() -> None:
    model = _recorded(lambda own, weight: own.view(torch.int32).copy_(weight.view(torch.int32)))
    with pytest.raises(ProofFailed, match=r"is written as torch\.int32"):
        _reload(model, _checkpoint(1).items())


def test_write_to_a_layer_that_vllm_processes_by_itself_is_refused() -> None:
    model: Any = _recorded(torch.Tensor.copy_)
    model.first.process_weights_after_loading = lambda act_dtype: None
    with pytest.raises(ProofFailed, match="vLLM loses it"):
        _reload(model, _checkpoint(1).items())


def test_writes_of_several_at_once_are_refused() -> None:
    model = _recorded(lambda own, weight: torch._foreach_copy_([own], [weight]))
    with pytest.raises(ProofFailed, match="_foreach_copy_"):
        _reload(model, _checkpoint(1).items())


def test_write_that_is_not_known_is_refused_and_nothing_is_left_on_meta() -> None:
    model = _recorded(torch.Tensor.add_)
    with pytest.raises(ProofFailed, match=r"_Layer\.weight.*add_.*past its weight loader"):
        _reload(model, _checkpoint(1).items())
    assert not any(tensor.is_meta for tensor in model.parameters())

"""Copies of weights in closures and objects: found, told from the model's own, renewed in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from weightbus.consumers.engines.vllm.captured import (
    bound_attributes,
    keep_in_place,
    reaches_only,
    rebound,
    tensors_within,
)


class Handle:
    """Owns what its tensor points to, as a handle of a library does."""

    def __init__(self, address: int, freed: list[int]) -> None:
        self.address = torch.tensor(address, dtype=torch.int64)
        self.freed = freed

    def __del__(self) -> None:
        self.freed.append(int(self.address))


def pack(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = weight.t().contiguous()
    return lambda x: x @ packed


def pack_by_handle(address: int, freed: list[int]) -> Callable[[], int]:
    handle = Handle(address, freed)
    return lambda: int(handle.address)


def test_tensors_are_reached_through_closures_partials_methods_and_objects() -> None:
    one, two, three, four = (torch.full((2,), float(n)) for n in range(4))

    class Kernel:
        def __init__(self) -> None:
            self.inner = {"scale": [three]}

        def run(self) -> None: ...

    held = (pack(one), partial(max, two, key=None), Kernel().run, lambda x=four: x)
    found = [tensor for _, tensor in tensors_within(held)]
    assert [float(tensor.reshape(-1)[0]) for tensor in found] == [0.0, 1.0, 2.0, 3.0]


def test_modules_and_cycles_are_not_followed() -> None:
    cycle: list[Any] = [nn.Linear(2, 2)]
    cycle.append(cycle)
    assert list(tensors_within(cycle)) == []


def test_only_what_was_bound_anew_and_reaches_a_tensor_is_a_copy() -> None:
    layer: Any = nn.Linear(2, 2)
    layer.workspace, layer.scale = torch.zeros(3), 1.0
    before = bound_attributes(layer)
    layer.scale, layer.cpu_linear, layer.same = 2.0, pack(layer.weight), [layer.weight]
    state = frozenset({layer.weight.untyped_storage().data_ptr()})
    assert list(rebound(layer, before, state)) == ["cpu_linear"]
    assert list(rebound(layer, before, frozenset())) == ["cpu_linear", "same"]


def test_value_reaches_only_the_model_when_it_holds_no_other_tensor() -> None:
    weight, other = torch.zeros(2), torch.ones(2)
    state = frozenset({weight.untyped_storage().data_ptr()})
    assert reaches_only([weight, weight[1:], torch.empty(0), 3], state)
    assert not reaches_only([weight, other], state)


def test_old_closure_computes_with_the_new_weight_when_kept_in_place() -> None:
    old, new = pack(torch.eye(2)), pack(2 * torch.eye(2))
    (memory,) = (tensor.data_ptr() for _, tensor in tensors_within(old))
    assert keep_in_place(old, new, frozenset())
    assert torch.equal(old(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    assert [tensor.data_ptr() for _, tensor in tensors_within(old)] == [memory]


def test_every_handle_is_freed_once_and_the_kept_one_lives() -> None:
    freed: list[int] = []
    old, new = pack_by_handle(11, freed), pack_by_handle(22, freed)
    assert keep_in_place(old, new, frozenset())
    del new
    assert (old(), freed) == (22, [11])
    del old
    assert freed == [11, 22]


def test_nothing_changes_when_the_structure_is_another() -> None:
    old, wider, other = pack(torch.eye(2)), pack(torch.eye(3)), lambda x: x
    assert not keep_in_place(old, wider, frozenset())
    assert not keep_in_place(old, other, frozenset())
    assert torch.equal(old(torch.ones(1, 2)), torch.ones(1, 2))


def test_tensors_of_the_model_itself_are_left_alone() -> None:
    weight, fresh = torch.zeros(2), torch.ones(2)
    state = frozenset({weight.untyped_storage().data_ptr()})
    assert keep_in_place([weight], [fresh], state)
    assert torch.equal(weight, torch.zeros(2))


def test_new_tensor_of_the_model_keeps_what_it_holds() -> None:
    copy, weight = torch.zeros(2), torch.ones(2)
    state = frozenset({weight.untyped_storage().data_ptr()})
    assert keep_in_place([copy], [weight], state)
    assert torch.equal(copy, torch.ones(2))
    assert torch.equal(weight, torch.ones(2))

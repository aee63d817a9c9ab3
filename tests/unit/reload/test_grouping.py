"""An engine that holds tensors until their module is complete never holds much of a model."""

from __future__ import annotations

import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.reload.interpreted import interpreting
from tests.unit.reload.models import Bag, ModuleHost, random_tensor, same_bits
from tests.unit.reload.test_maker import MUCH_BYTES, Device, DeviceHost, client_of
from tests.unit.transfer.publishing import cut_layout, open_trainer
from weightbus.consumers.reload import loading, making
from weightbus.consumers.reload.grouping import Held, grouped_by_module
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.tracer import trace_needs

LAYERS = 12
PARTS = ("gate", "up", "down")
PART_SHAPE = (16, 8)
PART_BYTES = 16 * 8 * 4
LAYER_BYTES = len(PARTS) * PART_BYTES


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Bag(torch.float32, **dict.fromkeys(PARTS, PART_SHAPE)) for _ in range(LAYERS)
        )


def interleaved(seed: int) -> dict[str, torch.Tensor]:
    """As a trainer that names what it has by kind: no layer is complete before the last kind."""
    names = [f"{part}.{layer}" for part in PARTS for layer in range(LAYERS)]
    return {
        name: random_tensor(PART_SHAPE, torch.float32, seed + number)
        for number, name in enumerate(names)
    }


def load_stack(model: Any, weights: Weights) -> None:
    for name, weight in weights:
        part, _, layer = name.partition(".")
        getattr(model.layers[int(layer)], part).data.copy_(weight)


class Memory:
    """How many bytes of some tensors are alive."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._all: list[tuple[weakref.ref[torch.UntypedStorage], int]] = []

    def note(self, tensor: torch.Tensor) -> None:
        memory = tensor.untyped_storage()
        self._all = [item for item in self._all if item[0]() is not None]
        self._all.append((weakref.ref(memory), memory.nbytes()))
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._all))


def reload_layerwise(
    live: nn.Module, weights: Weights, memory: Memory, needed: int = len(PARTS)
) -> None:
    """As vLLM: views of what was given are kept until a layer has all that it needs."""
    kept: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, weight in weights:
        memory.note(weight)
        layer = name.partition(".")[2]
        kept.setdefault(layer, []).append((name, weight[:]))
        del weight
        if len(kept[layer]) == needed:
            load_stack(live, kept.pop(layer))
    for rest in kept.values():
        load_stack(live, rest)


def upside_down(model: Any) -> None:
    """The engine keeps every layer in another form than it loads it."""
    for layer in model.layers:
        layer.gate.data.copy_(layer.gate.flip(0).clone())


class Layerwise(ModuleHost):
    needed = len(PARTS)
    """Parts that a layer waits for; more than it gets: it waits for the end."""

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        self.memory = Memory()
        with torch.no_grad():
            reload_layerwise(self.live, weights, self.memory, self.needed)
        self._process(self.live)


class LayerwiseOnDevice(Layerwise, DeviceHost):
    pass


def check(
    host: ModuleHost, tensors: dict[str, torch.Tensor], process: Callable[[Any], None]
) -> None:
    expected: Any = Stack()
    load_stack(expected, tensors.items())
    process(expected)
    for name, want in expected.named_parameters():
        assert same_bits(host.live.get_parameter(name), want), name


@pytest.mark.parametrize("host_type", [Layerwise, LayerwiseOnDevice])
def test_no_more_than_a_module_is_held_when_the_layout_is_not_grouped(
    host_type: type[Layerwise], device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "MADE_BYTES", 1)
    host = host_type(Stack, load_stack, process=upside_down)
    with open_trainer(cut_layout(interleaved(0), 2), "memory", tmp_path) as trainer:
        client = client_of(trainer, host)
        for version in (1, 2):
            tensors = interleaved(100 * version)
            applied = client.apply(tensors, version)
            assert applied.processed_parameters == LAYERS * len(PARTS), "every version is loaded"
            check(host, tensors, upside_down)
            assert LAYER_BYTES <= host.memory.peak_bytes <= LAYER_BYTES + PART_BYTES
        client.worker.close()


def test_device_holds_what_there_is_room_for_when_no_module_gets_complete(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As padded modules of vLLM, which wait for the end. What comes beyond comes in main memory."""
    made = Memory()
    real = making.made_parameters

    def noted(*args: Any) -> Iterator[tuple[int, torch.Tensor]]:
        for number, tensor in real(*args):
            made.note(tensor)
            yield number, tensor
            del tensor

    monkeypatch.setattr(loading, "made_parameters", noted)
    for module in (making, loading):
        monkeypatch.setattr(module, "SLACK_BYTES", 0)
    host = LayerwiseOnDevice(Stack, load_stack, process=upside_down)
    host.needed, host.free = len(PARTS) + 1, 9 * PART_BYTES
    tensors = interleaved(0)
    with open_trainer(cut_layout(tensors, 2), "memory", tmp_path) as trainer:
        client = client_of(trainer, host)
        client.apply(tensors, 1)
        client.worker.close()
    check(host, tensors, upside_down)
    assert host.memory.peak_bytes == LAYERS * LAYER_BYTES, "the engine holds all of it"
    room_bytes = (host.free - host.free // 4) // loading.HELD_SHARE
    held_bytes = room_bytes // PART_BYTES * PART_BYTES
    assert held_bytes == 2 * PART_BYTES
    assert made.peak_bytes == held_bytes + PART_BYTES, "and one that is on its way to main memory"


def test_device_holds_all_when_there_is_room(device: Device, tmp_path: Path) -> None:
    host = LayerwiseOnDevice(Stack, load_stack)
    assert host.free == MUCH_BYTES
    tensors = interleaved(0)
    with open_trainer(cut_layout(tensors), "memory", tmp_path) as trainer:
        client = client_of(trainer, host)
        assert client.apply(tensors, 1).reason.startswith("proof of the plan")
        assert client.apply(interleaved(1), 2).direct_parameters == LAYERS * len(PARTS)
        client.worker.close()


def test_what_is_held_is_counted_until_the_last_view_of_it_goes() -> None:
    held, first, second = Held(100), torch.zeros(60, dtype=torch.uint8), torch.zeros(50)[:8]
    view = first[3:4]
    assert held.takes(first)
    del first
    assert not held.takes(second), "a view keeps the whole"
    del view
    assert not held.takes(second), "200 bytes, of which it is a part"
    assert held.takes(torch.zeros(100, dtype=torch.uint8))
    assert held.takes(torch.zeros(100, dtype=torch.uint8)), "nobody has kept the one before"
    assert not Held(0).takes(torch.zeros(1))


def test_what_another_thread_lets_go_of_makes_room() -> None:
    held, kept = Held(4), [torch.zeros(1) for _ in range(2)]
    assert held.takes(kept[0])
    assert not held.takes(kept[1])
    dropping = threading.Thread(target=kept.pop, args=(0,))
    dropping.start()
    dropping.join()
    assert held.takes(kept[0])
    assert not held.takes(torch.zeros(1))


def test_being_asked_takes_no_longer_however_much_is_held() -> None:
    """Else a loader that holds thousands of tensors is as slow as their square."""

    def lines_of_an_answer(count: int) -> int:
        held, kept = Held(4 * count), [torch.zeros(1) for _ in range(count)]
        assert all(held.takes(tensor) for tensor in kept)
        lines = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal lines
            lines += event == "line" and frame.f_code.co_filename.endswith("grouping.py")
            return trace

        tensor, before = torch.zeros(1), sys.gettrace()
        sys.settrace(trace)
        try:
            taken = held.takes(tensor)
        finally:
            sys.settrace(before)
        assert not taken
        return lines

    assert 0 < lines_of_an_answer(1000) == lines_of_an_answer(2)


@pytest.mark.parametrize(
    ("modules_of", "order"),
    [
        ([], ()),
        (["a", "b", "a", "b"], (0, 2, 1, 3)),
        (["b", "b", "a", "a"], (0, 1, 2, 3)),
        (["", "a", "", "b", "", "a"], (0, 1, 2, 5, 3, 4)),
        (["a", "b", "c", "ac", "b"], (0, 2, 3, 1, 4)),
        (["a", "ab", "bc", "d", "cd", "e"], (0, 1, 2, 3, 4, 5)),
    ],
)
def test_tensors_of_a_module_follow_each_other(
    modules_of: list[str], order: tuple[int, ...]
) -> None:
    assert grouped_by_module([frozenset(modules) for modules in modules_of]) == order


@pytest.mark.parametrize("seed", range(50))
def test_order_of_what_shares_a_module_stays(seed: int) -> None:
    made = random.Random(seed)
    modules_of = [
        frozenset(made.choices("abcdefgh", k=made.choice([0, 1, 1, 1, 2]))) for _ in range(30)
    ]
    order = grouped_by_module(modules_of)
    assert sorted(order) == list(range(30)), seed
    place = {number: at for at, number in enumerate(order)}
    for one, modules in enumerate(modules_of):
        for other in range(one + 1, 30):
            assert not modules & modules_of[other] or place[one] < place[other], seed
    assert grouped_by_module([modules_of[number] for number in order]) == tuple(range(30)), seed


def test_tensor_that_is_hidden_still_comes_before_what_hides_it() -> None:
    """The head is loaded from the embeddings, and then from a tensor of its own."""

    def load(model: Any, weights: Weights) -> None:
        for name, weight in weights:
            match name:
                case "bias":
                    model.head.bias.data.copy_(weight)
                case "embed":
                    model.embed.weight.data.copy_(weight)
                    model.head.weight.data.copy_(weight)
                case "head":
                    model.head.weight.data.copy_(weight)
                case "other":
                    model.other.weight.data.copy_(weight)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = Bag(weight=(3, 2))
            self.other = Bag(weight=(2,))
            self.head = Bag(weight=(3, 2), bias=(3,))

    shapes = {"bias": (3,), "other": (2,), "embed": (3, 2), "skipped": (5,), "head": (3, 2)}
    tensors = {
        name: random_tensor(shape, torch.float32, n)
        for n, (name, shape) in enumerate(shapes.items())
    }
    order = trace_needs(ModuleHost(Tied, load), cut_layout(tensors)).order
    assert [list(shapes)[number] for number in order] == [
        "bias",
        "embed",
        "skipped",
        "head",
        "other",
    ]

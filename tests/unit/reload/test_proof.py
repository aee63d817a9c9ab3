"""What proves the form of a parameter, and what proves nothing yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.reload.models import Bag, ModuleHost, load_by_name, random_tensor, same_bits
from tests.unit.reload.test_worker import Client, make_client
from tests.unit.transfer.publishing import cut_layout, open_trainer
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.proof import COPIED_BYTES, GATHERED_BYTES, same_bytes_elsewhere

ROWS = torch.arange(4.0).expand(4, 4)
HIDING = {
    "zeros": torch.zeros(4, 4),
    "equal rows": ROWS.contiguous(),
    "equal columns": ROWS.t().contiguous(),
    "symmetric": torch.eye(4),
}
REPACKING = {
    "rows": lambda weight: weight[[0, 2, 1, 3]],
    "columns": lambda weight: weight[:, [0, 2, 1, 3]],
    "transposed": lambda weight: weight.t(),
}


class Model(nn.Module):
    """Two modules, each of a square weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (Bag(torch.float32, weight=(4, 4), bias=(4,)) for _ in range(2))


def tensors_of(version: int, **given: torch.Tensor) -> dict[str, torch.Tensor]:
    """A version of the model; `a_weight` stands for `a.weight`."""
    made = {
        name: random_tensor(tuple(parameter.shape), torch.float32, 10 * version + number)
        for number, (name, parameter) in enumerate(Model().named_parameters())
    }
    return {**made, **{name.replace("_", "."): tensor for name, tensor in given.items()}}


@pytest.mark.parametrize("first", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("repack", REPACKING.values(), ids=REPACKING)
def test_repacked_module_is_found_when_its_first_bytes_hide_it(
    first: torch.Tensor, repack: Any, tmp_path: Path
) -> None:
    class Repacking(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            super().reload(weights, modules)
            weight = self.live.get_parameter("a.weight")
            weight.copy_(repack(weight.clone()))

    host = Repacking(Model, load_by_name)
    with open_trainer(cut_layout(tensors_of(0)), "memory", tmp_path) as trainer:
        client = make_client(trainer, host)
        for version in range(1, 6):
            tensors = tensors_of(version)
            if version < 3:
                tensors["a.weight"] = first
            applied = client.apply(tensors, version)
            for name, live in host.live.named_parameters():
                want = repack(tensors[name]) if name == "a.weight" else tensors[name]
                assert same_bits(live, want.contiguous()), (version, name)
        assert (applied.direct_parameters, applied.processed_parameters) == (2, 2)
        assert host.reloads[-1] == (frozenset({"a"}), ("a.weight", "a.bias"))


def test_uniform_parameter_is_written_directly_when_it_stays_and_once_it_is_proven(
    tmp_path: Path,
) -> None:
    """Biases start at 0 and norms at 1: a frozen one must not cost a reload every time."""
    frozen, biases = torch.zeros(4), [torch.ones(4)] * 3 + [torch.arange(4.0), torch.arange(1.0, 5)]
    host = ModuleHost(Model, load_by_name)
    with open_trainer(cut_layout(tensors_of(0)), "memory", tmp_path) as trainer:
        client = make_client(trainer, host)
        direct = []
        for version, bias in enumerate(biases):
            tensors = tensors_of(version, a_bias=bias, b_bias=frozen)
            direct.append(client.apply(tensors, version).direct_parameters)
            for name, live in host.live.named_parameters():
                assert same_bits(live, tensors[name]), (version, name)
    assert direct == [0, 4, 4, 0, 4]
    assert len(host.reloads) == 2


def test_undecided_parameters_are_proven_again_when_an_update_failed(tmp_path: Path) -> None:
    host = ModuleHost(Model, load_by_name)
    with open_trainer(cut_layout(tensors_of(0)), "memory", tmp_path) as trainer:
        client: Client = make_client(trainer, host)
        client.apply(tensors_of(1, a_bias=torch.zeros(4)), 1)

        def tear() -> None:
            trainer.blocks[0].generation += 2

        host.on_synchronize = tear
        failed = client.fail(
            client.request(trainer.publish(tensors_of(2, a_bias=torch.zeros(4)), 2), 2)
        )
        assert (failed.error, failed.touched) == ("TornRead", True)
        host.on_synchronize = lambda: None
        tensors = tensors_of(3, a_bias=torch.zeros(4))
        assert client.apply(tensors, 3).direct_parameters == 0
        assert client.apply(tensors, 4).direct_parameters == 4


def _gapped(rows: int, columns: int) -> torch.Tensor:
    """With a gap behind every row."""
    return torch.zeros((rows, 2 * columns), dtype=torch.int32)[:, :columns]


def _permuted(*shape: int) -> torch.Tensor:
    return torch.zeros(shape[::-1], dtype=torch.bfloat16).permute(*reversed(range(len(shape))))


@pytest.mark.parametrize(
    "live",
    [
        torch.zeros((), dtype=torch.float32),
        torch.zeros((0, 5)),
        torch.zeros(3 * COPIED_BYTES // 2 + 1, dtype=torch.uint8),
        torch.zeros((5, COPIED_BYTES // 3), dtype=torch.uint8),
        torch.zeros((3, 2, COPIED_BYTES), dtype=torch.uint8),
        torch.zeros((3, 7)).to(torch.float8_e4m3fn),
        _permuted(700, 3, 500),
        _gapped(5, 7),
        _gapped(3, GATHERED_BYTES),
    ],
    ids=lambda live: f"{tuple(live.shape)}-{live.dtype}",
)
def test_bytes_of_another_device_are_compared_part_by_part(live: torch.Tensor) -> None:
    made = torch.empty_strided(live.shape, live.stride(), dtype=live.dtype)
    made.copy_(live)
    assert same_bytes_elsewhere(live, made)
    if live.numel():
        for place in (0, live.numel() // 2, live.numel() - 1):
            index = np.unravel_index(place, tuple(live.shape)) if live.dim() else ()
            bits = made[tuple(map(int, index))].reshape(1).view(torch.uint8)[:1]
            bits ^= 1
            assert not same_bytes_elsewhere(live, made)
            bits ^= 1

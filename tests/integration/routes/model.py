"""A model of every dtype, cut for any number of ranks, even where it does not come out even."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.unit.reload.models import ModuleHost, random_tensor
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.host import Weights

__all__ = ("make_host", "make_tensors", "parameters_of")

_SHAPES: Mapping[str, tuple[int, ...]] = {
    "columns": (13, 5),
    "rows": (7, 11),
    "whole": (3, 2, 3),
    "scalar": (),
    "empty": (0, 4),
}
"""Per dtype: cut along dimension 0, cut along dimension 1, and three that every rank holds."""

_CUT = {"columns": 0, "rows": 1, "wide": 0}


def make_tensors(version: int) -> dict[str, torch.Tensor]:
    """A checkpoint with every dtype that torch has; every bit pattern may occur."""
    tensors = {
        f"{dtype}.{kind}": random_tensor(shape, TORCH_DTYPES[dtype], 1000 * version + 7 * number)
        for number, dtype in enumerate(TORCH_DTYPES)
        for kind, shape in _SHAPES.items()
    }
    tensors["F32.wide"] = random_tensor((37, 53), torch.float32, 1000 * version + 999)
    generator = torch.Generator().manual_seed(version)
    tensors["q"] = torch.randn(12, 6, generator=generator)
    tensors["k"] = torch.randn(6, 6, generator=generator)
    tensors["experts"] = torch.randn(5, 4, 6, generator=generator).to(torch.bfloat16)
    tensors["unused"] = torch.randn(33, generator=generator)
    return tensors


def _part(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    dim = _CUT.get(name.rpartition(".")[2])
    return tensor if dim is None else tensor.tensor_split(ranks, dim)[rank]


def parameters_of(tensors: Mapping[str, torch.Tensor], rank: int, ranks: int) -> nn.Module:
    """What one rank must hold, made without any loader."""
    model = nn.Module()
    for name, tensor in tensors.items():
        if "." in name:
            _add(model, name.replace(".", "_"), _part(name, tensor, rank, ranks).clone())
    q, k = (tensors[name].tensor_split(ranks)[rank] for name in ("q", "k"))
    _add(model, "qk", torch.cat([q, k]).to(torch.bfloat16))
    _add(model, "experts", tensors["experts"].transpose(1, 2).contiguous())
    return model


def _add(model: nn.Module, name: str, values: torch.Tensor) -> None:
    setattr(model, name, nn.Parameter(values, requires_grad=False))


def make_host(rank: int, ranks: int) -> ModuleHost:
    """One rank's empty model with a loader like those of the large engines."""

    def build() -> nn.Module:
        with torch.device("cpu"):
            model = parameters_of(make_tensors(0), rank, ranks)
        device = torch.get_default_device()
        for name, parameter in model.named_parameters():
            _add(model, name, torch.zeros_like(parameter, device=device))
        return model

    def load(model: Any, weights: Weights) -> None:
        parameters = dict(model.named_parameters())
        queries = make_tensors(0)["q"].tensor_split(ranks)[rank].shape[0]
        for name, weight in weights:
            if name == "q":
                parameters["qk"].data[:queries].copy_(weight.tensor_split(ranks)[rank])
            elif name == "k":
                parameters["qk"].data[queries:].copy_(weight.tensor_split(ranks)[rank])
            elif name == "experts":
                for number, expert in enumerate(weight.unbind()):
                    parameters["experts"].data[number].copy_(expert.t())
            elif "." in name:
                part = _part(name, weight, rank, ranks)
                parameters[name.replace(".", "_")].data.copy_(part)

    return ModuleHost(build, load)

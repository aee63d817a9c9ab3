"""Random models, loaders, trainers and versions: what the worker makes is what the loader makes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.reload.models import ModuleHost, random_tensor, same_bits
from tests.unit.reload.test_worker import Client
from tests.unit.transfer.publishing import Kind, cut_layout, open_trainer
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.worker import ReloadWorker

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)

Tensors = dict[str, torch.Tensor]
Step = Callable[[Tensors, Tensors], object]
"""Part of a loader: writes to some of the parameters what it takes of the given tensors."""


class RandomModel:
    """A seeded model: parameters in modules, the checkpoint they come from, and the loader."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.checkpoint: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.steps: list[Step] = []
        for number in range(self.source.randrange(1, 7)):
            self._add_parameter(f"m{self.source.randrange(3)}.p{number}")
        self._add_tensor((4, 3), torch.float32)  # that nobody wants

    def build(self) -> nn.Module:
        model = nn.Module()
        for name, (shape, dtype) in self.shapes.items():
            module, _, leaf = name.partition(".")
            if not hasattr(model, module):
                model.add_module(module, nn.Module())
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            setattr(model.get_submodule(module), leaf, parameter)
        return model

    def load(self, model: Any, weights: Weights) -> None:
        given = dict(weights)
        parameters = {name: p.data for name, p in model.named_parameters()}
        for step in self.steps:
            step(parameters, given)

    def tensors(self, version: int) -> Tensors:
        """Tensors that may be cast hold no NaN, whose bits do not survive every cast alike."""
        made = {}
        for number, (name, (shape, dtype)) in enumerate(self.checkpoint.items()):
            tensor = random_tensor(shape, dtype, 100 * version + number)
            if dtype in (torch.float32, torch.bfloat16, torch.float16):
                tensor = tensor.nan_to_num()
            made[name] = tensor
        return made

    def _add_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        name = f"t{len(self.checkpoint)}"
        self.checkpoint[name] = (shape, dtype)
        return name

    def _add_parameter(self, name: str) -> None:
        """A parameter, cut into slices along one dimension, each from some tensor."""
        shape = tuple(self.source.choice([1, 2, 3, 5, 8]) for _ in range(self.source.randrange(4)))
        dtype = self.source.choice(DTYPES)
        self.shapes[name] = (shape, dtype)
        if not shape:
            self._write(name, dtype, (), lambda parameter: parameter)
            return
        dim = self.source.randrange(len(shape))
        start = 0
        while start < shape[dim]:
            size = self.source.randrange(1, shape[dim] - start + 1)
            part = (*shape[:dim], size, *shape[dim + 1 :])

            def window(
                parameter: torch.Tensor, start: int = start, size: int = size
            ) -> torch.Tensor:
                return parameter.narrow(dim, start, size)

            self._write(name, dtype, part, window)
            start += size

    def _write(
        self,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        window: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        kind = self.source.choice(["whole", "slice", "transposed", "cast", "joined", "constant"])
        if kind in ("cast", "constant") and dtype not in (torch.float32, torch.bfloat16):
            kind = "whole"
        if kind == "constant":
            self.steps.append(lambda parameters, given: window(parameters[name]).fill_(0.75))
        elif kind == "slice" and shape:
            larger = tuple(size + self.source.randrange(4) for size in shape)
            starts = tuple(
                self.source.randrange(much - size + 1)
                for much, size in zip(larger, shape, strict=True)
            )
            box = tuple(
                slice(start, start + size) for start, size in zip(starts, shape, strict=True)
            )
            tensor = self._add_tensor(larger, dtype)
            self.steps.append(lambda ps, given: window(ps[name]).copy_(given[tensor][box]))
        elif kind == "transposed" and shape:
            order = list(range(len(shape)))
            self.source.shuffle(order)
            tensor = self._add_tensor(tuple(shape[dim] for dim in order), dtype)
            back = [order.index(dim) for dim in range(len(shape))]
            self.steps.append(lambda ps, given: window(ps[name]).copy_(given[tensor].permute(back)))
        elif kind == "joined" and shape:
            first, second = (self._add_tensor(shape, dtype) for _ in range(2))
            start = self.source.randrange(shape[0] + 1)
            self.steps.append(
                lambda ps, given: window(ps[name]).copy_(
                    torch.cat([given[first], given[second]]).narrow(0, start, shape[0])
                )
            )
        else:
            tensor = self._add_tensor(shape, torch.float16 if kind == "cast" else dtype)
            self.steps.append(lambda ps, given: window(ps[name]).copy_(given[tensor]))


@pytest.mark.parametrize("seed", range(80))
def test_worker_makes_what_the_loader_makes(seed: int, tmp_path: Path) -> None:
    model = RandomModel(seed)
    kind: Kind = "files" if seed % 2 else "memory"
    layout = cut_layout(model.tensors(0), segments=1 + seed % 4, seed=seed)
    host = ModuleHost(model.build, model.load)
    with open_trainer(layout, kind, tmp_path) as trainer:
        client = Client(ReloadWorker(host, 0, 1), trainer)
        client.attach()
        assert client.describe().untraced_reason == ""
        for version in (1, 2, 3):
            applied = client.apply(model.tensors(version), version)
            fresh = model.build()
            model.load(fresh, iter(model.tensors(version).items()))
            for (name, want), (_, found) in zip(
                fresh.named_parameters(), host.live.named_parameters(), strict=True
            ):
                assert same_bits(found, want), f"seed {seed}, version {version}: {name}"
        assert applied.processed_parameters == 0, applied.reason
    client.worker.close()

"""A host for small models, tensors of random bits, and what needs mean.

`replay` carries needs out as plainly as can be: the tests hold the tracer, the planner and the
executor to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from weightbus.consumers.reload.dtypes import DTYPE_NAMES, TORCH_DTYPES
from weightbus.consumers.reload.host import ModelHost, Weights
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Needs

Loader = Callable[[Any, Weights], None]


class Bag(nn.Module):
    """Parameters of the given shapes, all NaN until they are written."""

    def __init__(self, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            values = torch.full(shape, float("nan"), dtype=dtype)
            setattr(self, name, nn.Parameter(values, requires_grad=False))


class ModuleHost(ModelHost):
    """A host for a model that `build` makes and `load` loads, without post-processing."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        load: Loader,
        *,
        excused: Sequence[str] = (),
        process: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        self._build, self._load, self._excused, self._process = build, load, excused, process
        self.live = build()
        process(self.live)
        self.on_synchronize: Callable[[], None] = lambda: None
        self.reloads: list[tuple[frozenset[str] | None, tuple[str, ...]]] = []
        """Every reload: the modules asked for, and the names of the tensors handed over."""

    @property
    def name(self) -> str:
        return "Test"

    @property
    def device(self) -> str:
        return "cpu"

    def live_model(self) -> nn.Module:
        return self.live

    def scratch_model(self) -> nn.Module:
        with torch.device("meta"):
            return self._build()

    def load_weights(self, model: nn.Module, weights: Weights) -> None:
        self._load(model, weights)

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        given = list(weights)
        self.reloads.append((modules, tuple(name for name, _ in given)))
        with torch.no_grad():
            self._load(self.live, iter(given))
        self._process(self.live)

    def synchronize(self) -> None:
        self.on_synchronize()

    def free_bytes(self) -> int:
        return 0

    def may_stay_uncovered(self, buffer: str, *, persistent: bool) -> bool:
        return buffer in self._excused or not persistent


def load_by_name(model: nn.Module, weights: Weights) -> None:
    """The plainest loader: every tensor goes to the parameter or buffer of its name."""
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, weight in weights:
        targets[name].data.copy_(weight)


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """One segment per tensor."""
    items = list(tensors.values())
    return Layout(
        tuple(
            TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in tensors.items()
        ),
        tuple(
            ShardSpec(number, (0,) * t.dim(), tuple(t.shape), number, 0)
            for number, t in enumerate(items)
            if t.numel()
        ),
        tuple(SegmentSpec(t.nbytes) for t in items),
    )


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern is as likely as any other, except in BOOL; NaNs are among them."""
    generator = torch.Generator().manual_seed(seed)
    size_bytes = prod(shape) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (size_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(tuple(shape))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes; NaNs are bytes like others."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(_bytes(left), _bytes(right))
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def replay(needs: Needs, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `needs` make of a checkpoint: every parameter as a tensor of its own."""
    memory = []
    for spec in needs.parameters:
        extent = 1 + sum(
            (size - 1) * step for size, step in zip(spec.shape, spec.strides, strict=True)
        )
        memory.append(torch.zeros(max(extent, 1), dtype=TORCH_DTYPES[spec.dtype]))
    for fill in needs.fills:
        torch.as_strided(memory[fill.parameter], fill.sizes, fill.strides, fill.offset).fill_(
            fill.value
        )
    for copy in needs.copies:
        box = tensors[copy.tensor]
        for dim, (start, size) in enumerate(zip(copy.starts, copy.sizes, strict=True)):
            box = box.narrow(dim, start, size)
        for op, dtype in needs.transforms[copy.transform].ops if copy.transform >= 0 else ():
            box = box.to(TORCH_DTYPES[dtype]) if op == "cast" else getattr(torch, op)(box)
        target = memory[copy.parameter]
        if copy.transform < 0:
            box = box.contiguous().view(target.dtype)
        torch.as_strided(target, copy.sizes, copy.strides, copy.offset).copy_(box)
    return {
        spec.name: torch.as_strided(whole, spec.shape, spec.strides)
        for spec, whole in zip(needs.parameters, memory, strict=True)
    }

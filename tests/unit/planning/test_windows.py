"""Copies of a recorded write do what torch's own `copy_` between the windows does."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.windows import MAX_COPIES_PER_WRITE, copies_of_write
from weightbus.schemas.needs import Copy


def random_view(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """A view of `tensor` made with up to five of the view operations that loaders use."""
    for _ in range(rng.randint(0, 5)):
        operation = rng.choice(["permute", "narrow", "step", "flatten", "split", "select", "new"])
        dim = rng.randrange(tensor.dim()) if tensor.dim() else 0
        if operation == "permute":
            tensor = tensor.permute(rng.sample(range(tensor.dim()), tensor.dim()))
        elif operation == "new":
            tensor = tensor.unsqueeze(rng.randint(0, tensor.dim()))
        elif tensor.dim() == 0:
            continue
        elif operation == "narrow":
            start = rng.randint(0, tensor.size(dim))
            tensor = tensor.narrow(dim, start, rng.randint(0, tensor.size(dim) - start))
        elif operation == "step":
            start = rng.randint(0, tensor.size(dim))
            index = [slice(None)] * tensor.dim()
            index[dim] = slice(start, None, rng.randint(1, 3))
            tensor = tensor[tuple(index)]
        elif operation == "flatten" and tensor.is_contiguous() and tensor.numel():
            tensor = tensor.view(-1)
        elif operation == "split" and tensor.size(dim):
            factors = [f for f in range(1, tensor.size(dim) + 1) if tensor.size(dim) % f == 0]
            tensor = torch.unflatten(tensor, dim, (rng.choice(factors), -1))
        elif operation == "select" and tensor.size(dim):
            tensor = tensor.select(dim, rng.randrange(tensor.size(dim)))
    return tensor


def run(copies: list[Copy], source: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Execute copies over `memory`; returns how often each element was written."""
    written = torch.zeros_like(memory)
    for copy in copies:
        box = source
        for dim, (start, size) in enumerate(zip(copy.starts, copy.sizes, strict=True)):
            assert start + size <= source.size(dim)
            box = box.narrow(dim, start, size)
        places = torch.tensor(copy.offset)
        for size, stride in zip(copy.sizes, copy.strides, strict=True):
            places = places[..., None] + stride * torch.arange(size)
        memory[places] = box
        written[places] += 1
    return written


def window_copies(shape: list[int], source: torch.Tensor, target: torch.Tensor) -> list[Copy]:
    return copies_of_write(
        tensor=0,
        tensor_shape=shape,
        source_offset=int(source.storage_offset()),
        sizes=tuple(source.size()),
        source_strides=source.stride(),
        parameter=0,
        destination_offset=int(target.storage_offset()),
        destination_strides=target.stride(),
    )


@settings(max_examples=600, deadline=None)
@given(shape=st.lists(st.integers(0, 8), max_size=4), seed=st.integers(0, 2**32))
def test_copies_write_what_torch_writes_when_windows_are_random(
    shape: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    tensor = torch.arange(1, math.prod(shape) + 1).view(shape)
    source = random_view(tensor, rng)
    dims = list(range(source.dim()))
    order = rng.sample(dims, len(dims))
    padded = [source.size(dim) + rng.randint(0, 2) for dim in order]
    inverse = [order.index(dim) for dim in dims]

    def target_of(memory: torch.Tensor) -> torch.Tensor:
        window = memory[5:].view(padded).permute(inverse)
        return window[tuple(slice(0, extent) for extent in source.size())]

    expected = torch.zeros(5 + math.prod(padded), dtype=torch.int64)
    target_of(expected).copy_(source)
    found = torch.zeros_like(expected)
    copies = window_copies(shape, source, target_of(found))
    written = run(copies, tensor, found)
    assert torch.equal(found, expected), copies
    assert torch.equal(written, (expected > 0).long()), copies


@pytest.mark.parametrize(
    ("view", "count"),
    [
        (lambda t: t, 1),
        (lambda t: t.t(), 1),
        (lambda t: t[4:8], 1),
        (lambda t: t[:, 2:5], 1),
        (lambda t: t.view(-1), 1),
        (lambda t: t.view(3, 4, 6), 1),
        (lambda t: t.view(3, 4, 6).transpose(0, 1), 3),
        (lambda t: t.view(-1)[6:30], 1),
        (lambda t: t.view(-1)[4:33], 3),
        (lambda t: t[::2], 6),
        (lambda t: t[:, 0], 1),
        (lambda t: t.unsqueeze(1), 1),
        (lambda t: t[3, 5], 1),
        (lambda t: t[:0], 0),
    ],
)
def test_copies_are_as_few_as_can_be_when_window_is_common(view, count: int) -> None:  # type: ignore[no-untyped-def]
    tensor = torch.arange(1, 73).view(12, 6)
    source = view(tensor)
    memory = torch.zeros(source.numel(), dtype=torch.int64)
    copies = window_copies([12, 6], source, memory.view(source.size()))
    assert run(copies, tensor, memory).sum() == source.numel()
    assert torch.equal(memory.view(source.size()), source)
    assert len(copies) == count, copies


def test_copies_repeat_source_when_it_is_expanded() -> None:
    scale = torch.tensor([7, 8])
    source = scale[:, None].expand(2, 3)
    memory = torch.zeros(6, dtype=torch.int64)
    written = run(window_copies([2], source, memory.view(2, 3)), scale, memory)
    assert memory.tolist() == [7, 7, 7, 8, 8, 8]
    assert written.tolist() == [1] * 6


def test_copies_read_diagonal_when_stride_crosses_dimensions() -> None:
    tensor = torch.arange(1, 26).view(5, 5)
    memory = torch.zeros(5, dtype=torch.int64)
    run(window_copies([5, 5], tensor.diagonal(), memory), tensor, memory)
    assert memory.tolist() == [1, 7, 13, 19, 25]


def test_copies_reverse_when_source_stride_is_negative() -> None:
    memory = torch.zeros(6, dtype=torch.int64)
    copies = copies_of_write(0, [6], 5, [6], [-1], 0, 0, [1])
    run(copies, torch.arange(1, 7), memory)
    assert memory.tolist() == [6, 5, 4, 3, 2, 1]


def test_write_is_refused_when_window_leaves_tensor() -> None:
    with pytest.raises(PlanError, match="elements 2 to 6: must lie in a tensor of shape"):
        copies_of_write(0, [2, 3], 2, [5], [1], 0, 0, [1])


def test_write_is_refused_when_window_begins_before_parameter() -> None:
    with pytest.raises(PlanError, match="must not be negative"):
        copies_of_write(0, [4], 0, [4], [1], 0, 2, [-1])


def test_write_is_refused_when_destination_is_expanded() -> None:
    with pytest.raises(PlanError, match="must write an element once"):
        copies_of_write(0, [4], 0, [4], [1], 0, 0, [0])


def test_write_is_refused_when_it_takes_too_many_boxes() -> None:
    count = MAX_COPIES_PER_WRITE + 1
    with pytest.raises(PlanError, match="boxes"):
        copies_of_write(0, [2 * count], 0, [count], [2], 0, 0, [1])

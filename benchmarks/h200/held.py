"""What one rank holds: every byte of its parameters, compared with every byte of a version.

Does no I/O. Shares no code with what moves weights: where a checkpoint tensor lies in the
parameters is read off the windows of the engine's own loader, what it must hold is computed
(`weights.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from benchmarks.h200.weights import BITS, bits_of, box_bits, row_blocks, seed_of
from weightbus.consumers.engines.torch.model import CheckpointPart, ServedModel
from weightbus.consumers.engines.torch.parameter import ShardedParameter

__all__ = ("differences", "held_version", "holding")

VERSIONS: Final = 2048
"""Versions that are looked for."""

PROBED: Final = 64
"""Elements by which a version is recognised."""


def holding(model: ServedModel) -> str:
    """`version 7, 15290507264 bytes` if a model holds every byte of some version, else why not."""
    version = held_version(model)
    if version is None:
        return "no version: its first tensor is of none"
    found = differences(model, version)
    if found:
        return f"no version: of {version} but for {'; '.join(found[:4])} ({len(found)} in all)"
    held_bytes = sum(parameter.nbytes for parameter in set(model.parameters()))
    return f"version {version}, {held_bytes} bytes"


def held_version(model: ServedModel) -> int | None:
    """The version that the first elements of the first tensor are of."""
    part = next(iter(model.checkpoint_parts()))
    view, window = _held(part), part.parameter.windows[part.shard]
    if window.dim:
        raise AssertionError(f"{part.name} is cut by columns")
    first = view.reshape(view.shape[0], -1)[0, :PROBED].cpu()
    row_elements = view.shape[1] if view.dim() > 1 else 1
    seeds = torch.tensor([seed_of(part.name, v) for v in range(VERSIONS)], dtype=torch.int32)
    index = torch.arange(first.numel(), dtype=torch.int32) + window.source * row_elements
    index = index.expand(VERSIONS, -1).contiguous()
    equal = (bits_of(index, seeds.unsqueeze(1), view.element_size()) == first).all(dim=1)
    matches: list[int] = equal.nonzero().flatten().tolist()
    return matches[0] if matches else None


def differences(model: ServedModel, version: int) -> list[str]:
    """What of a model differs from a version, or belongs to no checkpoint tensor; empty: nothing.

    Padding must hold 0. Blocks until the device is done, and gives back the memory it took.
    """
    names: list[str] = []
    counts: list[torch.Tensor] = []
    covered: dict[ShardedParameter, int] = {}
    with torch.no_grad():
        for part in model.checkpoint_parts():
            names.append(part.name)
            counts.append(_count(part, version))
            covered[part.parameter] = covered.get(part.parameter, 0) + _elements(part)
        wrong: list[int] = torch.stack(counts).cpu().tolist()
    found = [f"{count} elements of {n}" for n, count in zip(names, wrong, strict=True) if count]
    return [*found, *_uncovered(model, covered)]


def _held(part: CheckpointPart) -> torch.Tensor:
    """The bits that a rank holds of a checkpoint tensor."""
    view = part.parameter.checkpoint_view(part.shard)
    return view.detach().view(BITS[view.element_size()])


def _count(part: CheckpointPart, version: int) -> torch.Tensor:
    """How many elements of a checkpoint tensor differ; stays on the device."""
    view, window = _held(part), part.parameter.windows[part.shard]
    if view.dim() > 2:
        raise AssertionError(f"{part.name} has {view.dim()} dimensions")
    matrix = view if view.dim() == 2 else view.unsqueeze(1)
    row, columns, row_elements = window.source, range(matrix.shape[1]), matrix.shape[1]
    if window.dim == 1:
        row, row_elements = 0, window.total
        columns = range(window.source, window.source + window.size)
    wrong = torch.zeros((), dtype=torch.int64, device=view.device)
    for begin, end in row_blocks(matrix.shape[0], matrix.shape[1], view.device):
        rows = range(row + begin, row + end)
        expected = box_bits(
            part.name, version, view.element_size(), rows, columns, row_elements, view.device
        )
        wrong += (matrix[begin:end] != expected).sum()
    if window.padding:
        parameter = part.parameter.detach()
        padded = parameter if window.place is None else parameter[window.place]
        wrong += padded.narrow(window.dim, window.start + window.size, window.padding).ne(0).sum()
    return wrong


def _elements(part: CheckpointPart) -> int:
    view, window = part.parameter.checkpoint_view(part.shard), part.parameter.windows[part.shard]
    padding = window.padding
    for dim, extent in enumerate(view.shape):
        padding *= 1 if dim == window.dim else extent
    return view.numel() + padding


def _uncovered(model: ServedModel, covered: dict[ShardedParameter, int]) -> Sequence[str]:
    return [
        f"{name}: {covered.get(parameter, 0)} of {parameter.numel()} elements are of a checkpoint"  # type: ignore[call-overload]
        for name, parameter in model.named_parameters()
        if covered.get(parameter, 0) != parameter.numel()  # type: ignore[call-overload]
    ]

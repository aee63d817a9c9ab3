"""What one rank holds: every byte of its parameters, compared with every byte of a version.

Does no I/O. Shares no code with what moves weights: where a checkpoint tensor lies in the
parameters is read off the windows of the engine's own loader, what it must hold is computed
(`weights.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.h200.weights import (
    BITS,
    CHUNK_ELEMENTS,
    bits_of,
    box_bits,
    row_blocks,
    seed_of,
)
from weightbus.consumers.engines.torch.model import CheckpointPart, ServedModel
from weightbus.consumers.engines.torch.parameter import ShardedParameter, Window

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
    window = part.parameter.windows[part.shard]
    if window.dim:
        raise AssertionError(f"{part.name} is cut by columns")
    view = part.parameter.checkpoint_view(part.shard).detach()
    view = view.view(BITS[view.element_size()])
    first = view.reshape(view.shape[0], -1)[0, :PROBED].cpu()
    row_elements = view.shape[1] if view.dim() > 1 else 1
    cpu = torch.device("cpu")  # whatever the default device is
    seeds = [seed_of(part.name, version) for version in range(VERSIONS)]
    seed = torch.tensor(seeds, dtype=torch.int32, device=cpu).unsqueeze(1)
    index = torch.arange(first.numel(), dtype=torch.int32, device=cpu)
    index += window.source * row_elements
    index = index.expand(VERSIONS, -1).contiguous()
    equal = (bits_of(index, seed, view.element_size()) == first).all(dim=1)
    matches: list[int] = equal.nonzero().flatten().tolist()
    return matches[0] if matches else None


def differences(model: ServedModel, version: int) -> list[str]:
    """What of a model differs from a version, or belongs to no checkpoint tensor; empty: nothing.

    Padding must hold 0. Blocks until the device is done.
    """
    names: list[str] = []
    counts: list[torch.Tensor] = []
    covered: dict[ShardedParameter, int] = {}
    with torch.no_grad():
        for boxes in _boxes(model):
            names += boxes.names
            counts.append(_count(boxes, version))
            covered[boxes.parameter] = covered.get(boxes.parameter, 0) + boxes.elements
        wrong: list[int] = torch.cat(counts).cpu().tolist()
    found = [f"{count} elements of {n}" for n, count in zip(names, wrong, strict=True) if count]
    return [*found, *_uncovered(model, covered)]


@dataclass(frozen=True)
class _Boxes:
    """What a rank holds of several checkpoint tensors of one shape, which lie one after the other.

    Experts are stacked; compared one by one they would take longer than their bytes do.
    """

    names: list[str]
    parameter: ShardedParameter
    window: Window
    """Of the first."""
    bits: torch.Tensor
    """[tensors, rows, columns]"""
    padding: torch.Tensor
    """Of the same tensors; empty if there is none."""

    @property
    def elements(self) -> int:
        return self.bits.numel() + self.padding.numel()


def _boxes(model: ServedModel) -> Iterator[_Boxes]:
    stacks: dict[tuple[ShardedParameter, Window], list[CheckpointPart]] = {}
    for part in model.checkpoint_parts():
        anywhere = part.parameter.windows[part.shard]._replace(place=None)
        stacks.setdefault((part.parameter, anywhere), []).append(part)
    for parts in stacks.values():
        group: list[CheckpointPart] = []
        for part in parts:
            if group and not _follows(part, group):
                yield _boxes_of(group)
                group = []
            group.append(part)
        yield _boxes_of(group)


def _follows(part: CheckpointPart, group: list[CheckpointPart]) -> bool:
    """Whether a part is the next of a stack, and small enough to be compared with those before."""
    place = part.parameter.windows[part.shard].place
    before = group[-1].parameter.windows[group[-1].shard].place
    elements = part.parameter[0].numel() * (len(group) + 1)
    return (
        place is not None
        and before is not None
        and place == before + 1
        and elements <= CHUNK_ELEMENTS[part.parameter.device.type]
    )


def _boxes_of(group: list[CheckpointPart]) -> _Boxes:
    first = group[0]
    window = first.parameter.windows[first.shard]
    held = first.parameter.detach().view(BITS[first.parameter.element_size()])
    if window.place is None:
        stack = held.unsqueeze(0)
    else:
        stack = held[window.place : window.place + len(group)]
    if stack.dim() == 2:
        stack = stack.unsqueeze(2)
    if stack.dim() != 3:
        raise AssertionError(f"{first.name} has {stack.dim() - 1} dimensions")
    end = window.start + window.size
    return _Boxes(
        names=[part.name for part in group],
        parameter=first.parameter,
        window=window,
        bits=stack.narrow(1 + window.dim, window.start, window.size),
        padding=stack.narrow(1 + window.dim, end, window.padding),
    )


def _count(boxes: _Boxes, version: int) -> torch.Tensor:
    """How many elements of each tensor differ; stays on the device."""
    window, bits = boxes.window, boxes.bits
    row, columns, row_elements = window.source, range(bits.shape[2]), bits.shape[2]
    if window.dim == 1:
        row, row_elements = 0, window.total
        columns = range(window.source, window.source + window.size)
    wrong = boxes.padding.ne(0).sum(dim=(1, 2))
    for begin, end in row_blocks(bits.shape[1], len(boxes.names) * bits.shape[2], bits.device):
        rows = range(row + begin, row + end)
        expected = box_bits(
            boxes.names, version, bits.element_size(), rows, columns, row_elements, bits.device
        )
        wrong += (bits[:, begin:end] != expected).sum(dim=(1, 2))
    return wrong


def _uncovered(model: ServedModel, covered: dict[ShardedParameter, int]) -> Sequence[str]:
    return [
        f"{name}: {covered.get(parameter, 0)} of {parameter.numel()} elements are of a checkpoint"  # type: ignore[call-overload]
        for name, parameter in model.named_parameters()
        if covered.get(parameter, 0) != parameter.numel()  # type: ignore[call-overload]
    ]

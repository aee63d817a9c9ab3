"""What a plan makes of one version, in memory of its own: the live parameters are not touched.

Does no I/O but through the open segments. The memory is of the executor's device. Parameters are
made many at a time, so that a plan is cut and bound once for many of them, however small they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Final

import torch

from weightbus.consumers.planning.tiles import BoundTiles, TilePlan, bind_tiles
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.portions import Portion, cut_portions, part_of_plan
from weightbus.consumers.reload.staging import StagedSources
from weightbus.schemas.needs import ParameterSpec

__all__ = ("MADE_BYTES", "SLACK_BYTES", "batch_bytes", "made_parameters", "returned_memory")

MADE_BYTES: Final = 512 * 2**20
"""Of parameters that are made at once, unless a single one is larger."""

SLACK_BYTES: Final = 512 * 2**20
"""Of a device's memory, beside what is made: tables, blocks, what comparing takes, and what torch
rounds up."""

_SMALLEST_SHARE: Final = 4
"""One part in so many of a device's free memory is taken if that is less than `MADE_BYTES`."""


def made_parameters(
    plan: TilePlan,
    numbers: Iterable[int],
    sources: StagedSources,
    move: Callable[[BoundTiles], object],
    deadline: Deadline,
    device: torch.device | str = "cpu",
    most_bytes: int = MADE_BYTES,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Some parameters of a plan by number, in their order; gaps between their elements are 0.

    At most `most_bytes` of them, or a single one, are made at once, and let go of as they are given
    out: who keeps none but the last holds up one more.

    Args:
        move: writes them; called with portions of the plan, each of whole copies.
        device: of the memory that it writes to, and that the sources can be read by.

    Raises:
        SegmentUnavailable: a file ended too early or cannot be read.
        DeadlineExceeded: noticed between two portions.
    """
    specs = plan.needs.parameters
    for batch in _batches(specs, numbers, most_bytes):
        memory = {number: _unwritten(specs[number], device) for number in batch}
        addresses, sizes = [0] * len(specs), [0] * len(specs)
        for number, flat in memory.items():
            addresses[number], sizes[number] = flat.data_ptr(), flat.nbytes
        part = part_of_plan(plan, batch)
        for portion in cut_portions(part) if sources.has_fetched else (Portion(part, ()),):
            deadline.check()
            with sources.fetched(portion.ranges):
                move(
                    bind_tiles(
                        portion.plan, sources.addresses, sources.sizes_bytes, addresses, sizes
                    )
                )
        for number in batch:
            flat = memory.pop(number)
            yield number, torch.as_strided(flat, specs[number].shape, specs[number].strides)
            del flat


def batch_bytes(specs: Iterable[ParameterSpec], free_bytes: int) -> int | None:
    """How much to make at once on a device that has so much memory left; None: it has no room for
    the largest, another one of that size that somebody still looks at, and `SLACK_BYTES`.

    Raises:
        KeyError: torch has no such dtype.
    """
    largest = max(map(_size_bytes, specs), default=0)
    most = min(MADE_BYTES, max(largest, free_bytes // _SMALLEST_SHARE))
    return most if max(most, largest) + largest + SLACK_BYTES <= free_bytes else None


@contextmanager
def returned_memory(device: torch.device | str) -> Iterator[None]:
    """What was made within, and nobody has kept, goes back from torch to the device."""
    try:
        yield
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def _batches(
    specs: Sequence[ParameterSpec], numbers: Iterable[int], most_bytes: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    used = 0
    for number in numbers:
        size_bytes = _size_bytes(specs[number])
        if batch and used + size_bytes > most_bytes:
            yield batch
            batch, used = [], 0
        batch.append(number)
        used += size_bytes
    if batch:
        yield batch


def _unwritten(spec: ParameterSpec, device: torch.device | str) -> torch.Tensor:
    """[extent]: the memory of a parameter; 0 if there are gaps."""
    extent = _extent(spec)
    make = torch.empty if extent == prod(spec.shape) else torch.zeros
    return make(extent, dtype=TORCH_DTYPES[spec.dtype], device=device)


def _size_bytes(spec: ParameterSpec) -> int:
    return _extent(spec) * TORCH_DTYPES[spec.dtype].itemsize


def _extent(spec: ParameterSpec) -> int:
    """Elements from a parameter's first to its last, gaps included."""
    return 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.strides, strict=True))

"""What a plan makes of one version, in memory of its own: the live parameters are not touched.

Does no I/O but through the open segments. Parameters are made many at a time, so that a plan is
cut and bound once for about `MADE_BYTES` of them, however small they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch

from weightbus.consumers.planning.tiles import TilePlan, bind_tiles
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.portions import cut_portions, part_of_plan
from weightbus.consumers.reload.staging import StagedSources
from weightbus.schemas.needs import ParameterSpec

__all__ = ("MADE_BYTES", "made_parameters")

MADE_BYTES: Final = 256 * 2**20
"""Of parameters that are held at once, unless a single one is larger."""


def made_parameters(
    plan: TilePlan,
    numbers: Iterable[int],
    sources: StagedSources,
    executor: CpuExecutor,
    deadline: Deadline,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Some parameters of a plan by number, ascending; gaps between their elements are 0.

    Raises:
        SegmentUnavailable: a file ended too early or cannot be read.
        DeadlineExceeded: noticed between two portions.
    """
    specs = plan.needs.parameters
    for batch in _batches(specs, sorted(numbers)):
        memory = {
            number: torch.zeros(
                _extent(specs[number]), dtype=TORCH_DTYPES[specs[number].dtype], device="cpu"
            )
            for number in batch
        }
        addresses, sizes = [0] * len(specs), [0] * len(specs)
        for number, flat in memory.items():
            addresses[number], sizes[number] = flat.data_ptr(), flat.nbytes
        for portion in cut_portions(part_of_plan(plan, batch)):
            deadline.check()
            with sources.fetched(portion.ranges):
                executor.move(
                    bind_tiles(
                        portion.plan, sources.addresses, sources.sizes_bytes, addresses, sizes
                    )
                )
        for number in batch:
            flat = memory.pop(number)
            yield number, torch.as_strided(flat, specs[number].shape, specs[number].strides)


def _batches(specs: Sequence[ParameterSpec], numbers: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    used = 0
    for number in numbers:
        size_bytes = _extent(specs[number]) * TORCH_DTYPES[specs[number].dtype].itemsize
        if batch and used + size_bytes > MADE_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(number)
        used += size_bytes
    if batch:
        yield batch


def _extent(spec: ParameterSpec) -> int:
    """Elements from a parameter's first to its last, gaps included."""
    return 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.strides, strict=True))

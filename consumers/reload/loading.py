"""Whole checkpoint tensors for an engine's own loader: private copies, digested as they are made.

Does no I/O but through the open segments. `read_on_host` makes them in main memory, `DeviceTensors`
on a device, where the executor that moves and digests does it by a plan of its own: every tensor is
a parameter, and all of it one copy.

Invariant: the digest of a cell is of the very bytes that are given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Final

import msgspec
import numpy as np
import torch

from weightbus.bus.digest import digest_box
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.boxes import Box, blocks_of
from weightbus.consumers.planning.tiles import BoundTiles, plan_tiles
from weightbus.consumers.reload.checkpoint import Checkpoint, bytes_of
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.executor import Sums, make_executor
from weightbus.consumers.reload.grouping import Held
from weightbus.consumers.reload.making import SLACK_BYTES, batch_bytes, made_parameters
from weightbus.consumers.reload.portions import part_of_plan
from weightbus.consumers.reload.staging import StagedSources
from weightbus.consumers.reload.threads import Threads
from weightbus.consumers.reload.transforms import INEXACT
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Copy, Needs, ParameterSpec
from weightbus.schemas.worker import Cell

__all__ = (
    "CellsOf",
    "DeviceTensors",
    "Read",
    "Room",
    "inexact_tensors",
    "needs_of_tensors",
    "read_on_host",
)

READ_BYTES: Final = 64 * 2**20
"""Of tensors that several threads digest at once, unless a single one is larger."""

DIGESTED_BYTES: Final = 4 * 2**20
"""That one thread digests at once."""

HELD_SHARE: Final = 3
"""One part in so many of what is left of a device's memory may be held by a loader: a module takes
as much again when it is made anew, and again when it is processed."""

CellsOf = Mapping[int, Sequence[int]]
"""Tensor -> numbers of some of its cells."""

Read = Callable[[Iterable[int]], Iterator[tuple[int, torch.Tensor]]]
"""Tensors of some numbers, in their order, of which each is private."""

_MASK: Final = 2**64 - 1


def inexact_tensors(needs: Needs) -> frozenset[int]:
    """Tensors that are computed with where a device and a processor differ in the last bit: whoever
    loads them, and whoever writes them, does so in main memory."""
    inexact = {
        number
        for number, transform in enumerate(needs.transforms)
        if any(op in INEXACT for op, _ in transform.ops)
    }
    return frozenset(copy.tensor for copy in needs.copies if copy.transform in inexact)


@dataclass(frozen=True)
class Room:
    """Memory of a device that what is given out may take."""

    made_bytes: int
    """Made at once."""
    held_bytes: int
    """Held by whoever was given them; what comes beyond that comes in main memory."""


class DeviceTensors:
    """The tensors of one layout, made on a device. Not for several threads.

    Keeps tables in main memory, none on the device. What is given out takes as much of it as `Room`
    says.

    Args:
        layout: has been checked by `check_layout`.
        cells: have been checked by `check_cells`.
        on_host: tensors that are given out as copies in main memory.

    Raises:
        PlanError: torch does not know a dtype, or there are too many tiles.
        CudaFailed: the device cannot be used.
    """

    def __init__(
        self,
        layout: Layout,
        cells: Sequence[Cell],
        on_host: frozenset[int],
        device: str,
        threads: Threads,
    ) -> None:
        for spec in layout.tensors:
            if spec.dtype not in TORCH_DTYPES:
                raise PlanError(f"dtype of {spec.name}", spec.dtype, "this torch does not know it")
        self._on_host = on_host
        plan = plan_tiles(layout, needs_of_tensors(layout, range(len(layout.tensors))))
        self._plan = replace(plan, tiles=plan.tiles[:0])  # executors run pieces
        whole = [msgspec.structs.replace(cell, copy=cell.tensor) for cell in cells]
        self._executor = make_executor(device, layout, self._plan.needs, whole, threads)
        self._executor.prepare(part_of_plan(self._plan, [0] if layout.tensors else []))

    @property
    def device(self) -> torch.device:
        """Where they are made."""
        return self._executor.device

    def room(self, numbers: Iterable[int], free_bytes: int) -> Room | None:
        """For some tensors, on a device that has so much memory left; None: it has none for them,
        as `batch_bytes` says."""
        specs = [self._plan.needs.parameters[number] for number in numbers]
        made_bytes = batch_bytes(specs, free_bytes)
        if made_bytes is None:
            return None
        largest = max((prod(s.shape) * TORCH_DTYPES[s.dtype].itemsize for s in specs), default=0)
        left = free_bytes - max(made_bytes, largest) - SLACK_BYTES
        return Room(made_bytes, left // HELD_SHARE)

    def read(
        self,
        numbers: Iterable[int],
        cells: CellsOf,
        sources: StagedSources,
        digests: Sums,
        deadline: Deadline,
        room: Room,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Some tensors by number, in their order; all of them are private.

        Args:
            digests: of every cell; those of `cells` are set before their tensor is given out.
            sources: for this device to read.
            room: as `room` said.

        Raises:
            SegmentUnavailable: a file ended too early or cannot be read.
            DeadlineExceeded: noticed between two batches.
            CudaFailed
        """

        def move(bound: BoundTiles) -> None:
            tensors = np.unique(bound.plan.pieces.copy).tolist()
            chosen = [cell for number in tensors for cell in cells.get(number, ())]
            digests[chosen] = self._executor.update(bound, chosen)

        held = Held(room.held_bytes)
        for number, tensor in made_parameters(
            self._plan, numbers, sources, move, deadline, self.device, room.made_bytes
        ):
            if number in self._on_host or not held.takes(tensor):
                tensor = tensor.to("cpu", copy=True)
            yield number, tensor


def read_on_host(
    checkpoint: Checkpoint,
    numbers: Iterable[int],
    cells: Sequence[Cell],
    chosen: CellsOf,
    digests: Sums,
    deadline: Deadline,
    threads: Threads,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Some tensors by number, in their order, in main memory; all of them are private.

    With several threads, tensors of `READ_BYTES`, or a single one, are read at once, and let go of
    as they are given out; with one, a single tensor.

    Args:
        cells: of the layout.
        chosen: those that are digested.
        digests: of every cell; the chosen ones are set before their tensor is given out.

    Raises:
        PlanError: torch has no such dtype.
        SegmentUnavailable: a segment ended too early.
        DeadlineExceeded: noticed between two tensors.
    """
    batch: dict[int, torch.Tensor] = {}
    used = 0
    most_bytes = READ_BYTES if threads.count > 1 else 0
    waiting = iter(numbers)
    while True:
        for number in waiting:
            deadline.check()
            batch[number] = checkpoint.tensor(number)
            used += batch[number].nbytes
            if used >= most_bytes:
                break
        if not batch:
            return
        _digest_batch(checkpoint, batch, cells, chosen, digests, threads)
        for number in list(batch):
            yield number, batch.pop(number)
        used = 0


def _digest_batch(
    checkpoint: Checkpoint,
    batch: Mapping[int, torch.Tensor],
    cells: Sequence[Cell],
    chosen: CellsOf,
    digests: Sums,
    threads: Threads,
) -> None:
    """Digest cells of some tensors, large ones by parts."""
    parts: list[tuple[int, torch.Tensor, Box]] = []
    for tensor, data in batch.items():
        for number in chosen.get(tensor, ()):
            digests[number] = 0
            box = Box.of(cells[number].starts, cells[number].sizes)
            if box.elements:
                most = DIGESTED_BYTES // data.itemsize if threads.count > 1 else box.elements
                parts += ((number, data, block) for block in blocks_of(box, most))
    calls = [partial(_digest_part, data, box) for _, data, box in parts]
    for (number, _, _), digest in zip(parts, threads.run(calls), strict=True):
        digests[number] = int(digests[number]) + digest & _MASK


def _digest_part(tensor: torch.Tensor, box: Box) -> int:
    whole = bytes_of(tensor).reshape(*tensor.shape, tensor.itemsize)
    part = np.ascontiguousarray(whole[tuple(map(slice, box.starts, box.ends))])
    return digest_box(part.reshape(-1), tuple(tensor.shape), tensor.itemsize, box.starts, box.sizes)


def needs_of_tensors(layout: Layout, numbers: Sequence[int]) -> Needs:
    """What makes a parameter of every one of some tensors, by one copy of the same number."""
    parameters, copies = [], []
    for place, number in enumerate(numbers):
        spec = layout.tensors[number]
        strides = tuple(prod(spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
        parameters.append(ParameterSpec(spec.name, spec.dtype, spec.shape, strides))
        copies.append(Copy(number, (0,) * len(spec.shape), spec.shape, place, 0, strides))
    return Needs(tuple(parameters), tuple(copies))

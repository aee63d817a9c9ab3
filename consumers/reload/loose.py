"""Digests cells that are neither moved nor handed to an engine's loader, where their bytes are.

Does no I/O but through the open segments. Writes nothing, and takes memory only for tables, and in
main memory for what must be fetched before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import bind_tiles, plan_tiles
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.executor import Sums, make_executor
from weightbus.consumers.reload.loading import needs_of_tensors
from weightbus.consumers.reload.portions import Portion, cut_portions, part_of_plan
from weightbus.consumers.reload.staging import StagedSources
from weightbus.consumers.reload.threads import Threads
from weightbus.schemas.layout import Layout
from weightbus.schemas.worker import Cell

__all__ = ("LooseCells",)


class LooseCells:
    """Some cells of one layout. Not for several threads.

    Args:
        layout: has been checked by `check_layout`.
        cells: by number; have been checked by `check_cells`.
        device: that reads the segments.

    Raises:
        PlanError: nothing reads there, or there are too many tiles.
        CudaFailed: the device cannot be used.
    """

    def __init__(
        self, layout: Layout, cells: Mapping[int, Cell], device: str, threads: Threads
    ) -> None:
        self.numbers = tuple(cells)
        self.is_on_device = device != "cpu"
        """Whether that is a GPU."""
        tensors = sorted({cell.tensor for cell in cells.values()})
        needs = needs_of_tensors(layout, tensors)
        copy_of = {tensor: number for number, tensor in enumerate(tensors)}
        self._copies = np.array([copy_of[cell.tensor] for cell in cells.values()], dtype=np.int64)
        """Of every cell: the copy that names its tensor's bytes."""
        plan = plan_tiles(layout, needs)
        self._portions = cut_portions(plan)
        self._nothing = part_of_plan(plan, ())
        unheld = [msgspec.structs.replace(cell, copy=-1) for cell in cells.values()]
        self._executor = make_executor(device, layout, needs, unheld, threads)

    def digest(self, sources: StagedSources, digests: Sums, deadline: Deadline) -> None:
        """Set the digests of these cells.

        Args:
            digests: of every cell.
            sources: for the device to read.

        Raises:
            SegmentUnavailable: a file ended too early or cannot be read.
            DeadlineExceeded: noticed between two portions.
            CudaFailed
        """
        digests[list(self.numbers)] = 0
        if not sources.has_fetched:
            deadline.check()
            self._digest(np.arange(self._copies.size), sources, digests)
            return
        for portion in self._portions:
            deadline.check()
            with sources.fetched(portion.ranges):
                self._digest(self._cells_of(portion), sources, digests)

    def _cells_of(self, portion: Portion) -> Integers:
        return np.flatnonzero(np.isin(self._copies, portion.plan.pieces.copy))

    def _digest(self, chosen: Integers, sources: StagedSources, digests: Sums) -> None:
        none = [0] * len(self._nothing.needs.parameters)
        bound = bind_tiles(self._nothing, sources.addresses, sources.sizes_bytes, none, none)
        numbers = np.array(self.numbers, dtype=np.int64)[chosen]
        digests[numbers] = self._executor.digest_cells(bound, chosen.tolist())

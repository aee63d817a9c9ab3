"""Makes of a version what the engine's own loader is given, and what proves a plan.

Does no I/O but through the open segments. All of it is made where the live parameters are, by what
writes those, if there is room: a GPU reads, digests and compares faster than a processor by far.
Else it is made in main memory; what is found out is the same.

Owns plans and executors, which are made before the engine is paused, and no memory of the device
between two calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.tiles import TilePlan
from weightbus.consumers.reload.checkpoint import Checkpoint
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.executor import Executor, Sums, make_executor
from weightbus.consumers.reload.faults import settle
from weightbus.consumers.reload.host import ModelHost
from weightbus.consumers.reload.loading import (
    CellsOf,
    DeviceTensors,
    Read,
    inexact_tensors,
    read_on_host,
)
from weightbus.consumers.reload.making import (
    MADE_BYTES,
    batch_bytes,
    made_parameters,
    returned_memory,
)
from weightbus.consumers.reload.proof import Made
from weightbus.consumers.reload.staging import StagedSources
from weightbus.consumers.reload.threads import Threads
from weightbus.consumers.transfer.gpu import Gpu
from weightbus.consumers.transfer.segments import OpenSegment
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("Maker", "Reading")

_logger = logging.getLogger(__name__)

Planned = TypeVar("Planned")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which version is read, and what is digested of it."""

    segments: Sequence[OpenSegment]
    checkpoint: Checkpoint
    """The same segments."""
    digests: Sums
    """Of every cell; those that are asked for are set as their tensor is read."""
    deadline: Deadline


class Maker:
    """Of one layout, for one rank. Not for several threads.

    Args:
        needs: of its plan; None: there is none, since the model cannot be traced. What the engine
            computes then is not known, and all is made in main memory.
        gpu: where the live parameters are; None: in main memory.
    """

    def __init__(
        self,
        host: ModelHost,
        layout: Layout,
        needs: Needs | None,
        threads: Threads,
        gpu: Gpu | None,
    ) -> None:
        self._host, self._layout, self._needs = host, layout, needs
        self._threads, self._gpu = threads, gpu
        self._cells: tuple[Cell, ...] = ()
        self._is_refused = False
        """Nothing can be made on the device."""
        self._tensors: DeviceTensors | None = None
        self._executor: Executor | None = None
        """Of parameters on the device, and of the cells that copies hold."""

    def attach(self, cells: tuple[Cell, ...]) -> None:
        """Digest these from now on."""
        self._cells, self._tensors, self._executor = cells, None, None

    def plan(self, *, proves: bool) -> None:
        """What takes seconds for a large model, and touches no parameter.

        Args:
            proves: a proof is to be made; else the engine only loads.

        Raises:
            DeviceLost
        """
        if proves:
            self._planned_executor()
        self._planned_tensors()

    def finish(self, *, loads_again: bool) -> Executor | None:
        """There is a proof: what it took goes, and with it what the engine was given, unless it
        loads some of it in every update.

        Returns: what has made parameters on the device: it writes all of them, and digests the
        cells that copies hold, by their order; None: nothing has.
        """
        executor, self._executor = self._executor, None
        if not loads_again:
            self._tensors = None
        return executor

    @contextmanager
    def reading(self, version: Reading, tensors: Iterable[int], cells: CellsOf) -> Iterator[Read]:
        """Reads some of these tensors, and digests their `cells`. On the device only if the engine
        takes them from there.

        Raises:
            SegmentUnavailable, DeadlineExceeded, CudaFailed: also whoever reads.
        """
        planned = self._planned_tensors()
        room = planned.room(tensors, self._host.free_bytes()) if planned else None
        if planned is None or room is None:
            yield lambda numbers: read_on_host(
                version.checkpoint,
                numbers,
                self._cells,
                cells,
                version.digests,
                version.deadline,
                self._threads,
            )
            return
        found = room
        with (
            StagedSources(version.segments, self._gpu) as sources,
            returned_memory(planned.device),
        ):
            yield lambda numbers: planned.read(
                numbers, cells, sources, version.digests, version.deadline, found
            )

    @contextmanager
    def making(self, version: Reading, plan: TilePlan) -> Iterator[Callable[[Iterable[int]], Made]]:
        """Makes parameters of a plan of all needs.

        Raises:
            SegmentUnavailable, DeadlineExceeded, CudaFailed: also whoever makes.
        """
        executor, gpu, most_bytes = self._planned_executor(), self._gpu, None
        if executor is not None:
            most_bytes = batch_bytes(plan.needs.parameters, self._host.free_bytes())
        if executor is None or most_bytes is None:
            executor = CpuExecutor(self._layout, plan.needs, (), self._threads)
            gpu, most_bytes = None, MADE_BYTES
        move, device, room_bytes = executor.move, executor.device, most_bytes
        plan = replace(plan, tiles=plan.tiles[:0])  # executors run pieces, and tiles take long
        with StagedSources(version.segments, gpu) as sources, returned_memory(device):
            yield lambda numbers: made_parameters(
                plan, numbers, sources, move, version.deadline, device, room_bytes
            )

    def _planned_tensors(self) -> DeviceTensors | None:
        """What makes tensors on the device; None: they are made in main memory."""
        if self._tensors is None and self._host.takes_device_tensors():
            self._tensors = self._planned(
                lambda needs: DeviceTensors(
                    self._layout,
                    self._cells,
                    inexact_tensors(needs),
                    self._host.device,
                    self._threads,
                )
            )
        return self._tensors

    def _planned_executor(self) -> Executor | None:
        """The same of parameters."""
        if self._executor is None:
            held = [cell for cell in self._cells if cell.copy >= 0]
            self._executor = self._planned(
                lambda needs: make_executor(
                    self._host.device, self._layout, needs, held, self._threads
                )
            )
        return self._executor

    def _planned(self, make: Callable[[Needs], Planned]) -> Planned | None:
        if self._gpu is None or self._needs is None or self._is_refused:
            return None
        try:
            return make(self._needs)
        except (PlanError, CudaFailed) as error:
            self._is_refused = True
            settle(self._host)
            _logger.warning("the first version is made in main memory: %s", error)
            return None

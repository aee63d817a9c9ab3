"""What moves bytes into parameters and digests them, wherever the parameters are. Does no I/O.

`CpuExecutor` does it for main memory, `GpuExecutor` for the memory of a GPU; `make_executor`
chooses. Both leave the same bytes and report the same digests.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

if TYPE_CHECKING:
    from weightbus.consumers.reload.threads import Threads

__all__ = ("PORTION_BYTES", "WHOLE_PLAN", "Executor", "Sums", "check_device", "make_executor")

Sums = npt.NDArray[np.uint64]

PORTION_BYTES: Final = 256 * 2**20
"""Of segments that one portion spans, unless a single copy spans more."""

WHOLE_PLAN: Final = 2**63 - 1
"""As `PORTION_BYTES`: all of a plan is one portion."""


class Executor(ABC):
    """Runs bound plans of one layout and one rank's needs, and digests the rank's cells.

    Not for several threads at once. Torn reads are the caller's to look for, after `move`.

    Invariant: nothing is read or written any more once a method has returned or raised.

    Raises (all methods of an executor for GPUs):
        CudaFailed: the driver, the kernel or torch on the device; parameters may have been written.
    """

    device: torch.device
    """Where the parameters are that it writes."""
    portion_bytes: int = PORTION_BYTES
    """Of segments that one `update` should span: a deadline is looked at between two. Where some of
    it is fetched first it spans `PORTION_BYTES` at most."""

    @abstractmethod
    def prepare(self, plan: TilePlan) -> None:
        """Make ready what `update` and the others need of a plan, which may take seconds.

        What has not been prepared is made ready when it is first run. It is kept as long as the
        plan itself.

        Raises:
            PlanError: the plan does not fit the executor's layout and needs.
        """

    @abstractmethod
    def move(self, bound: BoundTiles) -> int:
        """Write everything that the plan holds into the parameters. Returns the bytes it read.

        Raises:
            PlanError: torch cannot do a transform or a fill; parameters may have been written.
        """

    @abstractmethod
    def update(self, bound: BoundTiles, numbers: Iterable[int]) -> Sums:
        """Move, and return the digests of cells, in order, of what was written.

        `bound` may be a portion of the plan: then the numbers are of cells that are whole once it
        has been moved.

        Raises:
            PlanError: torch cannot do a transform or a fill; parameters may have been written.
        """

    @abstractmethod
    def changed_parameter(self, bound: BoundTiles) -> int | None:
        """A parameter that `move(bound)` would make another one of; None: it changes no byte.

        Looks at what is copied, not at fills: they are the same in every version.
        """

    @abstractmethod
    def digest_cells(self, bound: BoundTiles, numbers: Iterable[int] | None = None) -> Sums:
        """The digests of cells, in order, of what `move(bound)` has just written; None: of all.

        `bound` may be a portion of the plan: then the numbers are of cells of its copies.
        """

    @abstractmethod
    def read_back(self, bound: BoundTiles) -> tuple[Sums, tuple[int, ...]]:
        """The digest of every cell as the parameters hold it now; no segment need be there.

        Cells that cannot be read back (transformed, or of no copy) are 0; their numbers follow.
        """


def check_device(device: str | torch.device) -> None:
    """Whether `make_executor` knows the kind of a device; the device itself is not asked.

    Raises:
        PlanError: nothing writes to such a device, or not here: says what is missing.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise PlanError("device of the parameters", device, "nothing writes there yet")
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        limit = "needs Triton to be written: pip install triton"
        raise PlanError("device of the parameters", device, limit)


def make_executor(
    device: str | torch.device,
    layout: Layout,
    needs: Needs,
    cells: Sequence[Cell],
    threads: Threads | None = None,
) -> Executor:
    """The executor for parameters on one device.

    Args:
        layout: has been checked by `check_layout`.
        needs: the plans'; the numbers of copies and parameters are the same.
        cells: what shall be digested; if a copy that transforms has any, they hold all of its box.
        threads: what works in main memory; None: the caller's own.

    Raises:
        PlanError: as `check_device`.
        CudaFailed: the device cannot be used.
    """
    from weightbus.consumers.reload.accelerator import CudaAccelerator
    from weightbus.consumers.reload.cpu import CpuExecutor
    from weightbus.consumers.reload.gpu import GpuExecutor

    check_device(device)
    place = torch.device(device)
    if place.type == "cpu":
        return CpuExecutor(layout, needs, cells, threads)
    return GpuExecutor(layout, needs, cells, CudaAccelerator(place))

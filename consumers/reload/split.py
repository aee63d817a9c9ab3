"""What an update moves and what it leaves to the engine, by one proof. Does no I/O.

Invariant: every cell is either of a copy to a direct parameter, and digested as it is moved, or
*loose*: digested from a private copy of its tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from weightbus.consumers.planning.tiles import TilePlan
from weightbus.consumers.reload.executor import PORTION_BYTES, Executor, make_executor
from weightbus.consumers.reload.loading import CellsOf
from weightbus.consumers.reload.portions import Portion, cut_portions, part_of_plan
from weightbus.consumers.reload.proof import Proof
from weightbus.consumers.reload.threads import Threads
from weightbus.schemas.layout import Layout
from weightbus.schemas.worker import Cell

__all__ = ("Split", "split_update")

Steps = tuple[tuple[Portion, npt.NDArray[np.int64]], ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How each parameter and each cell is dealt with."""

    proof: Proof
    whole: TilePlan
    """Of all parameters."""
    plan: TilePlan
    """Of the direct ones."""
    steps: Steps
    """The same, step by step: what is moved, and the `moved_cells` (by place) digested after it."""
    moved_cells: npt.NDArray[np.int64]
    """Numbers of the cells that the plan moves."""
    executor: Executor
    """For the plan and those cells, on the parameters' device."""
    copy_of_cell: tuple[int, ...]
    """Of the moved cells."""
    portion_bytes: int
    """Of segments that a step spans."""
    loaded: tuple[int, ...]
    """Tensors that processed modules are made of, ascending."""
    loose_cells: CellsOf
    """All other cells."""

    @cached_property
    def fetched_steps(self) -> Steps:
        """As `steps`, for a version of which something is fetched before it is read: a step takes
        as much main memory as it spans. Made when it is first asked for."""
        if self.portion_bytes <= PORTION_BYTES:
            return self.steps
        return tuple(_steps(cut_portions(self.plan, PORTION_BYTES), self.copy_of_cell))

    @cached_property
    def undecided(self) -> tuple[Portion, ...]:
        """What writes to undecided parameters."""
        return cut_portions(part_of_plan(self.plan, self.proof.undecided))


def split_update(
    layout: Layout,
    plan: TilePlan,
    proof: Proof,
    cells: Sequence[Cell],
    portion_bytes: int | None = None,
    threads: Threads | None = None,
    device: str = "cpu",
    executor: Executor | None = None,
) -> Split:
    """Split a plan and its cells into what is direct and the rest, and prepare all steps.

    A deadline is looked at between steps: each moves and digests about `portion_bytes`; None: as
    the executor likes it. The executor works on the caller's own thread if it is given no others.

    Args:
        device: the parameters'.
        executor: there, of all parameters and of the cells that copies hold; it is taken if all of
            them are direct. None: one is made.

    Raises:
        PlanError: nothing writes to the device.
        CudaFailed: the device cannot be used.
    """
    part = part_of_plan(plan, proof.direct)
    copies = plan.needs.copies
    moved: list[int] = []
    loose: dict[int, list[int]] = {}
    for number, cell in enumerate(cells):
        if cell.copy >= 0 and copies[cell.copy].parameter in proof.direct:
            moved.append(number)
        else:
            loose.setdefault(cell.tensor, []).append(number)
    if executor is None or proof.processed:
        executor = make_executor(
            device, layout, part.needs, [cells[number] for number in moved], threads
        )
    portion_bytes = portion_bytes or executor.portion_bytes
    portions = cut_portions(part, portion_bytes)
    for portion in portions:
        executor.prepare(portion.plan)
    copy_of_cell = tuple(cells[number].copy for number in moved)
    return Split(
        proof=proof,
        whole=plan,
        plan=part,
        steps=tuple(_steps(portions, copy_of_cell)),
        moved_cells=np.array(moved, dtype=np.int64),
        executor=executor,
        copy_of_cell=copy_of_cell,
        portion_bytes=portion_bytes,
        loaded=tuple(sorted({c.tensor for c in copies if c.parameter in proof.processed})),
        loose_cells=loose,
    )


def _steps(
    portions: Sequence[Portion], copy_of_cell: Sequence[int]
) -> Iterator[tuple[Portion, npt.NDArray[np.int64]]]:
    """Every portion, with the cells of the copies that it holds; the first takes those of none."""
    portion_of = dict.fromkeys(copy_of_cell, 0)
    for number, portion in enumerate(portions):
        for copy in np.unique(portion.plan.pieces.copy).tolist():
            portion_of[copy] = number
    digested: list[list[int]] = [[] for _ in portions]
    for cell, copy in enumerate(copy_of_cell):
        digested[portion_of[copy]].append(cell)
    for portion, found in zip(portions, digested, strict=True):
        yield portion, np.array(found, dtype=np.int64)

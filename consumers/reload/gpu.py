"""Moves bytes into parameters on a GPU, and digests what was moved in the same pass.

Reads and writes raw addresses: sources are memory of the host that is registered with CUDA, another
GPU's, or the device's own. Owns the tables of its plans on the device and, if anything transforms,
one block of `BLOCK_BYTES`. A plan's table is made once; per version only addresses are uploaded.

Copies that transform are gathered into the block, digested on the way, and from there are
transformed and written by torch. What no copy holds is only digested, from its segments.

Invariants: a cell's digest is of the very bytes that were written, or cast and written; nothing is
read or written any more once a method has returned or raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from weightbus.bus.digest import MULTIPLIER
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.gathers import Block, part_of_copy
from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan
from weightbus.consumers.reload.accelerator import Accelerator
from weightbus.consumers.reload.executor import WHOLE_PLAN, Executor, Sums
from weightbus.consumers.reload.programs import BLOCK_BYTES, Batch, Extents, Program, Programs
from weightbus.consumers.reload.table import COMPARE, MOVE, READ, Launch
from weightbus.consumers.reload.transforms import INEXACT, filled_bytes, transformed
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Copy, Fill, Needs
from weightbus.schemas.worker import Cell

__all__ = ("GpuExecutor",)

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> a dtype that keeps its bits."""


@dataclass(frozen=True, eq=False)
class _Run:
    """A program at the addresses of one version."""

    program: Program
    bases: torch.Tensor
    sums: torch.Tensor
    width: int
    """Most blocks of threads of a launch."""


class GpuExecutor(Executor):
    """Runs bound plans on one GPU.

    Args:
        accelerator: the parameters' device.
    """

    portion_bytes = WHOLE_PLAN
    """A launch runs out slowly and is waited for, and tiles of all sources are under way at once:
    what is near does not wait for what is far, and no trainer's GPU is asked by all ranks in turn.
    A kernel cannot be stopped: past a deadline it goes on for as long as all that a rank needs
    takes (61 GB from the host: 1.2 s), and is waited for."""

    def __init__(
        self,
        layout: Layout,
        needs: Needs,
        cells: Sequence[Cell],
        accelerator: Accelerator,
    ) -> None:
        self._layout, self._needs, self._cells = layout, needs, tuple(cells)
        self._accelerator, self.device = accelerator, accelerator.device
        self._programs = Programs(layout, needs, cells, accelerator)
        copies = np.array([cell.copy for cell in self._cells], dtype=np.int64)
        transforms = np.array([copy.transform for copy in needs.copies] + [-1], dtype=np.int64)
        self._is_unheld = copies < 0
        self._is_transformed = transforms[copies] >= 0
        is_empty = np.array([not all(cell.sizes) for cell in self._cells], dtype=np.bool_)
        self._is_moved = ~(self._is_unheld | self._is_transformed | is_empty)
        self._digests = np.zeros(len(self._cells), dtype=np.uint64)
        self._scratch: torch.Tensor | None = None

    def prepare(self, plan: TilePlan) -> None:
        with self._accelerator.work("preparing a plan"):
            program = self._programs.of_plan(plan)
            nothing = self._accelerator.uploaded(np.zeros(1, dtype=np.int64))
            run = _Run(program, nothing, nothing, 1)
            for launches in (program.plain, *(batch.launches for batch in program.batches)):
                none = [launch._replace(tiles=0) for launch in launches]
                self._launch(run, none, MOVE, is_digested=True)  # compiles
                self._launch(run, none, MOVE, is_digested=False)
            none = [launch._replace(tiles=0) for launch in program.plain]
            self._launch(run, none, COMPARE, is_digested=False)
            none = [Launch(width, True, 0, 0) for width in self._programs.read_widths]
            self._launch(run, none, READ, is_digested=True)

    def move(self, bound: BoundTiles) -> int:
        self.update(bound, ())
        return bound.plan.source_bytes

    def update(self, bound: BoundTiles, numbers: Iterable[int]) -> Sums:
        chosen = _integers(numbers)
        moved = chosen[self._is_moved[chosen]]
        program = self._programs.of(bound)
        with self._accelerator.work("moving a plan"):
            run = self._run(program, bound)
            self._launch(run, program.plain, MOVE, is_digested=moved.size > 0)
            for batch in program.batches:
                for block, made in self._made(run, batch, is_digested=True):
                    window, backwards = self._window(bound, self._part(block))
                    window.copy_(made.flip(backwards))
            for fill in bound.plan.needs.fills:
                self._fill(bound, fill)
            sums = self._accelerator.downloaded(run.sums)
        self._keep(program, sums, moved.size > 0)
        self._digest_unheld(bound, chosen)
        self._digest_elsewhere(program, bound, moved)
        return self._digests[chosen]

    def changed_parameter(self, bound: BoundTiles) -> int | None:
        program = self._programs.of(bound)
        with self._accelerator.work("comparing a plan"):
            run = self._run(program, bound)
            self._launch(run, program.plain, COMPARE, is_digested=False)
            found = self._accelerator.downloaded(run.sums[:1])
        if found.any():
            return int(found[0]) - 1 - len(self._layout.segments)
        with self._accelerator.work("comparing a plan"):
            for batch in program.batches:
                for block, made in self._made(run, batch, is_digested=False):
                    window, backwards = self._window(bound, self._part(block))
                    if not torch.equal(made.flip(backwards), window):
                        return self._needs.copies[block.copy].parameter
        return None

    def digest_cells(self, bound: BoundTiles, numbers: Iterable[int] | None = None) -> Sums:
        chosen = _integers(range(len(self._cells)) if numbers is None else numbers)
        moved = chosen[self._is_moved[chosen]]
        program = self._programs.of(bound)
        self._read(program, bound, reads_segments=False)
        self._digest_elsewhere(program, bound, moved)
        self._digest_unheld(bound, chosen)
        return self._digests[chosen]

    def read_back(self, bound: BoundTiles) -> tuple[Sums, tuple[int, ...]]:
        is_unreadable = self._is_unheld | self._is_transformed
        readable = np.flatnonzero(~is_unreadable)
        digests = np.zeros(len(self._cells), dtype=np.uint64)
        digests[readable] = self.digest_cells(bound, readable)
        return digests, tuple(np.flatnonzero(is_unreadable).tolist())

    # -- the kernel

    def _run(self, program: Program, bound: BoundTiles, *, reads_segments: bool = True) -> _Run:
        """Checks that no tile leaves its segment or its parameter."""
        _check_inside("parameter", program.written, bound.parameter_sizes)
        if reads_segments:
            _check_inside("segment", program.read, bound.segment_sizes)
        blocks = program.block_offsets
        if blocks.size:
            blocks = blocks + self._block_memory().data_ptr()
        bases = np.concatenate([bound.segment_addresses, bound.parameter_addresses, blocks])
        return _Run(
            program=program,
            bases=self._accelerator.uploaded(bases),
            sums=torch.zeros(
                max(1, program.cells.size), dtype=torch.int64, device=self._accelerator.device
            ),
            width=self._accelerator.programs,
        )

    def _launch(
        self, run: _Run, launches: Iterable[Launch], mode: int, *, is_digested: bool
    ) -> None:
        kernels = self._accelerator.kernels()
        for unit_bytes, has_cells, first, count in launches:
            grid = (max(1, min(run.width, count)),)
            kernels.gather[grid](
                run.program.tiles,
                run.program.pieces,
                run.bases,
                run.sums,
                first,
                count,
                width=unit_bytes,
                mode=mode,
                digest=is_digested and has_cells,
                block=kernels.BLOCK_UNITS[unit_bytes],
                num_warps=kernels.WARPS,
            )

    def _read(self, program: Program, bound: BoundTiles, *, reads_segments: bool) -> None:
        """Digest what is held, where it is written to, of the cells of a program."""
        with self._accelerator.work("digesting a plan"):
            run = self._run(program, bound, reads_segments=reads_segments)
            digested = [launch for launch in program.plain if launch.is_digested]
            self._launch(run, digested, READ, is_digested=True)
            sums = self._accelerator.downloaded(run.sums)
        is_plain = ~self._is_transformed[program.cells]
        self._digests[program.cells[is_plain]] = _finished(sums)[: program.cells.size][is_plain]

    def _keep(self, program: Program, sums: torch.Tensor, is_digested: bool) -> None:
        """Sums of what was moved; only blocks are digested always."""
        kept = np.ones(program.cells.size, dtype=np.bool_)
        if not is_digested:
            kept = self._is_transformed[program.cells]
        self._digests[program.cells[kept]] = _finished(sums)[: program.cells.size][kept]

    def _digest_elsewhere(self, program: Program, bound: BoundTiles, numbers: Integers) -> None:
        """Read back those of some cells that the program does not hold whole."""
        missing = numbers[~program.is_whole[numbers]]
        if missing.size:
            self._read(self._programs.of_cells(missing, bound), bound, reads_segments=False)

    def _digest_unheld(self, bound: BoundTiles, numbers: Integers) -> None:
        """Digest what no copy holds of some cells, in its segments."""
        unheld = numbers[self._is_unheld[numbers]]
        if unheld.size:
            self._read(self._programs.of_unheld(unheld, bound), bound, reads_segments=True)

    # -- transforms and fills

    def _made(
        self, run: _Run, batch: Batch, *, is_digested: bool
    ) -> Iterator[tuple[Block, torch.Tensor]]:
        """Gather blocks; give what each becomes, in the bits of its parameter's elements."""
        self._launch(run, batch.launches, MOVE, is_digested=is_digested)
        memory = self._block_memory()
        for offset, block in batch.blocks:
            copy = self._needs.copies[block.copy]
            dtype = self._layout.tensors[copy.tensor].dtype
            transform = self._needs.transforms[copy.transform]
            data = memory[offset : offset + block.size_bytes]
            if any(op in INEXACT for op, _ in transform.ops):
                data = data.cpu()  # where the engine's own loader does it
            made = transformed(data, dtype, transform).to(self._accelerator.device)
            yield block, made.view(_BITS[made.itemsize]).view(block.box.sizes)

    def _window(self, bound: BoundTiles, copy: Copy | Fill) -> tuple[torch.Tensor, list[int]]:
        """What a copy or fill writes, as bits, and the dimensions of it that run backwards.

        A window of torch's only runs forwards.
        """
        item_bytes = DTYPE_BYTES[self._needs.parameters[copy.parameter].dtype]
        reaches = [(size - 1) * step for size, step in zip(copy.sizes, copy.strides, strict=True)]
        first = copy.offset + sum(min(reach, 0) for reach in reaches)
        span = 1 + sum(map(abs, reaches))
        address = int(bound.parameter_addresses[copy.parameter]) + first * item_bytes
        memory = self._accelerator.memory(address, span * item_bytes).view(_BITS[item_bytes])
        window = memory.as_strided(copy.sizes, list(map(abs, copy.strides)))
        return window, [dim for dim, step in enumerate(copy.strides) if step < 0]

    def _part(self, block: Block) -> Copy:
        return part_of_copy(self._needs.copies[block.copy], block.box)

    def _fill(self, bound: BoundTiles, fill: Fill) -> None:
        if not all(fill.sizes):
            return
        element = filled_bytes(self._needs.parameters[fill.parameter].dtype, fill.value)
        window, _ = self._window(bound, fill)
        window.fill_(torch.from_numpy(element).view(window.dtype).item())

    def _block_memory(self) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = self._accelerator.allocated(BLOCK_BYTES)
        return self._scratch


def _integers(numbers: Iterable[int]) -> Integers:
    """Numbers as an array; one that is an array already is not copied."""
    if isinstance(numbers, np.ndarray):
        return numbers
    return np.array(list(numbers), dtype=np.int64)


def _check_inside(thing: str, used: Extents, sizes: Sequence[int]) -> None:
    outside = np.flatnonzero(used.ends > np.array(sizes, dtype=np.int64)[used.numbers])
    if outside.size:
        number, end = int(used.numbers[outside[0]]), int(used.ends[outside[0]])
        limit = f"the kernel takes bytes up to {end} of it"
        raise PlanError(f"{thing} {number}", f"{sizes[number]} bytes long", limit)


def _finished(sums: torch.Tensor) -> Sums:
    """Digests, by the factor that all words have in common."""
    with np.errstate(over="ignore"):
        digests: Sums = sums.numpy().view(np.uint64) * np.uint64(MULTIPLIER)
    return digests

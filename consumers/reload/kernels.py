"""The kernel that gathers: moves tiles, digests them, or compares them. Loads Triton.

Programs take tiles in turns. A tile is a grid of units of `width` bytes, flattened; the row of a
unit is found by one multiplication, since a tile has at most `TILE_UNITS`. What a tile digests to
is added to the sum of its cell once, by one atomic; sums are without the factor that is common to
all words (bus/digest.py), which is left to the host.

Invariant: nothing outside the tiles is touched. The host has checked where they lie.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from weightbus.bus.digest import SHIFT, STEP
from weightbus.consumers.reload.table import COMPARE, MOVE, READ

__all__ = ("BLOCK_UNITS", "WARPS", "gather")

WARPS = 8
BLOCK_UNITS = {1: 2048, 2: 2048, 4: 2048, 8: 1024}
"""Units that a program has in flight, by their bytes: 8 KiB at the width that matters, as measured
(lab/RESULTS.md); fewer registers than that would take are left for narrow ones."""

_MOVE = tl.constexpr(MOVE)
_READ = tl.constexpr(READ)
_COMPARE = tl.constexpr(COMPARE)

_TILE_COLUMNS = tl.constexpr(5)
_PIECE_COLUMNS = tl.constexpr(9)

_STEP = tl.constexpr(STEP)
_SHIFT = tl.constexpr(SHIFT)


# Numbers that change from launch to launch: never a reason to compile again.
@triton.jit(do_not_specialize=["first", "count"])
def gather(
    tiles,
    pieces,
    bases,
    sums,
    first,
    count,
    width: tl.constexpr,
    mode: tl.constexpr,
    digest: tl.constexpr,
    block: tl.constexpr,
):
    """Run `count` tiles from the `first` on; see `TileTable` for the tables.

    Args:
        bases: addresses that tiles are relative to.
        sums: of every cell (`MOVE`, `READ`), or one word (`COMPARE`).
    """
    if width == 8:
        unit = tl.uint64
    elif width == 4:
        unit = tl.uint32
    elif width == 2:
        unit = tl.uint16
    else:
        unit = tl.uint8
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        tile = tiles + (first + number) * _TILE_COLUMNS
        piece = pieces + tl.load(tile) * _PIECE_COLUMNS
        grid = tl.load(tile + 3)
        cols = (grid & 0xFFFFFFFF).to(tl.int32)
        rows = (grid >> 32).to(tl.int32)
        units = rows * cols
        # ceil(2^32 / cols), or 0 where everything is in row 0; see `TILE_UNITS`
        inverse = tl.where(rows == 1, 0, 0x100000000 // tl.maximum(cols, 2).to(tl.int64) + 1)
        inverse = inverse.to(tl.uint32)
        parameter = tl.load(piece + 1)
        target = tl.load(bases + parameter) + tl.load(tile + 2)
        target = target.to(tl.pointer_type(unit))
        target_row = tl.load(piece + 4)
        target_col = tl.load(piece + 5)
        source, source_row, source_col = target, target_row, target_col
        if mode != _READ:
            source = (tl.load(bases + tl.load(piece)) + tl.load(tile + 1)).to(tl.pointer_type(unit))
            source_row = tl.load(piece + 2)
            source_col = tl.load(piece + 3)
        if digest:
            index = tl.load(tile + 4)
            index_row = tl.load(piece + 7)
            index_col = tl.load(piece + 8)
            if width >= 4:  # of whole words: their steps, which add up
                step = (index + 1).to(tl.uint64) * _STEP
                step_row = index_row.to(tl.uint64) * _STEP
                step_col = index_col.to(tl.uint64) * _STEP
        total = tl.zeros((block,), dtype=tl.uint64)
        for begin in range(0, units, block):
            at = begin + tl.arange(0, block)
            mask = at < units
            row = tl.umulhi(at.to(tl.uint32), inverse).to(tl.int32)
            row = tl.where(cols == 1, at, row)
            col = at - row * cols
            found = tl.load(source + row * source_row + col * source_col, mask=mask, other=0)
            if mode != _READ:
                there = target + row * target_row + col * target_col
            if mode == _MOVE:
                tl.store(there, found, mask=mask)
            if mode == _COMPARE:
                held = tl.load(there, mask=mask, other=0)
                total += (found != held).to(tl.uint64)
            if digest:
                word = found.to(tl.uint64)
                if width >= 4:
                    here = step + row.to(tl.uint64) * step_row + col.to(tl.uint64) * step_col
                else:
                    byte = index + row * index_row + col * index_col
                    here = ((byte >> 2) + 1).to(tl.uint64) * _STEP
                    word = word << ((byte & 3) * 8).to(tl.uint64)
                if width == 8:
                    after = here + _STEP
                    total += (word >> 32) * ((after ^ (after >> _SHIFT)) | 1)
                    word = word & 0xFFFFFFFF
                total += word * ((here ^ (here >> _SHIFT)) | 1)
        if digest:
            cell = tl.load(piece + 6)
            tl.atomic_add(sums + cell, tl.sum(total).to(tl.int64, bitcast=True), sem="relaxed")
        if mode == _COMPARE:
            differs = tl.where(tl.sum(total) == 0, 0, parameter + 1)
            tl.atomic_max(sums, differs, sem="relaxed")

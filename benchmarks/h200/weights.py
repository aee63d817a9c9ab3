"""The bytes of every version, computed anywhere: by trainers, and by whoever checks an engine.

Does no I/O. An element's bits follow from the tensor's name, the version and the element's index
alone: a hash, without two equal rows or versions. Floats are finite: a bit of the exponent is 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Final

import torch

__all__ = ("BITS", "CHUNK_ELEMENTS", "bits_of", "box_bits", "fill", "row_blocks", "seed_of")

BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Bytes of an element -> the dtype its bits are compared in."""

CLEARED: Final = {1: 0x40, 2: 0x4000, 4: 0x40000000}
"""The highest bit of the exponent of BF16, F16 and F32, and of FP8 E4M3, whose NaN is all ones."""

CHUNK_ELEMENTS: Final = {"cpu": 2**18, "cuda": 2**24}
"""Computed at a time, so that little memory is taken and what is computed stays in a cache."""

FIRST, SECOND = 0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32


def seed_of(name: str, version: int) -> int:
    """What an element's index is hashed with."""
    seed = zlib.crc32(f"{name}/{version}".encode())
    return seed - 2**32 if seed >= 2**31 else seed


def bits_of(index: torch.Tensor, seed: torch.Tensor | int, itemsize: int) -> torch.Tensor:
    """The bits of elements by their index (int32, which is overwritten) in their tensor."""
    mixed = index.mul_(FIRST).add_(seed)
    mixed.bitwise_xor_(mixed >> 15)
    mixed.mul_(SECOND)
    mixed.bitwise_right_shift_(32 - 8 * itemsize).bitwise_and_(~CLEARED[itemsize])
    return mixed.to(BITS[itemsize])


def box_bits(
    names: Sequence[str],
    version: int,
    itemsize: int,
    rows: range,
    columns: range,
    row_elements: int,
    device: torch.device,
) -> torch.Tensor:
    """The bits of one box of each of several matrices whose rows are `row_elements` long.

    Returns: of [names, rows, columns].
    """
    down = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    across = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=device)
    index = down.mul_(row_elements).unsqueeze(1) + across
    if len(names) == 1:
        return bits_of(index, seed_of(names[0], version), itemsize).unsqueeze(0)
    seeds = torch.tensor(
        [seed_of(name, version) for name in names], dtype=torch.int32, device=device
    )
    repeated = index.expand(len(names), -1, -1).contiguous()
    return bits_of(repeated, seeds.view(-1, 1, 1), itemsize)


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of a bounded number of elements (or one row)."""
    step = max(1, CHUNK_ELEMENTS[device.type] // max(1, columns))
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def fill(box: torch.Tensor, name: str, version: int, first_row: int = 0) -> None:
    """Set rows of a tensor, from `first_row` on, to a version's."""
    flat = box.reshape(box.shape[0], -1).view(BITS[box.element_size()])
    columns = flat.shape[1]
    for begin, end in row_blocks(flat.shape[0], columns, box.device):
        rows = range(first_row + begin, first_row + end)
        (flat[begin:end],) = box_bits(
            (name,), version, box.element_size(), rows, range(columns), columns, box.device
        )

"""The bytes of versions: the same wherever and however they are computed."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch

from benchmarks.h200.weights import box_bits, fill

CPU = torch.device("cpu")


def expected_bits(name: str, version: int, index: int, itemsize: int) -> int:
    """As `weights.py` says it, in Python's integers."""
    seed = zlib.crc32(f"{name}/{version}".encode())
    mixed = (index * 0x9E3779B1 + seed) % 2**32
    mixed ^= (mixed >> 15) | (0x7FFF << 17 if mixed >= 2**31 else 0)  # signed
    mixed %= 2**32
    mixed = mixed * 0x85EBCA77 % 2**32
    return int(mixed >> (32 - 8 * itemsize) & ~{1: 0x40, 2: 0x4000, 4: 0x40000000}[itemsize])


@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.bfloat16, "H"), (torch.float32, "I"), (torch.float8_e4m3fn, "B")]
)
def test_bits_are_those_of_the_formula_for_every_width(dtype: torch.dtype, code: str) -> None:
    tensor = torch.zeros((37, 11), dtype=dtype)
    fill(tensor, "a.weight", 5)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    found = list(struct.unpack(f"<{tensor.numel()}{code}", raw))
    assert found == [expected_bits("a.weight", 5, n, dtype.itemsize) for n in range(len(found))]


def test_box_is_a_part_of_the_whole_when_it_is_cut_by_rows_and_by_columns() -> None:
    whole = torch.zeros((64, 48), dtype=torch.bfloat16)
    fill(whole, "a", 1)
    other = torch.zeros((64, 48), dtype=torch.bfloat16)
    fill(other, "b", 1)
    alone = box_bits(("a",), 1, 2, range(10, 20), range(7, 31), 48, CPU)
    both = box_bits(("a", "b"), 1, 2, range(10, 20), range(7, 31), 48, CPU)
    assert torch.equal(whole.view(torch.int16)[10:20, 7:31], alone[0])
    assert torch.equal(alone[0], both[0])
    assert torch.equal(other.view(torch.int16)[10:20, 7:31], both[1])


def test_rows_are_a_part_of_the_whole_when_they_are_filled_alone() -> None:
    whole, rows = torch.zeros((64, 48)), torch.zeros((9, 48))
    fill(whole, "a", 1)
    fill(rows, "a", 1, first_row=20)
    assert torch.equal(whole[20:29], rows)


def test_versions_and_tensors_differ_nearly_everywhere() -> None:
    def bits(name: str, version: int) -> torch.Tensor:
        return box_bits((name,), version, 2, range(100), range(100), 100, CPU)

    for other in (bits("a", 2), bits("b", 1)):
        assert (bits("a", 1) == other).float().mean() < 0.01


def test_floats_are_finite() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        tensor = torch.zeros((512, 512), dtype=dtype)
        fill(tensor, "a", 3)
        assert tensor.float().isfinite().all()

"""The digest equals its definition, and the parts of any cut add up to the whole."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.bus.digest import (
    Bytes,
    combine,
    digest_box,
    digest_hex,
    digest_tensor,
    digest_tensors,
    mix,
)

MASK = 2**64 - 1


def digest_by_definition(data: bytes) -> int:
    padded = data + bytes(-len(data) % 4)
    words = np.frombuffer(padded, dtype="<u4").tolist()
    total: int = sum(word * mix(index) for index, word in enumerate(words) if word)
    return total & MASK


def random_bytes(count: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def random_cut(shape: list[int], rng: random.Random) -> list[list[slice]]:
    """Boxes that tile `shape`: halves of halves, at random places."""
    boxes = [[slice(0, extent) for extent in shape]]
    for _ in range(rng.randint(0, 6)):
        box = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape)) if shape else 0
        if not shape or box[dim].stop - box[dim].start < 2:
            boxes.append(box)
            continue
        middle = rng.randint(box[dim].start + 1, box[dim].stop - 1)
        halves = (slice(box[dim].start, middle), slice(middle, box[dim].stop))
        boxes.extend([*box[:dim], half, *box[dim + 1 :]] for half in halves)
    return boxes


def box_digest(array: Bytes, box: list[slice], itemsize: int) -> int:
    """Digest of a box of `array`, whose last dimension is the bytes of an element."""
    data = np.ascontiguousarray(array[tuple(box)]).reshape(-1)
    starts = [part.start for part in box]
    sizes = [part.stop - part.start for part in box]
    return digest_box(data, array.shape[:-1], itemsize, starts, sizes)


def test_digest_is_known_when_data_is_known() -> None:
    # Fixed for good: a publisher and a consumer of different releases must agree.
    assert digest_hex(digest_tensor(np.arange(11, dtype=np.uint8))) == "99b90231b194c8fc"
    assert digest_hex(combine(np.array([1, 2, 3], dtype=np.uint64))) == "5fda4845264c89f0"
    assert digest_hex(mix(0)) == "8958de844f620527"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 31, 1023, 4097])
def test_digest_tensor_equals_definition_when_length_is_any(count: int) -> None:
    data = random_bytes(count)
    assert digest_tensor(data) == digest_by_definition(data.tobytes())


def test_digest_tensor_equals_sum_of_pieces_when_it_outgrows_table_and_block() -> None:
    data = random_bytes(9 * 2**20 + 3)
    cuts = [0, 1, 4 * 2**20 - 5, 4 * 2**20 + 6, 9 * 2**20 + 1, data.size]
    parts = [digest_box(data[a:b], [data.size], 1, [a], [b - a]) for a, b in pairwise(cuts)]
    whole = digest_tensor(data)
    assert sum(parts) & MASK == whole
    for index in (0, 2**20 - 1, 2**20, 9 * 2**18):  # words on both sides of the table's end
        changed = data.copy()
        changed[4 * index] ^= 1
        sign = 1 if data[4 * index] & 1 == 0 else -1
        assert digest_tensor(changed) == (whole + sign * mix(index)) & MASK


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**32),
)
def test_boxes_add_up_to_tensor_when_cut_anywhere(
    shape: list[int], itemsize: int, seed: int
) -> None:
    array = random_bytes(math.prod(shape) * itemsize, seed).reshape([*shape, itemsize])
    whole = digest_by_definition(array.tobytes())
    cut = random_cut(shape, random.Random(seed))
    assert sum(box_digest(array, box, itemsize) for box in cut) & MASK == whole
    assert digest_tensor(array.reshape(-1)) == whole


@pytest.mark.parametrize(
    ("shape", "itemsize", "starts", "sizes"),
    [
        ([3000, 96], 2, [0, 24], [3000, 24]),  # aligned columns, many rows
        ([3001, 97], 1, [1, 3], [2999, 91]),  # every phase, odd runs
        ([5000, 3], 2, [0, 1], [5000, 1]),  # narrow: the grid is turned
        ([50, 7, 11, 5], 2, [1, 2, 3, 1], [48, 4, 6, 3]),  # no dimension is whole
        ([3, 600_001], 2, [0, 1], [3, 600_000]),  # runs longer than a block
        ([3000, 500], 4, [2500, 100], [500, 200]),  # words beyond the table
        ([400_000, 3], 4, [370_000, 1], [30_000, 2]),  # narrow, beyond the table
    ],
)
def test_digest_box_equals_definition_when_rows_take_any_form(
    shape: list[int], itemsize: int, starts: list[int], sizes: list[int]
) -> None:
    array = random_bytes(math.prod(shape) * itemsize).reshape([*shape, itemsize])
    box = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    alone = np.zeros_like(array)
    alone[tuple(box)] = array[tuple(box)]
    assert box_digest(array, box, itemsize) == digest_by_definition(alone.tobytes())


def test_digest_changes_when_one_bit_flips_or_two_words_swap() -> None:
    data = random_bytes(4096)
    whole = digest_tensor(data)
    for bit in range(0, 8 * data.size, 331):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        assert digest_tensor(changed) != whole, f"bit {bit}"
    swapped = data.view("<u4").copy()
    swapped[[3, 700]] = swapped[[700, 3]]
    assert digest_tensor(swapped.view(np.uint8)) != whole


def test_mix_is_odd_when_index_is_any() -> None:
    rng = random.Random(0)
    indices = [*range(100_000), *(rng.randrange(2**48) for _ in range(100_000))]
    assert [index for index in indices if mix(index) % 2 == 0] == []


@settings(max_examples=200, deadline=None)
@given(index=st.integers(0, 2**48), phase=st.integers(0, 3), bit=st.integers(0, 7))
def test_digest_box_is_odd_times_its_bit_when_data_is_one_bit(
    index: int, phase: int, bit: int
) -> None:
    data = np.array([1 << bit], dtype=np.uint8)
    digest = digest_box(data, [2**51], 1, [4 * index + phase], [1])
    assert digest == (mix(index) << 8 * phase + bit) & MASK
    assert digest & -digest == 1 << 8 * phase + bit


def test_combine_changes_when_a_bit_flips_where_both_coefficients_would_be_even() -> None:
    # Without the OR they end in 15 and 18 zero bits: 2^(31 + 15 + 18) is 0 mod 2^64.
    number, word = 9703, 472_677
    tensor = random_bytes(4 * (word + 1))
    digests = np.zeros(number + 1, dtype=np.uint64)
    digests[number] = digest_tensor(tensor)
    whole = combine(digests)
    tensor[4 * word + 3] ^= 0x80
    digests[number] = digest_tensor(tensor)
    difference = combine(digests) - whole & MASK
    assert difference & -difference == 2**31


@settings(max_examples=200, deadline=None)
@given(
    number=st.integers(0, 20_000),
    words=st.integers(1, 40_000),
    place=st.floats(0, 1, exclude_max=True),
)
def test_combine_changes_when_any_one_bit_flips(number: int, words: int, place: float) -> None:
    tensor = random_bytes(4 * words, words)
    digests = np.random.default_rng(number).integers(0, MASK, number + 3, np.uint64)
    digests[number] = digest_tensor(tensor)
    whole = combine(digests)
    bit = int(place * 8 * tensor.size)
    tensor[bit // 8] ^= 1 << bit % 8
    digests[number] = digest_tensor(tensor)
    difference = combine(digests) - whole & MASK
    assert difference & -difference == 1 << bit % 32, f"bit {bit}"


def test_digest_is_the_same_when_several_threads_take_it_at_once() -> None:
    tensors = [random_bytes(count, count) for count in range(0, 400_000, 9973)]
    expected = [digest_tensor(tensor) for tensor in tensors]
    assert digest_tensors(tensors).tolist() == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest_tensor, tensors)) == expected


def test_combine_changes_when_tensors_swap_and_equals_definition() -> None:
    digests = np.array([5, 2**63 + 7, MASK, 0, 12], dtype=np.uint64)
    expected = sum(digest * mix(number) for number, digest in enumerate(digests.tolist())) & MASK
    assert combine(digests) == expected
    assert combine(digests[::-1]) != expected


def test_digest_box_is_refused_when_data_or_box_do_not_fit() -> None:
    with pytest.raises(ValueError, match="has 7 bytes"):
        digest_box(random_bytes(7), [4], 2, [0], [4])
    with pytest.raises(ValueError, match="is not in shape"):
        digest_box(random_bytes(8), [4], 2, [1], [4])

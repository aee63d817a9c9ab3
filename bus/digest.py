"""The shard-additive digest of weights: 64 bits that add up to the whole over any cut of it.

Does no I/O. Keeps a table of at most 32 MiB and, per thread, 1 MiB of scratch; no other temporary
is larger than a block. Several threads may digest at once: numpy releases the interpreter lock in
the loops.

The digest of a tensor is the sum, mod 2^64, over its little-endian 4-byte words (the last padded
with zeros) of `word * mix(index of the word in the tensor)`; the model's is the sum of
`tensor digest * mix(number of the tensor)`. Both are linear in every byte, hence:

- the digests of boxes that cut a tensor, at any byte, add up to the tensor's;
- they may be taken in any order, on any rank, from any copy of the bytes.

Every coefficient is odd. A single flipped bit changes its word by 2^k, k < 32, so the tensor's
digest by an odd number times 2^k and the model's by another: never 0 mod 2^64 for k < 64, hence
always seen. An even coefficient would shift the highest bits of a word, or of a tensor, out.

It guards against corruption and planning errors, not against an attacker.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

__all__ = (
    "MULTIPLIER",
    "SHIFT",
    "STEP",
    "WORD_BYTES",
    "combine",
    "digest_box",
    "digest_hex",
    "digest_tensor",
    "digest_tensors",
    "mix",
    "offsets_of_runs",
    "runs_of_box",
)

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Sums = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

WORD_BYTES = 4
_MASK = 2**64 - 1

# The finaliser of splitmix64 (Steele, Lea, Flood 2014), cut to one round: an odd step of the golden
# ratio, one xor-shift, one odd multiplier; and the lowest bit set in between, which keeps the
# product odd.
STEP = 0x9E3779B97F4A7C15
SHIFT = 29
MULTIPLIER = 0xBF58476D1CE4E5B9

_BLOCK_WORDS = 1 << 16
"""Words per inner step: the calls of a step cost little beside its loops, and its words (256 KiB)
and coefficients (512 KiB) stay in a core's own cache."""

_TABLE_WORDS = 1 << 22
"""Coefficients of a tensor's first words (16 MiB of it) are kept: most tensors are no longer."""

_NARROW_COLUMNS = 64
"""Grids narrower than this are turned, since numpy's loops run along the last axis."""


def mix(index: int) -> int:
    """The 64-bit coefficient of word (or tensor) number `index`: odd."""
    step = (index + 1) * STEP & _MASK
    return ((step ^ (step >> SHIFT)) | 1) * MULTIPLIER & _MASK


def digest_tensor(data: Bytes) -> int:
    """The digest of a whole tensor: `data` is its bytes, one dimension, C-contiguous."""
    return _digest_run(data, 0) * MULTIPLIER & _MASK


def digest_tensors(tensors: Sequence[Bytes]) -> Sums:
    """The digest of every tensor of `tensors`, each as in `digest_tensor`."""
    return np.fromiter(map(digest_tensor, tensors), np.uint64, len(tensors))


def digest_box(
    data: Bytes,
    shape: Sequence[int],
    itemsize: int,
    starts: Sequence[int],
    sizes: Sequence[int],
) -> int:
    """What one box of a tensor adds to the tensor's digest.

    Args:
        data: the box's bytes, one dimension, C-contiguous: `prod(sizes) * itemsize` of them.
        shape: extent of the whole tensor in each dimension, in elements.
        itemsize: bytes of one element.
        starts, sizes: first index and extent of the box in each dimension, in elements.

    Raises:
        ValueError: `data` has another length, or the box does not lie in the tensor.
    """
    if math.prod(sizes) * itemsize != data.size or data.ndim != 1:
        raise ValueError(f"box of sizes {tuple(sizes)} x {itemsize} bytes has {data.size} bytes")
    inside = all(
        start >= 0 and start + size <= extent
        for start, size, extent in zip(starts, sizes, shape, strict=True)
    )
    if not inside:
        raise ValueError(f"box {tuple(starts)} + {tuple(sizes)} is not in shape {tuple(shape)}")
    if data.size == 0:
        return 0
    outer, first_byte, run_bytes = runs_of_box(shape, itemsize, starts, sizes)
    if not outer or run_bytes >= _BLOCK_WORDS * WORD_BYTES:
        total = sum(
            _digest_run(data[row * run_bytes : (row + 1) * run_bytes], offset)
            for row, offset in enumerate(
                offsets_of_runs(outer, first_byte, 0, data.size // run_bytes)
            )
        )
    else:
        total = _digest_rows(data.reshape(-1, run_bytes), outer, first_byte)
    return total * MULTIPLIER & _MASK


def combine(tensor_digests: Sums) -> int:
    """The digest of a model from the digests of its tensors, in layout order."""
    numbers = np.arange(1, tensor_digests.size + 1, dtype=np.uint64)
    step = numbers * np.uint64(STEP)
    step ^= step >> np.uint64(SHIFT)
    step |= np.uint64(1)
    return int(np.add.reduce(tensor_digests * step)) * MULTIPLIER & _MASK


def digest_hex(digest: int) -> str:
    """A digest as messages carry it: 16 hexadecimal digits."""
    return f"{digest:016x}"


# Below, sums are taken with `(step ^ (step >> 29)) | 1` as the coefficient: the multiplier, common
# to all words, is applied to the sum.


def runs_of_box(
    shape: Sequence[int], itemsize: int, starts: Sequence[int], sizes: Sequence[int]
) -> tuple[list[tuple[int, int]], int, int]:
    """Cut a box into runs of bytes that are contiguous in the tensor.

    Returns (extent, step in bytes) of every outer dimension, the outermost first; the byte of the
    tensor where the first run begins; the length of a run in bytes. In the box's own order the runs
    follow each other without gaps.
    """
    outer: list[tuple[int, int]] = []
    run_bytes = step = itemsize
    first_byte = 0
    for start, size, extent in zip(reversed(starts), reversed(sizes), reversed(shape), strict=True):
        first_byte += start * step
        if not outer and run_bytes == step:
            run_bytes *= size
        elif outer and outer[-1][0] * outer[-1][1] == step:
            outer[-1] = (outer[-1][0] * size, outer[-1][1])
        elif size > 1:
            outer.append((size, step))
        step *= extent
    return outer[::-1], first_byte, run_bytes


def offsets_of_runs(
    outer: Sequence[tuple[int, int]], first_byte: int, begin: int, end: int
) -> Indices:
    """Where, in the tensor, runs number `begin` to `end` of a box start, in bytes."""
    numbers = np.arange(begin, end, dtype=np.int64)
    offsets = np.full(end - begin, first_byte, dtype=np.int64)
    for extent, step in reversed(outer):
        offsets += numbers % extent * step
        numbers //= extent
    return offsets


def _digest_run(data: Bytes, first_byte: int) -> int:
    """Sum over one contiguous run that begins at any byte of the tensor."""
    first_byte = int(first_byte)
    head = min(-first_byte % WORD_BYTES, data.size)
    body = (data.size - head) // WORD_BYTES * WORD_BYTES
    total = _digest_edge(data[:head], first_byte)
    total += _digest_edge(data[head + body :], first_byte + head + body)
    words = data[head : head + body].view("<u4")
    first_word = (first_byte + head) // WORD_BYTES
    for begin in range(0, words.size, _BLOCK_WORDS):
        block = words[begin : begin + _BLOCK_WORDS]
        total += int(np.einsum("i,i->", block, _coefficients(first_word + begin, block.size)))
    return total


def _digest_edge(data: Bytes, first_byte: int) -> int:
    """Sum over at most three bytes that lie in one word of the tensor."""
    if not data.size:
        return 0
    word = int.from_bytes(data.tobytes(), "little") << 8 * (first_byte % WORD_BYTES)
    step = (first_byte // WORD_BYTES + 1) * STEP & _MASK
    return word * ((step ^ (step >> SHIFT)) | 1)


def _digest_rows(rows: Bytes, outer: Sequence[tuple[int, int]], first_byte: int) -> int:
    """Sum over many short runs, the rows of `rows`, block by block."""
    run_bytes = rows.shape[1]
    block_rows = max(1, _BLOCK_WORDS // (run_bytes // WORD_BYTES + 2))
    total = 0
    for begin in range(0, len(rows), block_rows):
        block = rows[begin : begin + block_rows]
        offsets = offsets_of_runs(outer, first_byte, begin, begin + len(block))
        phases = offsets % WORD_BYTES
        for phase in np.unique(phases).tolist():
            chosen = phases == phase
            part = block if chosen.all() else block[chosen]
            if phase or run_bytes % WORD_BYTES:
                word_count = -(-(phase + run_bytes) // WORD_BYTES)
                padded = np.zeros((len(part), word_count * WORD_BYTES), dtype=np.uint8)
                padded[:, phase : phase + run_bytes] = part
                part = padded
            words = part.view("<u4")
            total += _digest_grid(words, offsets[chosen] // WORD_BYTES)
    return total


class _Scratch(threading.local):
    """Two buffers of one block per thread."""

    def __init__(self) -> None:
        self.steps = np.empty(_BLOCK_WORDS, dtype=np.uint64)
        self.products = np.empty(_BLOCK_WORDS, dtype=np.uint64)


_scratch = _Scratch()


@cache
def _multiples() -> Sums:
    """The multiples 0, 1, 2, ... of the step, one block of them."""
    return np.arange(_BLOCK_WORDS, dtype=np.uint64) * np.uint64(STEP)


class _Table:
    """The coefficients of words 0, 1, 2, ..., made block by block as they are asked for.

    Two threads may make the same block at once: both write the same, finished numbers.
    """

    def __init__(self) -> None:
        self._coefficients = np.empty(_TABLE_WORDS, dtype=np.uint64)
        self._is_made = bytearray(_TABLE_WORDS // _BLOCK_WORDS)

    def words(self, begin: int, end: int) -> Sums:
        """A view of those of words `begin` to `end`. Uses both buffers."""
        for block in range(begin // _BLOCK_WORDS, -(-end // _BLOCK_WORDS)):
            if not self._is_made[block]:
                first = block * _BLOCK_WORDS
                made = _made_coefficients(first, _BLOCK_WORDS)
                self._coefficients[first : first + _BLOCK_WORDS] = made
                self._is_made[block] = True
        return self._coefficients[begin:end]


@cache
def _table() -> _Table:
    return _Table()


def _coefficients(first_word: int, count: int) -> Sums:
    """The coefficients of at most a block of words. Uses both buffers; valid until the next."""
    if first_word + count <= _TABLE_WORDS:
        return _table().words(first_word, first_word + count)
    return _made_coefficients(first_word, count)


def _made_coefficients(first_word: int, count: int) -> Sums:
    """The same, without the table."""
    steps = _scratch.steps[:count]
    np.add(_multiples()[:count], np.uint64((first_word + 1) * STEP & _MASK), out=steps)
    steps ^= np.right_shift(steps, np.uint64(SHIFT), out=_scratch.products[:count])
    steps |= np.uint64(1)
    return steps


def _digest_grid(words: Words, first_words: Indices) -> int:
    """Sum over at most a block of words; every row begins at its word of the tensor."""
    coefficients = _grid_coefficients(first_words, words.shape[1])
    if _is_narrow(words.shape[0], words.shape[1]):
        words, coefficients = words.T, coefficients.T
    products = _scratch.products[: words.size].reshape(words.shape)
    np.copyto(products, words)
    products *= coefficients
    return int(np.add.reduce(products, axis=None))


def _grid_coefficients(first_words: Indices, columns: int) -> Sums:
    """[rows, columns] of coefficients; uses the buffers as `_coefficients` does."""
    rows = first_words.size
    pitch = int(first_words[1] - first_words[0]) if rows > 1 else 0
    end = int(first_words[-1]) + columns
    if end <= _TABLE_WORDS and bool(np.all(np.diff(first_words) == pitch)):
        table = _table().words(int(first_words[0]), end)
        return as_strided(table, (rows, columns), (8 * pitch, 8), writeable=False)
    along_rows = (first_words + 1).astype(np.uint64) * np.uint64(STEP)
    along_columns = _multiples()[:columns]
    narrow = _is_narrow(rows, columns)
    steps = _scratch.steps[: rows * columns].reshape((columns, rows) if narrow else (rows, columns))
    if narrow:
        np.add(along_columns[:, None], along_rows, out=steps)
    else:
        np.add(along_rows[:, None], along_columns, out=steps)
    shifted = _scratch.products[: steps.size].reshape(steps.shape)
    steps ^= np.right_shift(steps, np.uint64(SHIFT), out=shifted)
    steps |= np.uint64(1)
    return steps.T if narrow else steps


def _is_narrow(rows: int, columns: int) -> bool:
    return columns < _NARROW_COLUMNS and columns < rows

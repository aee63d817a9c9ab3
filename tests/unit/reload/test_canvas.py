"""The canvas against a naive painter: byte by byte."""

from __future__ import annotations

import random
from itertools import product

import pytest

from weightbus.consumers.reload.canvas import Canvas
from weightbus.consumers.reload.memory import ByteWindow


def elements(window: ByteWindow) -> list[int]:
    """First byte of every element."""
    return [
        window.offset + sum(i * step for i, step in zip(index, window.strides, strict=True))
        for index in product(*(range(size) for size in window.sizes))
    ]


def touched(window: ByteWindow) -> list[int]:
    return [start + byte for start in elements(window) for byte in range(window.itemsize)]


def random_window(source: random.Random) -> ByteWindow:
    itemsize = source.choice([1, 2, 4])
    dims = source.randrange(4)
    return ByteWindow(
        offset=itemsize * source.randrange(8),
        sizes=tuple(source.choice([0, 1, 2, 3, 3, 5]) for _ in range(dims)),
        strides=tuple(itemsize * source.choice([1, 1, 2, 3, 6, 15]) for _ in range(dims)),
        itemsize=itemsize,
    )


@pytest.mark.parametrize("seed", range(300))
def test_canvas_agrees_with_a_naive_painter(seed: int) -> None:
    source = random.Random(seed)
    writes = [random_window(source) for _ in range(source.randrange(5))]
    windows = [random_window(source) for _ in range(2)]
    painted: dict[int, int] = {}
    for number, write in enumerate(writes):
        painted.update(dict.fromkeys(touched(write), number))
    canvas = Canvas(writes, windows)
    for window in windows:
        assert canvas.lacking_bytes(window) == sum(b not in painted for b in touched(window))
    for number, write in enumerate(writes):
        bytes_of = touched(write)
        mine = {byte for byte, writer in painted.items() if writer == number}
        assert canvas.is_hidden(number) == (not mine)
        assert canvas.is_whole(number) == (len(mine) == len(bytes_of))
        if len(set(bytes_of)) == len(bytes_of) and all(
            w.itemsize == write.itemsize for w in writes
        ):
            left = [byte for box in canvas.visible(number) for byte in touched(box)]
            assert sorted(left) == sorted(mine)

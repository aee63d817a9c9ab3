"""Box algebra keeps every element, once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.consumers.planning.boxes import Box, blocks_of


@st.composite
def boxes(draw: st.DrawFn, dims: int) -> Box:
    ends = st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True)
    spans = [sorted(draw(ends)) for _ in range(dims)]
    return Box(tuple(low for low, _ in spans), tuple(high for _, high in spans))


def painted(*parts: Box) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """How often each element of a cube is in a part."""
    count = np.zeros((7,) * len(parts[0].starts) if parts else (), dtype=np.int64)
    for part in parts:
        count[tuple(map(slice, part.starts, part.ends))] += 1
    return count


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dims=st.integers(0, 3))
def test_intersection_and_rest_make_the_box_when_two_meet(data: st.DataObject, dims: int) -> None:
    one, other = data.draw(boxes(dims)), data.draw(boxes(dims))
    common, rest = one.intersection(other), one.without(other)
    parts = [*rest, *([common] if common else [])]
    assert np.array_equal(painted(*parts), painted(one))
    both = np.minimum(painted(one), painted(other))
    assert np.array_equal(painted(common) if common else both * 0, both)
    assert len(rest) <= max(1, 2 * dims)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dims=st.integers(0, 3), most=st.integers(1, 60))
def test_blocks_hold_each_element_once_in_order_when_cut_small(
    data: st.DataObject, dims: int, most: int
) -> None:
    box = data.draw(boxes(dims))
    blocks = list(blocks_of(box, most))
    assert np.array_equal(painted(*blocks), painted(box))
    assert all(0 < block.elements <= most for block in blocks)
    assert [block.starts for block in blocks] == sorted(block.starts for block in blocks)

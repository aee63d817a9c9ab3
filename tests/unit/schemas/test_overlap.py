"""The search for overlapping boxes agrees with counting, and its work is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightbus.schemas import MessageInvalid
from weightbus.schemas.overlap import Box, StepBudget, find_overlap

PLENTY = 10**9


def boxes_of(spans: Sequence[tuple[tuple[int, int], ...]]) -> list[Box]:
    """Boxes from (start, end) per dimension."""
    return [
        Box(tuple(a for a, _ in span), tuple(b for _, b in span), number)
        for number, span in enumerate(spans)
    ]


def share_an_element(one: Box, other: Box) -> bool:
    return all(
        max(a, c) < min(b, d)
        for a, b, c, d in zip(one.starts, one.ends, other.starts, other.ends, strict=True)
    )


_SPANS = st.sampled_from([(a, b) for a in range(5) for b in range(a + 1, 6)])


@given(spans=st.lists(st.tuples(_SPANS, _SPANS, _SPANS), max_size=9))
def test_overlap_is_found_exactly_when_two_boxes_share_an_element(
    spans: list[tuple[tuple[int, int], ...]],
) -> None:
    boxes = boxes_of(spans)
    pair = find_overlap(boxes, StepBudget(PLENTY))
    expected = any(share_an_element(one, other) for one, other in combinations(boxes, 2))
    assert (pair is not None) == expected
    if pair is not None:
        assert share_an_element(*pair)
        assert pair[0].shard != pair[1].shard


def test_pinwheel_is_no_overlap() -> None:
    spans = [((0, 2), (0, 1)), ((0, 1), (1, 3)), ((1, 3), (2, 3)), ((2, 3), (0, 2))]
    centre = ((1, 2), (1, 2))
    assert find_overlap(boxes_of([*spans, centre]), StepBudget(PLENTY)) is None
    pair = find_overlap(boxes_of([*spans, centre, ((0, 3), (1, 2))]), StepBudget(PLENTY))
    assert pair is not None


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_grid_takes_steps_in_proportion_to_its_boxes(dimensions: int) -> None:
    side = {1: 4096, 2: 64, 3: 16}[dimensions]
    grid = list(product([(n, n + 1) for n in range(side)], repeat=dimensions))
    steps = len(grid) * dimensions * (dimensions + 1) // 2
    assert find_overlap(boxes_of(grid), StepBudget(steps)) is None


def test_search_is_given_up_when_its_budget_is_spent() -> None:
    """A thousand pinwheels, each nested in the last one's centre: nothing splits them."""
    spans = []
    for ring in range(300):
        low, high = ring, 1000 - ring
        spans += [
            ((low, high - 1), (low, low + 1)),
            ((low, low + 1), (low + 1, high)),
            ((low + 1, high), (high - 1, high)),
            ((high - 1, high), (low, high - 1)),
        ]
    assert find_overlap(boxes_of(spans), StepBudget(PLENTY)) is None
    with pytest.raises(MessageInvalid, match="must end within 20000 steps"):
        find_overlap(boxes_of(spans), StepBudget(20_000))

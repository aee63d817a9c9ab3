"""Layouts: every rule has a test that breaks it, and a property that holds all together."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.examples import EXAMPLES, LAYOUT
from tests.unit.schemas.hostile import mutations
from tests.unit.schemas.strategies import layouts
from weightbus.schemas import (
    FileSegment,
    Layout,
    Limits,
    MessageInvalid,
    SegmentSpec,
    ShardSpec,
    TensorSpec,
    check_layout,
    check_placement,
    decode_layout,
    digest_of,
    encode_layout,
    layout_digest,
    tensor_bytes,
)
from weightbus.schemas.blobs import canonical, compress


def of_one_tensor(
    shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> Layout:
    """A U8 tensor whose boxes (starts, sizes) are stored one after another."""
    shards, end = [], 0
    for starts, sizes in boxes:
        shards.append(ShardSpec(0, starts, sizes, 0, end))
        end += tensor_bytes(TensorSpec("box", "U8", sizes))
    return Layout((TensorSpec("t", "U8", shape),), tuple(shards), (SegmentSpec(end),))


def with_tensor(**fields: Any) -> Layout:
    """The example, with its second tensor changed."""
    changed = msgspec.structs.replace(LAYOUT.tensors[1], **fields)
    tensors = (LAYOUT.tensors[0], changed, *LAYOUT.tensors[2:])
    return Layout(tensors, LAYOUT.shards, LAYOUT.segments)


def with_shard(number: int, **fields: Any) -> Layout:
    changed = msgspec.structs.replace(LAYOUT.shards[number], **fields)
    shards = (*LAYOUT.shards[:number], changed, *LAYOUT.shards[number + 1 :])
    return Layout(LAYOUT.tensors, shards, LAYOUT.segments)


@given(layout=layouts())
def test_layout_survives_its_encoding(layout: Layout) -> None:
    blob = encode_layout(layout)
    assert decode_layout(blob) == layout
    assert layout_digest(layout) == digest_of(blob)


@given(data=st.data(), layout=layouts())
def test_mutated_layout_is_valid_or_refused(data: st.DataObject, layout: Layout) -> None:
    raw = data.draw(mutations(canonical("layout", layout)))
    try:
        found = decode_layout(compress(raw))
    except MessageInvalid:
        return
    check_layout(found)
    assert decode_layout(encode_layout(found)) == found


SPANS = [(start, size) for start in range(4) for size in range(5 - start)]
"""Start and size of every interval of 0 to 4."""


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    boxes=st.lists(st.tuples(st.sampled_from(SPANS), st.sampled_from(SPANS)), max_size=5),
)
def test_layout_is_accepted_exactly_when_every_element_is_in_one_shard(
    shape: tuple[int, int], boxes: list[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    held = Counter(
        index
        for (row, rows), (column, columns) in boxes
        for index in product(range(row, row + rows), range(column, column + columns))
    )
    inside = all(
        row + rows <= shape[0] and column + columns <= shape[1]
        for (row, rows), (column, columns) in boxes
    )
    once = inside and all(count == 1 for count in held.values())
    whole = once and len(held) == shape[0] * shape[1]
    layout = of_one_tensor(shape, [((a, b), (m, n)) for (a, m), (b, n) in boxes])
    assert accepted(layout, partial=True) == once
    assert accepted(layout, partial=False) == whole


def accepted(layout: Layout, *, partial: bool) -> bool:
    try:
        check_layout(layout, partial=partial)
    except MessageInvalid:
        return False
    return True


@pytest.mark.parametrize(
    ("layout", "field", "limit"),
    [
        (with_tensor(dtype="F4"), "tensors[1].dtype", "must be one of BOOL, U8"),
        (with_tensor(name="model.scale"), "tensors[2].name", "tensors[1] has it too"),
        (with_tensor(shape=(2**48 + 1,)), "tensors[1].shape", "at most 1125899906842624 bytes"),
        (with_tensor(shape=(2**40,) * 8), "tensors[1].shape", "at most 1125899906842624 bytes"),
        (with_tensor(shape=(0, 2**50, 2**50)), "tensors[1].shape", "an extent of 0 as 1"),
        (with_tensor(shape=(5,)), "tensors[1]", "hold every element (tensor model.norm.weight)"),
        (with_shard(0, tensor=4), "shards[0].tensor", "has 4 tensors"),
        (with_shard(0, segment=2), "shards[0].segment", "of 2 segments"),
        (with_shard(0, starts=(4, 0)), "shards[0].sizes[0]", "must lie within 6"),
        (with_shard(0, sizes=(3, 5)), "shards[0].sizes[1]", "must lie within 4"),
        (with_shard(0, starts=(0,)), "shards[0].starts", "has 2 dimensions"),
        (with_shard(0, sizes=(3, 4, 1)), "shards[0].sizes", "has 2 dimensions"),
        (with_shard(3, starts=(0,)), "shards[3].starts", "has 0 dimensions"),
        (with_shard(0, offset_bytes=489), "shards[0].offset_bytes", "within the segment's 512"),
        (with_shard(2, offset_bytes=23), "shards[2].offset_bytes", "takes bytes 0 to 24"),
        (with_shard(0, starts=(1, 0)), "shards[1].starts", "overlaps shards[0]"),
    ],
)
def test_layout_is_refused_naming_what_breaks_a_rule(
    layout: Layout, field: str, limit: str
) -> None:
    with pytest.raises(MessageInvalid) as caught:
        check_layout(layout)
    assert (caught.value.kind, caught.value.field) == ("layout", field)
    assert limit in caught.value.limit


def test_coverage_names_how_much_is_missing() -> None:
    layout = of_one_tensor((4, 4), [((0, 0), (4, 3))])
    with pytest.raises(MessageInvalid, match="4 of 16 bytes are in no shard"):
        check_layout(layout)
    check_layout(layout, partial=True)


def test_part_may_hold_nothing_at_all() -> None:
    check_layout(Layout(LAYOUT.tensors, (), ()), partial=True)
    with pytest.raises(MessageInvalid):
        check_layout(Layout(LAYOUT.tensors, (), ()))


def test_part_is_still_refused_when_its_shards_overlap() -> None:
    with pytest.raises(MessageInvalid, match="overlaps"):
        check_layout(of_one_tensor((4,), [((0,), (3,)), ((2,), (2,))]), partial=True)


def test_scalar_in_two_shards_is_refused() -> None:
    with pytest.raises(MessageInvalid, match="overlaps"):
        check_layout(of_one_tensor((), [((), ()), ((), ())]))


def test_empty_tensor_needs_no_shard_and_may_have_several() -> None:
    check_layout(of_one_tensor((0, 3), []))
    check_layout(of_one_tensor((0, 3), [((0, 0), (0, 3)), ((0, 0), (0, 3))]))


def test_bytes_shared_by_two_tensors_are_refused_whatever_the_order_of_the_shards() -> None:
    tensors = (TensorSpec("a", "U8", (8,)), TensorSpec("b", "U8", (8,)))
    first, second = ShardSpec(0, (0,), (8,), 0, 0), ShardSpec(1, (0,), (8,), 0, 7)
    for shards in ((first, second), (second, first)):
        with pytest.raises(MessageInvalid, match=r"takes bytes 0 to 8 of segment 0"):
            check_layout(Layout(tensors, shards, (SegmentSpec(16),)))


def test_shards_may_lie_in_any_order_with_gaps_between() -> None:
    tensors = tuple(TensorSpec(f"t{n}", "U8", (8,)) for n in range(5))
    offsets = (32, 0, 100, 8, 50)
    shards = tuple(ShardSpec(n, (0,), (8,), 0, offset) for n, offset in enumerate(offsets))
    check_layout(Layout(tensors, shards, (SegmentSpec(108),)))


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(max_tensors=3), "tensors"),
        (Limits(max_shards=4), "shards"),
        (Limits(max_segments=1), "segments"),
    ],
)
def test_layout_is_refused_when_it_has_more_than_the_limit(limits: Limits, field: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        decode_layout(encode_layout(LAYOUT), limits)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "layout",
    [
        with_tensor(name=""),
        with_tensor(name="x" * 513),
        with_tensor(name="\ud800"),
        with_tensor(dtype="F32" * 9),
        with_tensor(shape=(1,) * 9),
        with_tensor(shape=(-4,)),
        with_tensor(shape=(4.5,)),
        with_shard(0, offset_bytes=-1),
        with_shard(0, offset_bytes=2**65),
        with_shard(0, segment="0"),
    ],
)
def test_layout_is_not_encoded_when_a_field_breaks_its_type(layout: Layout) -> None:
    with pytest.raises(MessageInvalid):
        encode_layout(layout)


def test_placement_must_offer_a_way_to_every_segment() -> None:
    placement = EXAMPLES["CheckpointReady"].placement  # type: ignore[attr-defined]
    check_placement(LAYOUT, placement)
    with pytest.raises(MessageInvalid, match="the layout has 2 segments"):
        check_placement(LAYOUT, placement[:1])
    with pytest.raises(MessageInvalid, match="at least one way"):
        check_placement(LAYOUT, (placement[0], ()))
    with pytest.raises(MessageInvalid, match="absolute path"):
        check_placement(LAYOUT, (placement[0], (FileSegment(path="../etc"),)))


def test_layout_of_many_tensors_is_accepted_without_spending_the_overlap_budget() -> None:
    """Whole tensors and slices in order take the quick path, which spends nothing."""
    tensors = tuple(TensorSpec(f"t{n}", "BF16", (8, 2)) for n in range(5_000))
    shards = [
        ShardSpec(n, (4 * half, 0), (4, 2), half, 16 * n) for n in range(5_000) for half in (0, 1)
    ]
    layout = Layout(tensors, tuple(shards), (SegmentSpec(80_000), SegmentSpec(80_000)))
    check_layout(layout, Limits(max_overlap_steps_per_shard=0))

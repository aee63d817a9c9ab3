"""Needs: every rule has a test that breaks it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.examples import LAYOUT, NEEDS
from tests.unit.schemas.hostile import mutations
from tests.unit.schemas.strategies import needs_of_nothing
from weightbus.schemas import (
    Copy,
    Fill,
    Limits,
    MessageInvalid,
    Needs,
    ParameterSpec,
    Transform,
    check_needs,
    decode_needs,
    digest_of,
    encode_needs,
    needs_digest,
)
from weightbus.schemas.blobs import canonical, compress


def with_parameter(**fields: Any) -> Needs:
    changed = msgspec.structs.replace(NEEDS.parameters[0], **fields)
    return msgspec.structs.replace(NEEDS, parameters=(changed, NEEDS.parameters[1]))


def with_copy(**fields: Any) -> Needs:
    changed = msgspec.structs.replace(NEEDS.copies[0], **fields)
    return msgspec.structs.replace(NEEDS, copies=(changed, NEEDS.copies[1]))


def with_fill(**fields: Any) -> Needs:
    return msgspec.structs.replace(
        NEEDS, fills=(msgspec.structs.replace(NEEDS.fills[0], **fields),)
    )


@given(needs=needs_of_nothing())
def test_needs_survive_their_encoding(needs: Needs) -> None:
    blob = encode_needs(needs)
    assert decode_needs(blob) == needs
    assert needs_digest(needs) == digest_of(blob)


@given(data=st.data(), needs=needs_of_nothing())
def test_mutated_needs_are_valid_or_refused(data: st.DataObject, needs: Needs) -> None:
    raw = data.draw(mutations(canonical("needs", needs)))
    try:
        found = decode_needs(compress(raw))
    except MessageInvalid:
        return
    assert decode_needs(encode_needs(found)) == found


def test_example_keeps_the_rules_of_its_layout() -> None:
    check_needs(NEEDS, LAYOUT)


@pytest.mark.parametrize(
    ("needs", "field", "limit"),
    [
        (with_parameter(dtype="F4"), "parameters[0].dtype", "must be one of"),
        (with_parameter(name="norm.weight"), "parameters[1].name", "must be unique"),
        (with_parameter(strides=(4,)), "parameters[0].strides", "one stride"),
        (with_parameter(strides=(4, -1)), "parameters[0].strides", "not negative"),
        (with_parameter(shape=(2**40, 2**11)), "parameters[0].shape", "at most"),
        (with_parameter(strides=(2**49, 1)), "parameters[0].shape", "at most"),
        (with_copy(starts=(0,)), "copies[0].strides", "as many as sizes: 2"),
        (with_copy(strides=(4,)), "copies[0].strides", "as many as sizes: 2"),
        (with_copy(parameter=2), "copies[0].parameter", "there are 2 parameters"),
        (with_copy(transform=1), "copies[0].transform", "there are 1 transforms"),
        (with_copy(offset=5), "copies[0]", "parameter 0 has 16 elements"),
        (with_copy(strides=(-4, 1)), "copies[0]", "parameter 0 has 16 elements"),
        (with_copy(strides=(2**50, 2**50)), "copies[0]", "parameter 0 has 16 elements"),
        (with_fill(parameter=2), "fills[0].parameter", "there are 2 parameters"),
        (with_fill(offset=13), "fills[0]", "parameter 0 has 16 elements"),
        (with_fill(strides=()), "fills[0].strides", "as many as sizes"),
        (with_fill(value=float("nan")), "fills[0].value", "must be a number"),
        (
            msgspec.structs.replace(NEEDS, transforms=(Transform((("cast", "F4"),)),)),
            "transforms[0]",
            "known dtype",
        ),
        (
            msgspec.structs.replace(NEEDS, transforms=(Transform((("neg", "F32"),)),)),
            "transforms[0]",
            "known dtype",
        ),
    ],
)
def test_needs_are_refused_naming_what_breaks_a_rule(needs: Needs, field: str, limit: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        check_needs(needs)
    assert (caught.value.kind, caught.value.field) == ("needs", field)
    assert limit in caught.value.limit
    with pytest.raises(MessageInvalid):
        encode_needs(needs)


@pytest.mark.parametrize(
    ("needs", "field", "limit"),
    [
        (with_copy(tensor=4), "copies[0].tensor", "has 4 tensors"),
        (with_copy(starts=(4, 0)), "copies[0].sizes", "of tensor model.embed_tokens.weight"),
        (with_copy(tensor=1), "copies[0].sizes", "of tensor model.norm.weight"),
        (with_parameter(dtype="F32"), "copies[0].transform", "BF16 into F32"),
    ],
)
def test_needs_are_refused_when_they_do_not_fit_the_layout(
    needs: Needs, field: str, limit: str
) -> None:
    check_needs(needs)
    with pytest.raises(MessageInvalid) as caught:
        check_needs(needs, LAYOUT)
    assert caught.value.field == field
    assert limit in caught.value.limit + caught.value.value


def test_copy_may_run_backwards_and_a_fill_be_infinite() -> None:
    check_needs(with_copy(offset=11, strides=(-4, -1)), LAYOUT)
    infinite = with_fill(value=float("-inf"))
    assert decode_needs(encode_needs(infinite)) == infinite


def test_empty_window_may_lie_anywhere() -> None:
    check_needs(with_copy(sizes=(0, 4), offset=10**9), LAYOUT)


def test_untraced_model_names_whole_tensors_and_no_destination() -> None:
    copies = (Copy(0, (0, 0), (6, 4), 0, 0, (0, 0)), Copy(2, (), (), 0, 0, ()))
    check_needs(Needs((), copies), LAYOUT)
    with pytest.raises(MessageInvalid, match="there are 0 parameters"):
        check_needs(Needs((), (msgspec.structs.replace(copies[0], parameter=1),)))
    with pytest.raises(MessageInvalid, match="there are 0 parameters"):
        check_needs(Needs((), copies, (Fill(0, 0, (), (), 0.0),)))


def test_empty_parameter_takes_no_element() -> None:
    empty = ParameterSpec("empty", "BF16", (0, 4), (4, 1))
    check_needs(Needs((empty,), (Copy(0, (0, 0), (0, 4), 0, 0, (4, 1)),)))
    with pytest.raises(MessageInvalid, match="has 0 elements"):
        check_needs(Needs((empty,), (Copy(0, (0, 0), (1, 1), 0, 0, (4, 1)),)))


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(max_parameters=1), "parameters"),
        (Limits(max_copies=1), "copies"),
        (Limits(max_fills=0), "fills"),
        (Limits(max_transforms=0), "transforms"),
    ],
)
def test_needs_are_refused_when_they_have_more_than_the_limit(limits: Limits, field: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        decode_needs(encode_needs(NEEDS), limits)
    assert caught.value.field == field

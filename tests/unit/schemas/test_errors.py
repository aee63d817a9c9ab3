"""The one error keeps its texts short and printable, whatever was found."""

from __future__ import annotations

import pytest

from weightbus.schemas import DeadLetter, MessageInvalid, WeightBusError, decode, encode


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("text", "text"),
        (7, "7"),
        (1 << 20_000, "an integer of 20001 bits"),
        (-(1 << 20_000), "an integer of 20001 bits"),
        ([[[[[1]]]]], "[[[[...]]]]"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ("a\nb\x1b[0m", r"a\nb\x1b[0m"),
        (None, "None"),
    ],
    ids=range(8),
)
def test_value_is_shown_short_and_printable(value: object, shown: str) -> None:
    error = MessageInvalid("thing", "$", value, "limit")
    assert error.value == shown
    assert str(error) == f"thing: $ is {shown}: limit"
    assert isinstance(error, WeightBusError)


def test_error_fits_a_dead_letter_whatever_it_says() -> None:
    long = "\x00\U0001f600" * 5000
    error = MessageInvalid(long, long, long, long)
    letter = DeadLetter(
        model="m",
        subject="s",
        reason=str(error),
        field=error.field,
        value=error.value,
        limit=error.limit,
    )
    assert decode(encode(letter), None, DeadLetter) == letter
    assert str(error).isprintable()

"""Numbers for people keep three digits and their unit."""

from __future__ import annotations

import pytest

from weightbus.tracing.text import (
    counted,
    format_bytes,
    format_rate,
    format_seconds,
    gigabytes_per_second,
    printable,
)


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0.00 ms"), (0.000_412, "0.41 ms"), (0.0123, "12.3 ms"), (0.123, "123 ms"),
    (0.0099949, "9.99 ms"), (0.009995, "10.0 ms"), (0.09995, "100 ms"), (0.9994, "999 ms"),
    (0.9995, "1.00 s"), (12.34, "12.3 s"), (1234.0, "1,234 s"), (-0.5, "-500 ms"),
])  # fmt: skip
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("size_bytes", "text"), [
    (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
    (90_900_000, "90.9 MB"), (61_064_245_248, "61.1 GB"), (2 * 10**12, "2.00 TB"),
    (5 * 10**15, "5,000 TB"),
])  # fmt: skip
def test_sizes_have_three_digits(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_rate_is_none_when_nothing_moved_or_no_time_passed() -> None:
    assert gigabytes_per_second(0, 1.0) is None
    assert gigabytes_per_second(5, 0.0) is None
    assert gigabytes_per_second(2_000_000_000, 0.5) == 4.0
    assert [format_rate(rate) for rate in (None, 0.001, 0.5, 178.4)] == ["", "<0.01", "0.50", "178"]


def test_text_loses_its_control_characters_and_nothing_else() -> None:
    assert printable("grün → 100 %") == "grün → 100 %"
    assert printable("a\x1b[31mb\r\n\u202ec") == "a\\x1b[31mb\\r\\n\\u202ec"


def test_things_are_counted_in_the_right_number() -> None:
    told = [counted(count, "rank") for count in (0, 1, 2, 2048)]
    assert told == ["0 ranks", "1 rank", "2 ranks", "2,048 ranks"]

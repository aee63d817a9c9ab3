"""The server's time stamps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightbus.bus.jetstream_api import nanoseconds_of, rfc3339_of


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("2026-11-20T23:00:05.401726130Z", 1_795_215_605_401_726_130),
        ("2026-11-20T23:00:05.40172613Z", 1_795_215_605_401_726_130),
    ],
)
def test_time_is_read_when_the_server_left_out_trailing_zeros(text: str, time_ns: int) -> None:
    assert nanoseconds_of(text) == time_ns


@given(st.integers(0, 2**63 - 1))
def test_time_comes_back_when_it_was_written(time_ns: int) -> None:
    assert nanoseconds_of(rfc3339_of(time_ns)) == time_ns

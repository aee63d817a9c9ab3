"""A span's reference survives message headers, and what is no reference is none."""

from __future__ import annotations

import pytest

from weightbus.tracing.context import SpanRef

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("ref", [
    SpanRef(TRACE, SPAN),
    SpanRef(TRACE, SPAN, sampled=False),
    SpanRef(TRACE, SPAN, tracestate="vendor=t61rcWkgMzE,other=1"),
])  # fmt: skip
def test_span_ref_is_the_same_when_it_went_through_headers(ref: SpanRef) -> None:
    assert SpanRef.from_headers(ref.headers()) == ref


def test_span_ref_headers_are_a_w3c_traceparent() -> None:
    assert SpanRef(TRACE, SPAN).headers() == {"traceparent": f"00-{TRACE}-{SPAN}-01"}


def test_span_ref_is_found_when_the_header_is_written_in_another_case() -> None:
    headers = {"Content-Type": "application/json", "Traceparent": f"00-{TRACE}-{SPAN}-01"}
    assert SpanRef.from_headers(headers) == SpanRef(TRACE, SPAN)


@pytest.mark.parametrize("headers", [
    {},
    {"traceparent": ""},
    {"traceparent": "garbage"},
    {"traceparent": f"ff-{TRACE}-{SPAN}-01"},
    {"traceparent": f"00-{'0' * 32}-{SPAN}-01"},
    {"traceparent": f"00-{TRACE}-{'0' * 16}-01"},
    {"traceparent": f"00-{TRACE[:-1]}-{SPAN}-01"},
    {"traceparent": f"00-{TRACE}-{SPAN}-01" + "-x" * 1000},
    {"tracestate": "vendor=1"},
])  # fmt: skip
def test_span_ref_is_none_when_the_headers_name_no_valid_span(headers: dict[str, str]) -> None:
    assert SpanRef.from_headers(headers) is None

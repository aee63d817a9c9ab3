"""The words for telemetry that was lost."""

from __future__ import annotations

import pytest

from weightbus.tracing.lost import cause_told, lost_told

URL = "http://127.0.0.1:4318/v1/traces"
POOL = (
    "Failed to export span batch code: None, reason: HTTPConnectionPool(host='127.0.0.1', "
    'port=4318): Max retries exceeded with url: /v1/traces (Caused by NewConnectionError("HTTP'
    "Connection(host='127.0.0.1', port=4318): Failed to establish a new connection: [Errno 111] "
    'Connection refused"))'
)


@pytest.mark.parametrize(
    ("count", "told"),
    [(1, "1 span of trainer was lost"), (2, "2 spans of trainer were lost")],
)
def test_loss_is_told_in_its_number(count: int, told: str) -> None:
    assert lost_told(count, "span", "spans", "trainer") == told


@pytest.mark.parametrize(
    ("endpoint", "said", "told"),
    [
        (URL, POOL, f"nobody answered at {URL}: Connection refused"),
        (URL, "it was not taken", f"{URL}: it was not taken"),
        (URL, "", f"sent to {URL}"),
        ("", "no", "an exporter: no"),
        ("http://me:secret@host:1/v1?key=x", "no", "http://host:1/v1: no"),
    ],
)
def test_cause_names_the_endpoint_and_no_object(endpoint: str, said: str, told: str) -> None:
    assert cause_told(endpoint, said) == told

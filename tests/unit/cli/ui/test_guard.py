"""Which Host headers name the page's server."""

from __future__ import annotations

import pytest

from weightbus.cli.ui.guard import is_allowed_host


@pytest.mark.parametrize(
    ("header", "own"),
    [
        ("127.0.0.1:8420", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("LocalHost:1", "127.0.0.1"),
        ("[::1]:8420", "::1"),
        ("[::1]", "127.0.0.1"),
        ("192.168.1.7:80", "0.0.0.0"),
        ("trainer.lan:8420", "trainer.lan"),
        ("Trainer.LAN", "trainer.lan"),
    ],
)
def test_host_is_allowed_by_address_or_by_its_own_name(header: str, own: str) -> None:
    assert is_allowed_host(header, own)


@pytest.mark.parametrize(
    "header",
    [
        "", ":8420", "evil.example", "evil.example:8420", "127.0.0.1.evil.example",
        "localhost.evil.example", "localhost:8420:evil", "127.0.0.1:x", "::1", "[::1", "[evil]",
        "127.0.0.1@evil.example", "0x7f000001", "2130706433.example",
    ],
)  # fmt: skip
def test_host_is_refused_by_any_other_name(header: str) -> None:
    assert not is_allowed_host(header, "127.0.0.1")

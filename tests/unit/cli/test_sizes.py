"""Sizes as people write them."""

from __future__ import annotations

import pytest

from weightbus.cli.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("512MiB", 512 * 2**20),
        ("512mib", 512 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("7B", 7),
        ("1TiB", 2**40),
    ],
)
def test_size_is_read_when_it_is_written_as_people_do(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 XiB", "1e9", "12 34", "512M"])
def test_size_is_refused_and_named_when_it_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size in bytes such as 512MiB"):
        parse_bytes(text)

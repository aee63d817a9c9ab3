"""Sizes in bytes, as people write them: `512MiB`, `2GB`, `1048576`. Does no I/O."""

from __future__ import annotations

import re
from typing import Final

import click

__all__ = ("parse_bytes", "read_size")

_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 10 ** (3 * n) for n, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 2 ** (10 * n) for n, letter in enumerate("kmgt", 1)},
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """
    Raises:
        ValueError: it is no size; says how one is written.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (unit := found[2].lower()) not in _UNITS:
        raise ValueError(f"{text!r} is not a size in bytes such as 512MiB, 2GB or 1048576")
    return int(float(found[1]) * _UNITS[unit])


def read_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Callback of an option that is a size."""
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None

"""Staging blocks of a model, from outside: who has filled what. Only reads; blocking, but quick."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import anyio

from tests.integration.fleet.log import DEADLINE_S
from weightbus.bus.blocks import SHM_DIRECTORY, STAGE_PREFIX
from weightbus.schemas.shared_memory import SHM_FILLED_OFFSET, SHM_HEADER_BYTES, TURN_BITS

__all__ = ("staged_bytes", "staging_blocks", "turns_of", "until_filled")

POLL_S = 0.001


def staging_blocks(model: str) -> list[Path]:
    """Of whatever consumer."""
    return sorted(SHM_DIRECTORY.glob(f"{STAGE_PREFIX}{model}.*"))


def turns_of(model: str) -> dict[Path, int]:
    """The transfer that every block is in, or was in last."""
    return {block: _filled(block)[0] for block in staging_blocks(model)}


def staged_bytes(model: str) -> int:
    """Data of all staging blocks that are there now."""
    sizes = []
    for block in staging_blocks(model):
        try:
            sizes.append(block.stat().st_size - SHM_HEADER_BYTES)
        except FileNotFoundError:  # it went meanwhile
            continue
    return sum(sizes)


async def until_filled(model: str, parts: int, *, after: Mapping[Path, int] = {}) -> Path:
    """Wait until somebody has filled so many parts in one transfer; returns the block.

    Transfers `after` these turns count: blocks are kept, with the words of the transfer before.
    """
    with anyio.move_on_after(DEADLINE_S):
        while True:
            for block in staging_blocks(model):
                turn, filled = _filled(block)
                if filled >= parts and after.get(block) != turn:
                    return block
            await anyio.sleep(POLL_S)
    raise AssertionError(f"no block of {model} was filled {parts} times within {DEADLINE_S:g} s")


def _filled(block: Path) -> tuple[int, int]:
    """(turn, parts) of its owner's word; zeros: the block is gone, or was never filled."""
    try:
        with block.open("rb", buffering=0) as file:
            word = os.pread(file.fileno(), 8, SHM_FILLED_OFFSET)
    except FileNotFoundError:
        return 0, 0
    return divmod(struct.unpack("<Q", word)[0], 1 << TURN_BITS) if len(word) == 8 else (0, 0)

"""Where a version comes from, as far as a planner is told. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from weightbus.schemas.rounds import Links

__all__ = ("PlanSource", "SourceMemory")

SourceMemory = Literal["host", "gpus", "other"]
"""What engines that go `local` read: memory of their host, every segment; memory of its GPUs, some
segment at least; or anything else: files, some of each, or what is not known."""


class PlanSource(Struct, frozen=True, kw_only=True):
    """Where the version comes from, as far as the planner is told."""

    links: Links | None = None
    """Of each host that offers it; None: of the best host of any engine."""
    hosts: int = 1
    layout_bytes: int = 0
    """Of the whole version; 0, not known: the least that all ranks of one engine need. That is too
    much if they hold tensors twice, and too little if the engine takes only a part of them."""
    files: bool = False
    """`local` reads files, not memory."""
    memory: SourceMemory = "other"
    """That `local` reads. Only memory of the host is worth sharing among engines that could read it
    themselves: files are streamed as it is, and GPUs read their peers faster."""

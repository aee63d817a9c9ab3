"""Where trainers of the benchmark keep what they publish. Does no I/O."""

from __future__ import annotations

from typing import Literal

from benchmarks.h200.setup import Setup
from weightbus.producers.publisher import PublisherOptions

__all__ = ("SlotKind", "publisher_options")

SlotKind = Literal["host", "gpu"]


def publisher_options(slots: SlotKind, setup: Setup, threads: int) -> PublisherOptions:
    """Nobody is waited for at the end: every version was checked already.

    Args:
        threads: of a rank, for what is digested on the CPU.
    """
    on_gpu = slots == "gpu" and not setup.cpu
    return PublisherOptions(
        slots="device" if on_gpu else "host",
        linger_s=0.0,
        close_wait_s=5.0,
        digest_threads=threads,
    )

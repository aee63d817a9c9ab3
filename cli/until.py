"""Waiting for the end of a command that runs until it is told to stop."""

from __future__ import annotations

import signal

import anyio

__all__ = ("until_stopped",)


async def until_stopped() -> None:
    """Waits for SIGINT or SIGTERM; returns, so that contexts are left in order."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return

"""Starts the front process of a `torch` engine for a consumer, and waits until an engine is ready.

Owns the front's guard while `open_front` is open: the engine ends with this process, however this
one ends.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import anyio
from anyio.abc import Process

from weightbus.bus.guard import STOP_GRACE_S, guarded_command
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.torch import server
from weightbus.consumers.engines.torch.client import TorchEngineClient
from weightbus.consumers.engines.torch.messages import StateReport
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.errors import EngineUnavailable

__all__ = ("START_TIMEOUT_S", "open_front", "wait_until_ready")

START_TIMEOUT_S = 120.0
"""How long an engine's ranks may take to answer: torch is imported and the model built."""

_READY_POLL_S = 0.02
_STATE_S = 5.0
_LOG_TAIL_BYTES = 2000
_KILLED_S = 5.0
"""A killed process runs nothing of its own any more; so long the kernel may take to end it."""


@asynccontextmanager
async def open_front(place: EngineDirectory, spec: TorchEngineSpec) -> AsyncIterator[Process]:
    """Run a front process that lives no longer than this one. Yields its guard."""
    with _create(place.log) as log:
        guard = await anyio.open_process(
            guarded_command(
                [sys.executable, "-m", server.__name__, str(place.path), spec.to_json()]
            ),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield guard
    finally:
        with anyio.CancelScope(shield=True):
            if guard.stdin is not None:
                await guard.stdin.aclose()
            with anyio.move_on_after(STOP_GRACE_S + 2):
                await guard.wait()
            if guard.returncode is None:
                guard.kill()
                with anyio.move_on_after(_KILLED_S):
                    await guard.wait()


async def wait_until_ready(
    client: TorchEngineClient, place: EngineDirectory, front: Process | None, timeout_s: float
) -> StateReport:
    """What an engine says of itself once all its ranks answer.

    Raises:
        EngineUnavailable: it is not there, has ended, or is not ready in time.
    """
    reason = f"it was not ready within {timeout_s:g} s"
    with anyio.move_on_after(timeout_s):
        while front is None or front.returncode is None:
            try:
                report = await client.state(_STATE_S)
            except EngineUnavailable:
                if front is None:
                    raise
            else:
                if report.ready:
                    return report
            await anyio.sleep(_READY_POLL_S)
        reason = f"it ended with status {front.returncode}: {_tail(place.log)}"
    raise EngineUnavailable(str(place.path), reason)


def _create(log: Path) -> BinaryIO:
    return log.open("wb")


def _tail(log: Path) -> str:
    """What the log says last; what a later line says again is left out."""
    text = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    lines = text.splitlines()
    kept = [line for n, line in enumerate(lines) if not any(line in one for one in lines[n + 1 :])]
    return "\n".join(kept)

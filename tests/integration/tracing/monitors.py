"""For tests of the commands that look on: a history on a real bus, and the command itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import anyio
from msgspec import structs

from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.schemas.base import Message
from weightbus.schemas.progress import EngineState

__all__ = ("COMMAND", "DEADLINE_S", "drop_engine", "environment", "put_on_bus", "weightbus")

COMMAND = (sys.executable, "-c", "from weightbus.cli.main import main; main()")
"""The `weightbus` script, whether or not it is installed in PATH."""

DEADLINE_S = 60

PRESENCE_TTL_S = 120
"""Heartbeats come once in these tests and must outlive the start of a slow command."""


def environment(**variables: str) -> dict[str, str]:
    """Ours without what would change the output, and with `variables`."""
    ours = {key: text for key, text in os.environ.items() if not key.startswith("WEIGHTBUS_")}
    ours.pop("FORCE_COLOR", None)
    return ours | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"} | variables


def weightbus(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def put_on_bus(settings: BusSettings, messages: Sequence[Message]) -> None:
    """Publish messages, and heartbeats as presence, in this order."""

    async def publish() -> None:
        async with open_bus(structs.replace(settings, presence_ttl_s=PRESENCE_TTL_S)) as bus:
            for message in messages:
                if isinstance(message, EngineState):
                    await bus.presence.put(message)
                else:
                    await bus.publish(message)

    anyio.run(publish)


def drop_engine(settings: BusSettings, model: str, engine: str) -> None:
    """End an engine's heartbeat."""

    async def drop() -> None:
        async with open_bus(settings) as bus:
            await bus.presence.drop(model, engine)

    anyio.run(drop)

"""What the commands that only look on have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence

import click
from msgspec import structs

from weightbus.bus.connection import Bus
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import StageComplete
from weightbus.tracing.text import NS_PER_S

__all__ = ("close_broken_pipe", "looked_back", "running_bus")

HISTORY_S = 3600
"""How far back the state at the start is read."""


def running_bus(nats_url: str | None, name: str) -> BusSettings:
    """Settings to reach the bus of `--nats` or the environment; one of our own would be empty.

    Raises:
        click.UsageError: neither names a bus.
        SettingInvalid: a variable's value cannot be used.
    """
    settings = BusSettings.from_env(os.environ)
    url = nats_url or settings.url
    if url is None:
        raise click.UsageError("give --nats URL, or set WEIGHTBUS_NATS_URL: which bus to look at")
    return structs.replace(settings, url=url, name=name)


async def looked_back(
    bus: Bus, kinds: Sequence[type[Message]], model: str | None
) -> AsyncIterator[Received[Message]]:
    """What tells the state at the start: the newest versions, then what was said of late.

    Stages that are over do not belong to it.

    Raises:
        BusUnavailable, BusTimeout, RequestRefused
    """
    since_ns = bus.clock.now_ns() - HISTORY_S * NS_PER_S
    of_late = [kind for kind in kinds if kind not in (CheckpointReady, StageComplete)]
    for history in (
        bus.replay(CheckpointReady, model=model, is_answered=False),
        bus.replay(*of_late, model=model, since_ns=since_ns, is_answered=False),
    ):
        async for received in history:
            yield received


def close_broken_pipe() -> None:
    """Whoever read our output has gone: let the interpreter end without complaining about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

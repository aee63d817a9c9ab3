"""The bus on a real server: publish, subscribe, look back."""

from __future__ import annotations

import pytest

from weightbus.bus.connection import Bus
from weightbus.bus.received import Received
from weightbus.schemas.checkpoint import CheckpointReady

pytestmark = pytest.mark.anyio


def ready(version: int, model: str = "m") -> CheckpointReady:
    return CheckpointReady(model=model, version=version, producer="trainer", files=("/a.st",))


async def test_subscriber_receives_message_when_published(bus: Bus) -> None:
    async with bus.subscribe(CheckpointReady, model="m") as messages:
        await bus.publish(ready(1), {"traceparent": "00-1-2-01"})
        received = await anext(messages)
    assert isinstance(received, Received)
    assert received.message == ready(1)
    assert received.headers["traceparent"] == "00-1-2-01"

"""A plain NATS client: what programs in other languages do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import nats
from nats.aio.client import Client

__all__ = ("publish_raw", "raw_client")


@asynccontextmanager
async def raw_client(url: str) -> AsyncIterator[Client]:
    client = await nats.connect(url)
    try:
        yield client
    finally:
        await client.close()


async def publish_raw(url: str, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
    """Store a message; returns once the server has it."""
    async with raw_client(url) as client:
        await client.jetstream().publish(subject, payload, headers=dict(headers) or None)

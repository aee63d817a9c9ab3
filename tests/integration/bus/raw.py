"""A plain NATS client: what programs in other languages do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import nats
from nats.aio.client import Client

__all__ = ("last_raw", "publish_raw", "raw_client")


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


async def last_raw(client: Client, stream: str, subject: str) -> tuple[str, int, bytes]:
    """(subject, sequence, payload) of the last message of a subject, which may hold wildcards."""
    last = await client.jetstream().get_last_msg(stream, subject)
    assert last.subject is not None
    assert last.seq is not None
    return last.subject, last.seq, last.data or b""

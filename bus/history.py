"""What the streams still hold, in the order in which it was stored. Does no I/O of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from weightbus.bus.jetstream import JetStream, StoredMessage

__all__ = ("merged_scan",)


async def merged_scan(
    jetstream: JetStream, sources: Sequence[tuple[str, str]], since_ns: int
) -> AsyncIterator[StoredMessage]:
    """Messages of several (stream, subject) pairs, by the time when the server stored them."""
    scans = [jetstream.scan(stream, subject, since_ns=since_ns) for stream, subject in sources]
    heads = [(scan, await anext(scan, None)) for scan in scans]
    while True:
        ready = [(scan, head) for scan, head in heads if head is not None]
        if not ready:
            return
        first, message = min(ready, key=lambda pair: pair[1].stored_ns)
        yield message
        heads = [(scan, await anext(scan, None) if scan is first else head) for scan, head in ready]

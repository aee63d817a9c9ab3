"""Arrays of 64-bit digests, and how they lie in the object store: 8 bytes each, little endian."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import numpy as np

from weightbus.bus.connection import Bus
from weightbus.bus.errors import ObjectCorrupt

__all__ = ("Sums", "get_sums", "put_sums")

Sums = np.ndarray[Any, np.dtype[np.uint64]]
"""One digest per shard or tensor, in layout order."""


async def put_sums(bus: Bus, sums: Sums) -> str:
    """Store digests; returns their key.

    The key is nobody else's, though others store the same digests: who put them may delete them.
    """
    blob = sums.astype("<u8").tobytes()
    return await bus.objects.put(hashlib.sha256(secrets.token_bytes(32) + blob).hexdigest(), blob)


async def get_sums(bus: Bus, key: str, count: int) -> Sums:
    """The `count` digests under a key.

    Raises:
        ObjectCorrupt: there are more or fewer.
        ObjectMissing: there are none.
    """
    blob = await bus.objects.get(key)
    if len(blob) != 8 * count:
        raise ObjectCorrupt(key, "size", f"{len(blob)} bytes", f"{8 * count} bytes")
    return np.frombuffer(blob, dtype="<u8").astype(np.uint64)

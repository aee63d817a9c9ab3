"""Calls that run beside each other, as one call to whoever makes them. Does no I/O."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

__all__ = ("beside",)


@asynccontextmanager
async def beside() -> AsyncIterator[TaskGroup]:
    """A task group of which the first error comes out as it is."""
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None

"""A task group for a component's own tasks, which does not wrap the errors of its user. No I/O."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

__all__ = ("open_background",)


@asynccontextmanager
async def open_background() -> AsyncIterator[TaskGroup]:
    """Tasks that are cancelled when the context closes.

    An error raised inside the context comes out as it is, and not in an exception group: the user
    of a component need not know that it has tasks. Tasks must report their failures by other means;
    one that raises is a bug, and comes out too.
    """
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise

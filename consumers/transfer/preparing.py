"""What a route does before the engine is paused: its workers make ready what takes long.

They map and register memory, open handles and plan streams while the engine serves; where they have
that from the last update, one question is all there is. Best effort: what could not be prepared is
done, or fails, when it is applied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

import anyio

from weightbus.consumers.transfer.route import Transfer
from weightbus.schemas.worker import Feed

__all__ = ("prepare_ranks",)

FIRST_PAUSE_S: Final = 5e-3
"""Between two questions; a rank answers within a step of its model."""

LONGEST_PAUSE_S: Final = 20e-3
"""What takes longer takes seconds."""

_logger = logging.getLogger(__name__)


async def prepare_ranks(
    transfer: Transfer, feeds: Mapping[int, Feed], left_s: Callable[[], float]
) -> dict[int, str]:
    """Return when every rank is ready for its feed, or has said why it cannot be: by rank, those
    that cannot. A reason begins with the name of the error.

    Called before `transfer.begin_write`.

    Args:
        left_s: seconds that are left of the transfer; raises `DeadlineExceeded`.

    Raises:
        ApplyFailed: a worker refused; no parameter is touched.
        WorkerLost
        DeadlineExceeded: the transfer's time is up.
    """
    waiting, pause_s = dict(feeds), FIRST_PAUSE_S
    reasons: dict[int, str] = {}
    while True:
        replies = await transfer.engine.prepare(transfer.layout_digest, waiting, left_s())
        for reply in replies:
            if reply.ready:
                waiting.pop(reply.rank, None)
            if reply.reason:
                reasons[reply.rank] = reply.reason
                _logger.info("rank %d is not prepared: %s", reply.rank, reply.reason)
        if not waiting:
            return reasons
        await anyio.sleep(min(pause_s, left_s()))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

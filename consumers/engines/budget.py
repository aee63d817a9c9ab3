"""How a budget is shared between who asks and who answers. Does no I/O."""

from __future__ import annotations

import anyio

__all__ = ("left_s", "share_for_peer")

_SHARE = 0.1
_MAX_KEPT_S = 1.0


def left_s(end: float) -> float:
    """Of a budget that ends at this time of the event loop's clock."""
    return max(0.0, end - anyio.current_time())


def share_for_peer(deadline_s: float) -> float:
    """The part of a budget that the other side is given, in seconds.

    It ends a little earlier, so that the answer, which names the cause, comes in time.
    """
    return deadline_s - min(deadline_s * _SHARE, _MAX_KEPT_S)

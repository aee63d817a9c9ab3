"""Consumers on hosts of their own, as if they were on other machines: no byte is mapped.

Does no I/O.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from weightbus.schemas.rounds import Budgets, RoundPlan

__all__ = ("ADDRESS", "BUDGETS", "STAGING_BYTES", "elsewhere", "filler", "routes_of")

ADDRESS = "127.0.0.1"

STALL_S = 4.0
"""So soon somebody who stands still is given up."""

STAGING_BYTES = 16 * 2**20
"""Little, so that a version takes many buckets."""

BUDGETS = Budgets(transfer_s=45.0, round_s=75.0)
"""Deadlines that the survivors of a fault must keep."""

FILLER_BYTES = 96 * 2**20


def elsewhere(name: str, **changes: Any) -> dict[str, Any]:
    """Settings that put the consumer `name` on a host of its own."""
    return {
        "host_id": f"host-{name}",
        "routes": ("broadcast", "p2p"),
        "staging_bytes": STAGING_BYTES,
        "stall_s": STALL_S,
        "budgets": BUDGETS,
        **changes,
    }


@cache
def filler(size_bytes: int = FILLER_BYTES) -> torch.Tensor:
    """A tensor that no engine needs, but that is digested, and so moved: it takes its time."""
    return torch.arange(256, dtype=torch.uint8).repeat(size_bytes // 256)


def routes_of(plan: RoundPlan) -> dict[str, str]:
    """Engine -> its route."""
    return {part.engine: part.ranks[0].route for part in plan.engines}

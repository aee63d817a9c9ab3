"""The round leases of one consumer process: won, renewed, released; each change becomes an event.

Owns what is known of the leases that are held. Its methods are errands: one at a time, in order.
"""

from __future__ import annotations

from collections.abc import Callable

from weightbus.bus.connection import Bus
from weightbus.bus.errors import LeaseLost
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.round import events as ev
from weightbus.schemas.leases import RoundLease

__all__ = ("Campaigns",)


class Campaigns:
    """Campaigns for rounds on behalf of one round machine."""

    def __init__(
        self, bus: Bus, config: ConsumerConfig, consumer: str, feed: Callable[[ev.Event], None]
    ) -> None:
        self._leases = bus.round_leases
        self._config = config
        self._consumer = consumer
        self._feed = feed
        self._held: dict[str, RoundLease] = {}

    async def campaign(self, round: str) -> None:
        """Create a round's lease, or write it anew: feeds `LeaseWon` or `LeaseHeld`."""
        wanted = RoundLease(
            model=self._config.model,
            round=round,
            leader=self._config.engine,
            epoch=0,
            consumer=self._consumer,
        )
        lease = await self._leases.acquire(wanted, self._config.round_ttl_s)
        if lease.consumer == self._consumer:
            self._held[round] = lease
            self._feed(ev.LeaseWon(round=round, epoch=lease.epoch))
        else:
            self._feed(ev.LeaseHeld(round=round, leader=lease.leader))

    async def renew(self, round: str) -> None:
        """Keep a lease: feeds `LeaseLost` if it is not ours any more."""
        if (lease := self._held.get(round)) is None:
            return
        try:
            await self._leases.renew(lease, self._config.round_ttl_s)
        except LeaseLost:
            del self._held[round]
            self._feed(ev.LeaseLost(round=round))

    async def release(self, round: str) -> None:
        """Give a lease up, if it is held."""
        if (lease := self._held.pop(round, None)) is not None:
            await self._leases.release(lease)

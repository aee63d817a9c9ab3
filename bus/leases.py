"""Leases: who leads a round, and who is reading a version.

Leases are keys with a time to live, which their holders renew; who is gone loses them. Every change
is a compare and set, so that of several clients exactly one succeeds. The server's clock alone
decides what has expired. Every look asks the stream's leader: with replicated buckets, too, it sees
every change that was acknowledged before.
"""

from __future__ import annotations

import msgspec

from weightbus.bus.buckets import KeyBucket
from weightbus.bus.errors import BusTimeout, LeaseLost
from weightbus.bus.jetstream import WrongLastSequence
from weightbus.schemas.catalogue import key_of
from weightbus.schemas.leases import ReaderLease, RoundLease

__all__ = ("ReaderLeases", "RoundLeases")

_MAX_RACES = 16
"""Each lost race means that someone else changed the key; so many in a row do not happen."""


_EPOCH_IS_SEQUENCE = 0
"""Written by `acquire`, which cannot know the sequence of its own write; sequences begin at 1."""


class RoundLeases:
    """Who leads a round: whoever created its key first.

    Every method raises, besides what it names:

    Raises:
        BusUnavailable, BusTimeout, RequestRefused, MessageInvalid
    """

    def __init__(self, bucket: KeyBucket[RoundLease], timeout_s: float) -> None:
        self._bucket = bucket
        self._timeout_s = timeout_s

    async def acquire(self, lease: RoundLease, ttl_s: float) -> RoundLease:
        """The lease that now holds: `lease` if it was free or ours already, else its holder's.

        Its epoch is the sequence of the write that won it: greater than that of every lease of the
        round before, also than our own earlier one. Hence no two leaders ever have one epoch. The
        epoch of the argument is ignored.
        """
        lease = msgspec.structs.replace(lease, epoch=_EPOCH_IS_SEQUENCE)
        expected_sequence = 0
        for _ in range(_MAX_RACES):
            try:
                sequence = await self._bucket.put(lease, ttl_s, expected_sequence=expected_sequence)
            except WrongLastSequence:
                kept = await self._bucket.get(key_of(lease))
                if kept.message is not None and not _same_holder(kept.message, lease):
                    return _with_epoch(kept.message, kept.sequence)
                expected_sequence = kept.sequence
            else:
                return msgspec.structs.replace(lease, epoch=sequence)
        raise BusTimeout(f"lease {key_of(lease)}", self._timeout_s)

    async def renew(self, lease: RoundLease, ttl_s: float) -> RoundLease:
        """Hold on for `ttl_s` from now; the epoch stays that of `lease`.

        Raises:
            LeaseLost: leader and consumer are no longer the holder's.
        """
        key = key_of(lease)
        kept = await self._bucket.get(key)
        if kept.message is None or not _same_holder(kept.message, lease):
            raise LeaseLost(key, kept.message.leader if kept.message else None)
        try:
            await self._bucket.put(lease, ttl_s, expected_sequence=kept.sequence)
        except WrongLastSequence:
            holder = await self.holder(lease.model, lease.round)
            raise LeaseLost(key, holder.leader if holder else None) from None
        return lease

    async def release(self, lease: RoundLease) -> None:
        """Give it up; nothing happens if it is no longer ours."""
        key = key_of(lease)
        kept = await self._bucket.get(key)
        if kept.message is None or not _same_holder(kept.message, lease):
            return
        try:
            await self._bucket.delete(key, expected_sequence=kept.sequence)
        except WrongLastSequence:
            return

    async def holder(self, model: str, round_id: str) -> RoundLease | None:
        """Who leads a round now."""
        kept = await self._bucket.get(f"{model}.{round_id}")
        return None if kept.message is None else _with_epoch(kept.message, kept.sequence)


class ReaderLeases:
    """Who is reading a version's segments: they are not written again while a lease holds.

    Every method raises, besides what it names:

    Raises:
        BusUnavailable, BusTimeout, RequestRefused, MessageInvalid
    """

    def __init__(self, bucket: KeyBucket[ReaderLease]) -> None:
        self._bucket = bucket

    async def take(self, lease: ReaderLease, ttl_s: float) -> None:
        """Begin to read; an engine's lease on a version replaces its older one."""
        await self._bucket.put(lease, ttl_s)

    async def renew(self, lease: ReaderLease, ttl_s: float) -> None:
        """Go on reading for `ttl_s` from now.

        Raises:
            LeaseLost: it ended, or another consumer of the engine took it: the bytes may be gone.
        """
        key = key_of(lease)
        kept = await self._bucket.get(key)
        if kept.message is None or kept.message.consumer != lease.consumer:
            raise LeaseLost(key, kept.message.consumer if kept.message else None)
        try:
            await self._bucket.put(lease, ttl_s, expected_sequence=kept.sequence)
        except WrongLastSequence:
            raise LeaseLost(key, None) from None

    async def release(self, lease: ReaderLease) -> None:
        """Done reading; nothing happens if another consumer of the engine took the lease."""
        key = key_of(lease)
        kept = await self._bucket.get(key)
        if kept.message is None or kept.message.consumer != lease.consumer:
            return
        try:
            await self._bucket.delete(key, expected_sequence=kept.sequence)
        except WrongLastSequence:
            return

    async def readers(self, model: str, version: int) -> tuple[ReaderLease, ...]:
        """Who is reading a version now: every lease taken before the call that still holds.

        An engine that renews meanwhile is found all the same.
        """
        found = {
            kept.message.engine: kept.message
            async for kept in self._bucket.walk(f"{model}.{version}.*")
            if kept.message is not None
        }
        return tuple(found.values())


def _with_epoch(lease: RoundLease, sequence: int) -> RoundLease:
    """A lease that was never renewed has its epoch in the sequence of its one write."""
    if lease.epoch != _EPOCH_IS_SEQUENCE:
        return lease
    return msgspec.structs.replace(lease, epoch=sequence)


def _same_holder(one: RoundLease, other: RoundLease) -> bool:
    return (one.leader, one.consumer) == (other.leader, other.consumer)

"""How many buckets so many bytes are: what the planner predicts is what `plan_buckets` does. Pure.

Of a slot, what a cut may lack, since it falls between rows, and what alignment may take, are left
free.
"""

from __future__ import annotations

from typing import Final

__all__ = ("ALIGNMENT_BYTES", "count_buckets", "cut_bytes")

ALIGNMENT_BYTES: Final = 256
"""What lies in a slot is as far from a multiple of it as it is in its segment."""

_CUTS_PER_BUCKET: Final = 64
"""A shard is cut between whole rows, or blocks of rows, at most 1/64 of a slot long."""

_MIN_CUT_BYTES: Final = 16


def count_buckets(total_bytes: int, bucket_bytes: int, lanes: int) -> int:
    """Buckets of `lanes` slots of `bucket_bytes` that so many bytes take, with what is read along
    between and around them."""
    room = bucket_bytes - cut_bytes(bucket_bytes) - ALIGNMENT_BYTES
    return -(-total_bytes // (room * lanes))


def cut_bytes(bucket_bytes: int) -> int:
    """The most that a cut may fall short of a slot of this size."""
    return max(_MIN_CUT_BYTES, bucket_bytes // _CUTS_PER_BUCKET)

"""The streams and buckets that the bus keeps on the server, as the catalogue has them. No I/O.

A bucket of key `k` is the stream `KV_<bucket>` over `$KV.<bucket>.<k>`, an object store the stream
`OBJ_<bucket>` over `$O.<bucket>.>` (NATS ADR-8 and ADR-20): other NATS clients read them as such.
Names begin with the prefix, so that several buses may share one server. All lie in files.
"""

from __future__ import annotations

import msgspec

from weightbus.bus.jetstream import StreamConfig
from weightbus.schemas.catalogue import (
    BUCKETS,
    STREAMS,
    BucketEntry,
    StreamEntry,
    bucket_name,
    stream_name,
    stream_subjects,
)

__all__ = ("OBJECTS", "bus_streams", "kv_stream", "last_kept", "object_stream")

OBJECTS = "layouts"
"""Name of the object store."""

_NS_PER_S = 10**9
_PROGRESS = "PROGRESS"
_PROGRESS_MAX_AGE_NS = 7 * 86_400 * _NS_PER_S
_PROGRESS_MAX_BYTES = 256 * 2**20
_LAST_KEPT = 16
"""Of each subject: junk that is put on it after the last good message must not hide that one."""
_MARKER_TTL_NS = 10 * _NS_PER_S
"""How long the server's note lasts that a key has expired, for watchers of other clients."""


def bus_streams(prefix: str) -> tuple[StreamConfig, ...]:
    """Every stream that one bus needs."""
    return (
        *(_message_stream(stream, prefix) for stream in STREAMS),
        *(_bucket_stream(bucket, prefix) for bucket in BUCKETS),
        StreamConfig(
            name=object_stream(bucket_name(OBJECTS, prefix)),
            subjects=tuple(f"$O.{bucket_name(OBJECTS, prefix)}.{kind}.>" for kind in "CM"),
            description="Layouts, needs and digests, by digest.",
            discard="new",
        ),
    )


def last_kept(stream: str) -> int | None:
    """How many messages of each subject a stream of the catalogue keeps; None: what happened
    lately, whatever the subject."""
    return None if stream == _PROGRESS else _LAST_KEPT


def _message_stream(stream: StreamEntry, prefix: str) -> StreamConfig:
    config = StreamConfig(
        name=stream_name(stream.name, prefix),
        subjects=stream_subjects(stream, prefix),
        description=stream.description,
    )
    if (kept := last_kept(stream.name)) is not None:
        return msgspec.structs.replace(config, max_msgs_per_subject=kept)
    return msgspec.structs.replace(
        config, max_age=_PROGRESS_MAX_AGE_NS, max_bytes=_PROGRESS_MAX_BYTES
    )


def _bucket_stream(bucket: BucketEntry, prefix: str) -> StreamConfig:
    name = bucket_name(bucket.bucket, prefix)
    return StreamConfig(
        name=kv_stream(name),
        subjects=(f"$KV.{name}.>",),
        description=bucket.description,
        discard="new",
        max_msgs_per_subject=1,
        allow_msg_ttl=True,
        subject_delete_marker_ttl=_MARKER_TTL_NS,
    )


def kv_stream(bucket: str) -> str:
    """The stream behind a key-value bucket of the server."""
    return f"KV_{bucket}"


def object_stream(bucket: str) -> str:
    """The stream behind an object store of the server."""
    return f"OBJ_{bucket}"

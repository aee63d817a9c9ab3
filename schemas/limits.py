"""What a decoder is willing to believe: one number for everything that a peer could make large.

Does no I/O. The `MAX_*` constants are part of the contract: they stand in the types, so that a
decoder stops at the length word, and in the JSON Schema. `Limits` may be narrower, never wider.
"""

from __future__ import annotations

from msgspec import Struct

__all__ = (
    "DEFAULT_LIMITS",
    "MAX_CELLS",
    "MAX_COPIES",
    "MAX_ELEMENTS",
    "MAX_FILLS",
    "MAX_PARAMETERS",
    "MAX_SEGMENTS",
    "MAX_SHARDS",
    "MAX_TENSORS",
    "MAX_TRANSFORMS",
    "Limits",
)

MAX_TENSORS = 1_000_000
MAX_SHARDS = 4_000_000
MAX_SEGMENTS = 4_096
MAX_PARAMETERS = 1_000_000
MAX_COPIES = 4_000_000
MAX_FILLS = 1_000_000
MAX_TRANSFORMS = 4_096
MAX_CELLS = 4_000_000
MAX_ELEMENTS = 2**50
"""Elements of one tensor, counting an extent of 0 as 1, and bytes of one tensor."""


class Limits(Struct, frozen=True, kw_only=True):
    """Limits of every decoder. Sizes are bytes; the rest are counts."""

    max_payload_bytes: int = 2**20
    """One message of the bus: the default `max_payload` of nats-server."""
    max_worker_payload_bytes: int = 256 * 2**20
    """One message between a consumer and a worker; it may hold a layout or needs."""
    max_blob_bytes: int = 64 * 2**20
    """One object (layout, needs) as it is stored: compressed."""
    max_object_bytes: int = 256 * 2**20
    """One object, decompressed; 140,544 tensors take 11.5 MB."""
    max_safetensors_header_bytes: int = 100_000_000
    """Header of one safetensors file: the limit of the format's own library."""
    max_tensors: int = MAX_TENSORS
    max_shards: int = MAX_SHARDS
    max_segments: int = MAX_SEGMENTS
    max_parameters: int = MAX_PARAMETERS
    max_copies: int = MAX_COPIES
    max_fills: int = MAX_FILLS
    max_transforms: int = MAX_TRANSFORMS
    max_overlap_steps_per_shard: int = 16
    """Work that the search for overlapping boxes may take, beside a constant million steps: a grid
    that is cut along n dimensions takes about n * (n + 1) / 2 steps per shard."""


DEFAULT_LIMITS = Limits()

"""What a `torch` engine is started with. Does no I/O."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from weightbus.schemas.base import Seconds

__all__ = ("TorchEngineSpec",)


class TorchEngineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: its model, and over how many ranks it is cut."""

    architecture: str
    """`decoder` or `minilm`."""
    config: dict[str, Any] = {}
    """Fields of the architecture's configuration; empty: its default."""
    tp: Annotated[int, Meta(ge=1, le=64)] = 1
    """Ranks, each a process."""
    weights: str = ""
    """A safetensors file to serve from the start; empty: nothing before the first resume."""
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Threads of torch in each rank."""
    max_waiting: Annotated[int, Meta(ge=1)] = 1024
    """Requests that may wait at once."""
    start_timeout_s: Seconds = 120.0
    """From the start of the ranks until all of them answer."""
    step_timeout_s: Seconds = 60.0
    """How long the ranks may take for one request before they count as stuck."""

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(text: str) -> TorchEngineSpec:
        """
        Raises:
            msgspec.ValidationError: it is not a specification.
        """
        return msgspec.json.decode(text, type=TorchEngineSpec)

"""What a `torch` engine is started with. Does no I/O."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from weightbus.schemas.base import Seconds

__all__ = ("DEVICE_PATTERN", "Device", "TorchEngineSpec")

DEVICE_PATTERN: Final = r"\A(cpu|cuda(:\d{1,3})?)\Z"

Device = Annotated[str, Meta(pattern=DEVICE_PATTERN)]
"""Where an engine's parameters are; the rank's number is added to a GPU's."""


class TorchEngineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: its model, and over how many ranks it is cut."""

    architecture: str
    """`decoder`, `minilm` or `shapes`."""
    config: dict[str, Any] = {}
    """Fields of the architecture's configuration; empty: its default."""
    tp: Annotated[int, Meta(ge=1, le=64)] = 1
    """Ranks, each a process."""
    device: Device = "cpu"
    """Where the parameters are. `cuda`: rank r has GPU r; `cuda:4`: rank r has GPU 4 + r."""
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

    def device_of(self, rank: int) -> str:
        """The device of one rank: `cpu`, or a GPU with its number."""
        kind, _, first = self.device.partition(":")
        return kind if kind == "cpu" else f"{kind}:{int(first or 0) + rank}"

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(text: str) -> TorchEngineSpec:
        """
        Raises:
            msgspec.ValidationError: it is not a specification.
        """
        return msgspec.json.decode(text, type=TorchEngineSpec)

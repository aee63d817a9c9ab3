"""What a publisher counts and measures, for OpenTelemetry.

Owns the four instruments of one rank's publisher. Does no I/O: the meter's provider collects and
sends. Without one nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from opentelemetry.metrics import Meter

from weightbus.tracing import attributes as names
from weightbus.tracing.attributes import AttributeValue

if TYPE_CHECKING:
    from weightbus.schemas.checkpoint import SkipCause

__all__ = ("METER", "PublisherMetrics")

METER: Final = "weightbus.producer"

BLOCKED_BUCKETS_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""From a copy within a GPU to two full waits for readers."""


class PublisherMetrics:
    """Of one rank's publisher; `model`, `producer` and `rank` are attributes of all it says."""

    def __init__(self, meter: Meter, *, model: str, producer: str, rank: int) -> None:
        self._of: Mapping[str, AttributeValue] = {
            names.MODEL: model,
            names.PRODUCER: producer,
            names.RANK: rank,
        }
        self._blocked = meter.create_histogram(
            "weightbus.publish.blocked",
            unit="s",
            description="How long the trainer could not go on, for each version.",
            explicit_bucket_boundaries_advisory=BLOCKED_BUCKETS_S,
        )
        self._published = meter.create_counter(
            "weightbus.versions.published",
            unit="{version}",
            description="Versions that were announced.",
        )
        self._skipped = meter.create_counter(
            "weightbus.versions.skipped",
            unit="{version}",
            description="Versions that were to be published and were not, by cause.",
        )
        self._slots = meter.create_gauge(
            "weightbus.slot.size",
            unit="By",
            description="Memory that the slots of this rank take, by kind of memory.",
        )

    def blocked(self, seconds: float) -> None:
        """The trainer could not go on for so long, whatever came of the version."""
        self._blocked.record(seconds, self._of)

    def published(self) -> None:
        """A version was announced."""
        self._published.add(1, self._of)

    def skipped(self, cause: SkipCause) -> None:
        """A version was not."""
        self._skipped.add(1, {**self._of, names.CAUSE: cause})

    def slots(self, size_bytes: Mapping[str, int]) -> None:
        """The slots are as large as this now; kind of memory -> bytes."""
        for memory, each_bytes in size_bytes.items():
            self._slots.set(each_bytes, {**self._of, names.MEMORY: memory})

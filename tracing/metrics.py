"""What publishers, consumers and the bus count and measure, for OpenTelemetry.

Owns the instruments of one publisher rank, one consumer, or one connection; `metric_names` says
what each of them is. Does no I/O: the meter's provider collects and sends. Without one nothing is
kept. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from opentelemetry.metrics import Counter, Histogram, Meter, UpDownCounter

from weightbus.tracing import attributes as names
from weightbus.tracing import metric_names as metrics
from weightbus.tracing.attributes import AttributeValue
from weightbus.tracing.metric_names import MetricSpec

if TYPE_CHECKING:
    from opentelemetry.metrics import _Gauge as Gauge

    from weightbus.schemas.base import RouteName, Stage
    from weightbus.schemas.checkpoint import SkipCause
    from weightbus.schemas.progress import DeadLetter
    from weightbus.tracing.waterfall import LinkName

__all__ = ("BusMetrics", "ConsumerMetrics", "PublisherMetrics")

Attributes = dict[str, AttributeValue]
Point = tuple[str, frozenset[tuple[str, AttributeValue]]]
"""Name of the metric, attributes."""

OTHER_MODEL: Final = "_"


class PublisherMetrics:
    """Of one rank's publisher; `model`, `producer` and `rank` are attributes of all it says."""

    def __init__(self, meter: Meter, *, model: str, producer: str, rank: int) -> None:
        self._of: Attributes = {
            names.MODEL: model,
            names.PRODUCER: producer,
            names.RANK: rank,
        }
        self._blocked = _histogram(meter, metrics.PUBLISH_BLOCKED)
        self._waited = _histogram(meter, metrics.PUBLISH_WAITED)
        self._waiting = _updown(meter, metrics.SLOTS_WAITING)
        self._published = _counter(meter, metrics.VERSIONS_PUBLISHED)
        self._skipped = _counter(meter, metrics.VERSIONS_SKIPPED)
        self._slots = _gauge(meter, metrics.SLOT_SIZE)
        self._waiting.add(0, self._of)

    def blocked(self, seconds: float, waited_s: float) -> None:
        """The trainer could not go on for so long, whatever came of the version; `waited_s` of it
        because of readers."""
        self._blocked.record(seconds, self._of)
        self._waited.record(waited_s, self._of)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A slot is waited for, while this context is open."""
        self._waiting.add(1, self._of)
        try:
            yield
        finally:
            self._waiting.add(-1, self._of)

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


class ConsumerMetrics:
    """Of one engine's consumer; `model` and `engine` are attributes of all it says."""

    def __init__(self, meter: Meter, *, model: str, engine: str) -> None:
        self._of: Attributes = {names.MODEL: model, names.ENGINE: engine}
        self._update_s = _histogram(meter, metrics.UPDATE_DURATION)
        self._update_bytes = _histogram(meter, metrics.UPDATE_SIZE)
        self._failures = _counter(meter, metrics.UPDATE_FAILURES)
        self._stage_s = _histogram(meter, metrics.STAGE_DURATION)
        self._stage_bytes = _counter(meter, metrics.STAGE_IO)
        self._throughput = _gauge(meter, metrics.STAGE_THROUGHPUT)
        self._utilization = _gauge(meter, metrics.LINK_UTILIZATION)
        self._rates: dict[Point, Gauge] = {}
        """What says so of the last update; in `_stale` of those before, and not of it so far."""
        self._stale: dict[Point, Gauge] = {}
        self._version = _gauge(meter, metrics.ENGINE_VERSION)
        self._lag = _gauge(meter, metrics.ENGINE_LAG)
        self._pause_s = _histogram(meter, metrics.ENGINE_PAUSE)
        self._first_token_s = _histogram(meter, metrics.FIRST_TOKEN)
        self._rounds = _updown(meter, metrics.ROUNDS_ACTIVE)
        self._rounds.add(0, self._of)

    def stage(
        self,
        stage: Stage,
        route: RouteName | None,
        seconds: float,
        size_bytes: int,
        *,
        ok: bool,
    ) -> None:
        """A stage of one rank, or of the engine, has ended; `size_bytes` of a failed one is 0."""
        taken = self._with(stage=stage, route=route)
        self._stage_s.record(seconds, {**taken, metrics.OUTCOME: _outcome(ok)})
        if size_bytes:
            self._stage_bytes.add(size_bytes, taken)

    def rate(
        self,
        stage: Stage,
        route: RouteName | None,
        link: LinkName,
        bytes_per_s: float,
        share: float | None,
    ) -> None:
        """What a stage of an update reached, and as a share of its link's rate; between
        `begin_rates` and `end_rates`."""
        taken = self._with(stage=stage, route=route)
        if link:
            taken[metrics.LINK] = link
        self._set_rate(metrics.STAGE_THROUGHPUT, self._throughput, bytes_per_s, taken)
        if share is not None:
            self._set_rate(metrics.LINK_UTILIZATION, self._utilization, share, taken)

    def begin_rates(self) -> None:
        """Those of another update come now."""
        self._stale |= self._rates
        self._rates = {}

    def end_rates(self) -> None:
        """That was all: what the update did not do has no rate. A point of a gauge cannot be taken
        back, so it is 0."""
        stale, self._stale = self._stale, {}
        for (_, taken), gauge in stale.items():
            gauge.set(0, dict(taken))

    def completed(
        self, route: RouteName | None, seconds: float, size_bytes: int, paused_s: float
    ) -> None:
        """An update has ended well."""
        taken = self._with(route=route)
        self._update_s.record(seconds, {**taken, metrics.OUTCOME: _outcome(True)})
        self._update_bytes.record(size_bytes, taken)
        self._pause_s.record(paused_s, taken)

    def failed(
        self, cause: str, stage: Stage | None, route: RouteName | None, seconds: float | None
    ) -> None:
        """An update has failed; `cause` is the name of the error class, `seconds` None if it was
        never begun."""
        self._failures.add(1, {**self._with(stage=stage), names.ERROR_TYPE: cause})
        if seconds is not None:
            taken = self._with(route=route)
            self._update_s.record(seconds, {**taken, metrics.OUTCOME: _outcome(False)})

    def first_token(self, seconds: float) -> None:
        """The first token of a version was there so long after it was served."""
        self._first_token_s.record(seconds, self._of)

    def serves(self, version: int, newest: int) -> None:
        """What the engine serves (-1: nothing), and what was announced last (-1: nothing)."""
        self._version.set(version, self._of)
        self._lag.set(max(0, newest - version), self._of)

    def rounds(self, more: int) -> None:
        """So many more rounds are under way; negative: fewer."""
        if more:
            self._rounds.add(more, self._of)

    def _set_rate(self, spec: MetricSpec, gauge: Gauge, rate: float, taken: Attributes) -> None:
        point = spec.name, frozenset(taken.items())
        self._rates[point] = gauge
        self._stale.pop(point, None)
        gauge.set(rate, taken)

    def _with(self, *, stage: Stage | None = None, route: RouteName | None = None) -> Attributes:
        taken = dict(self._of)
        if stage is not None:
            taken[names.STAGE] = stage
        if route is not None:
            taken[names.ROUTE] = route
        return taken


class BusMetrics:
    """Of one connection to the bus, whose name is `reporter`, on behalf of one model."""

    def __init__(self, meter: Meter, *, model: str, reporter: str) -> None:
        self._model, self._reporter = model, reporter
        self._dead = _counter(meter, metrics.DEAD_LETTERS)
        self._add(model, 0)

    def dead_letter(self, letter: DeadLetter) -> None:
        """A message could not be read; that of another model counts as of `OTHER_MODEL`, so that
        nobody makes up new points."""
        self._add(letter.model if letter.model == self._model else OTHER_MODEL, 1)

    def _add(self, model: str, count: int) -> None:
        self._dead.add(count, {names.MODEL: model, metrics.REPORTER: self._reporter})


def _outcome(ok: bool) -> str:
    return "complete" if ok else "failed"


def _histogram(meter: Meter, spec: MetricSpec) -> Histogram:
    return meter.create_histogram(
        spec.name,
        unit=spec.unit,
        description=spec.told,
        explicit_bucket_boundaries_advisory=spec.buckets,
    )


def _counter(meter: Meter, spec: MetricSpec) -> Counter:
    return meter.create_counter(spec.name, unit=spec.unit, description=spec.told)


def _updown(meter: Meter, spec: MetricSpec) -> UpDownCounter:
    return meter.create_up_down_counter(spec.name, unit=spec.unit, description=spec.told)


def _gauge(meter: Meter, spec: MetricSpec) -> Gauge:
    return meter.create_gauge(spec.name, unit=spec.unit, description=spec.told)

"""What is measured: every metric, with its unit and its attributes. Does no I/O.

Names and units follow OpenTelemetry's conventions. Invariants: an attribute has few values (engines
and ranks are many at most; a round or a version is never an attribute), and a version is a value.
The table of `docs/telemetry.md` is made of `METRICS`, and tests hold what is exported, and the
dashboard in `docs/grafana`, to it.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from weightbus.tracing import attributes as names

__all__ = (
    "BUS_METER",
    "CONSUMER_METER",
    "DEAD_LETTERS",
    "ENGINE_LAG",
    "ENGINE_PAUSE",
    "ENGINE_VERSION",
    "FIRST_TOKEN",
    "LINK",
    "LINK_UTILIZATION",
    "METRICS",
    "OUTCOME",
    "PRODUCER_METER",
    "PUBLISH_BLOCKED",
    "PUBLISH_WAITED",
    "REPORTER",
    "ROUNDS_ACTIVE",
    "SIGNAL",
    "SLOTS_WAITING",
    "SLOT_SIZE",
    "STAGE_DURATION",
    "STAGE_IO",
    "STAGE_THROUGHPUT",
    "TELEMETRY_LOST",
    "TELEMETRY_METER",
    "UPDATE_DURATION",
    "UPDATE_FAILURES",
    "UPDATE_SIZE",
    "VERSIONS_PUBLISHED",
    "VERSIONS_SKIPPED",
    "MetricSpec",
    "prometheus_name",
)

BUS_METER: Final = "weightbus.bus"
CONSUMER_METER: Final = "weightbus.consumer"
PRODUCER_METER: Final = "weightbus.producer"
TELEMETRY_METER: Final = "weightbus.telemetry"

OUTCOME: Final = "weightbus.outcome"
"""`complete` or `failed`."""
LINK: Final = "weightbus.link"
"""A rate of `Links`, as `weightbus doctor` measures it."""
REPORTER: Final = "weightbus.reporter"
"""Who could not read a message: the name of its connection to the bus."""
SIGNAL: Final = "weightbus.signal"
"""`spans` or `metrics`."""

Kind = Literal["histogram", "counter", "updown", "gauge"]
"""`updown`: a count of what is the case now. Counters of what is lost are observed: they are there,
at 0, before anything is."""

DURATION_BUCKETS_S: Final = (
    0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 300.0,
)  # fmt: skip
"""From a stage within a GPU to the longest budget of a round; closest where most updates end."""

BLOCKED_BUCKETS_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""From a copy within a GPU to two full waits for readers."""

SIZE_BUCKETS_BYTES: Final = (1e6, 1e7, 1e8, 3e8, 1e9, 3e9, 1e10, 3e10, 1e11, 3e11, 1e12, 3e12)
"""From an adapter to a model of a trillion parameters."""


class MetricSpec(Struct, frozen=True, kw_only=True):
    """One metric."""

    name: str
    meter: str
    kind: Kind
    unit: str
    """By UCUM; what is in braces is only a word."""
    attributes: tuple[str, ...]
    """All that a point of it may have; one that is not known is left out."""
    told: str
    """What it is, in one sentence."""
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


ENGINE: Final = (names.MODEL, names.ENGINE)
RANK: Final = (names.MODEL, names.PRODUCER, names.RANK)

UPDATE_DURATION: Final = MetricSpec(
    name="weightbus.update.duration",
    meter=CONSUMER_METER,
    kind="histogram",
    unit="s",
    attributes=(*ENGINE, OUTCOME, names.ROUTE),
    told="From hearing of a version to serving it, or to giving it up.",
    buckets=DURATION_BUCKETS_S,
)
UPDATE_SIZE: Final = MetricSpec(
    name="weightbus.update.size",
    meter=CONSUMER_METER,
    kind="histogram",
    unit="By",
    attributes=(*ENGINE, names.ROUTE),
    told="Bytes that an update moved into parameters, over all ranks.",
    buckets=SIZE_BUCKETS_BYTES,
)
UPDATE_FAILURES: Final = MetricSpec(
    name="weightbus.update.failures",
    meter=CONSUMER_METER,
    kind="counter",
    unit="{update}",
    attributes=(*ENGINE, names.ERROR_TYPE, names.STAGE),
    told="Updates that failed, by the class of their error and the stage that failed.",
)
STAGE_DURATION: Final = MetricSpec(
    name="weightbus.stage.duration",
    meter=CONSUMER_METER,
    kind="histogram",
    unit="s",
    attributes=(*ENGINE, OUTCOME, names.ROUTE, names.STAGE),
    told="How long a stage took, of each rank.",
    buckets=DURATION_BUCKETS_S,
)
STAGE_IO: Final = MetricSpec(
    name="weightbus.stage.io",
    meter=CONSUMER_METER,
    kind="counter",
    unit="By",
    attributes=(*ENGINE, names.ROUTE, names.STAGE),
    told="Bytes that a stage moved, over all ranks.",
)
STAGE_THROUGHPUT: Final = MetricSpec(
    name="weightbus.stage.throughput",
    meter=CONSUMER_METER,
    kind="gauge",
    unit="By/s",
    attributes=(*ENGINE, LINK, names.ROUTE, names.STAGE),
    told="Rate of a stage of the last update, all ranks together; 0: it had no such stage.",
)
LINK_UTILIZATION: Final = MetricSpec(
    name="weightbus.link.utilization",
    meter=CONSUMER_METER,
    kind="gauge",
    unit="1",
    attributes=(*ENGINE, LINK, names.ROUTE, names.STAGE),
    told="The same as a share of the rate that was measured for the link; absent if none was.",
)
ENGINE_VERSION: Final = MetricSpec(
    name="weightbus.engine.version",
    meter=CONSUMER_METER,
    kind="gauge",
    unit="{version}",
    attributes=ENGINE,
    told="The version that the engine serves; -1: none.",
)
ENGINE_LAG: Final = MetricSpec(
    name="weightbus.engine.lag",
    meter=CONSUMER_METER,
    kind="gauge",
    unit="{version}",
    attributes=ENGINE,
    told="The newest version announced minus the one served; of an engine that serves none, "
    "the newest version plus one.",
)
ENGINE_PAUSE: Final = MetricSpec(
    name="weightbus.engine.pause.duration",
    meter=CONSUMER_METER,
    kind="histogram",
    unit="s",
    attributes=(*ENGINE, names.ROUTE),
    told="How long requests waited because of an update that ended well.",
    buckets=DURATION_BUCKETS_S,
)
FIRST_TOKEN: Final = MetricSpec(
    name="weightbus.engine.first_token.duration",
    meter=CONSUMER_METER,
    kind="histogram",
    unit="s",
    attributes=ENGINE,
    told="From serving again to the first token of the new version.",
    buckets=DURATION_BUCKETS_S,
)
ROUNDS_ACTIVE: Final = MetricSpec(
    name="weightbus.rounds.active",
    meter=CONSUMER_METER,
    kind="updown",
    unit="{round}",
    attributes=ENGINE,
    told="Rounds of the model that this engine's consumer knows to be under way.",
)
DEAD_LETTERS: Final = MetricSpec(
    name="weightbus.dead_letters",
    meter=BUS_METER,
    kind="counter",
    unit="{message}",
    attributes=(names.MODEL, REPORTER),
    told="Messages that this process could not read.",
)
TELEMETRY_LOST: Final = MetricSpec(
    name="weightbus.telemetry.lost",
    meter=TELEMETRY_METER,
    kind="counter",
    unit="{item}",
    attributes=(names.CAUSE, SIGNAL),
    told="Spans, and exports of metrics, that did not arrive at the collector, by cause.",
)
PUBLISH_BLOCKED: Final = MetricSpec(
    name="weightbus.publish.blocked",
    meter=PRODUCER_METER,
    kind="histogram",
    unit="s",
    attributes=RANK,
    told="How long the trainer could not go on, for each version.",
    buckets=BLOCKED_BUCKETS_S,
)
PUBLISH_WAITED: Final = MetricSpec(
    name="weightbus.publish.waited",
    meter=PRODUCER_METER,
    kind="histogram",
    unit="s",
    attributes=RANK,
    told="How long of that it waited for readers of older versions.",
    buckets=BLOCKED_BUCKETS_S,
)
SLOTS_WAITING: Final = MetricSpec(
    name="weightbus.slots.waiting",
    meter=PRODUCER_METER,
    kind="updown",
    unit="{slot}",
    attributes=RANK,
    told="Slots that a version is to be written to and that engines still read.",
)
SLOT_SIZE: Final = MetricSpec(
    name="weightbus.slot.size",
    meter=PRODUCER_METER,
    kind="gauge",
    unit="By",
    attributes=(*RANK, names.MEMORY),
    told="Memory that the slots of this rank take, by kind of memory.",
)
VERSIONS_PUBLISHED: Final = MetricSpec(
    name="weightbus.versions.published",
    meter=PRODUCER_METER,
    kind="counter",
    unit="{version}",
    attributes=RANK,
    told="Versions that were announced.",
)
VERSIONS_SKIPPED: Final = MetricSpec(
    name="weightbus.versions.skipped",
    meter=PRODUCER_METER,
    kind="counter",
    unit="{version}",
    attributes=(*RANK, names.CAUSE),
    told="Versions that were to be published and were not, by cause.",
)

METRICS: Final = (
    UPDATE_DURATION,
    UPDATE_SIZE,
    UPDATE_FAILURES,
    STAGE_DURATION,
    STAGE_IO,
    STAGE_THROUGHPUT,
    LINK_UTILIZATION,
    ENGINE_VERSION,
    ENGINE_LAG,
    ENGINE_PAUSE,
    FIRST_TOKEN,
    ROUNDS_ACTIVE,
    VERSIONS_PUBLISHED,
    VERSIONS_SKIPPED,
    PUBLISH_BLOCKED,
    PUBLISH_WAITED,
    SLOTS_WAITING,
    SLOT_SIZE,
    DEAD_LETTERS,
    TELEMETRY_LOST,
)
"""All of them, in the order of the documentation."""

PROMETHEUS_UNITS: Final = {"s": "seconds", "By": "bytes", "By/s": "bytes_per_second"}


def prometheus_name(spec: MetricSpec) -> str:
    """How Prometheus calls it, by OpenTelemetry's rules for that: of a histogram without the
    `_bucket`, `_sum` or `_count` that its series end in."""
    parts = [spec.name.replace(".", "_")]
    if spec.unit in PROMETHEUS_UNITS:
        parts.append(PROMETHEUS_UNITS[spec.unit])
    if spec.kind == "counter":
        parts.append("total")
    return "_".join(parts)

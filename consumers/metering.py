"""What a consumer says and hears, as figures. Does no I/O and knows no clock.

Owns what must be remembered of messages to tell figures from them: versions that were announced,
joins and plans of this engine, rounds that are under way. A function of the messages alone, taken
one at a time. Invariants: nothing here waits or raises, whatever keeps the figures does; what is
said of stages while an engine is paused costs it nothing but being remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

from weightbus.schemas.base import Message, RouteName, Stage
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import (
    DeadLetter,
    EngineState,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan
from weightbus.tracing.links import limiting_link, link_of, link_rate, source_of
from weightbus.tracing.metric_names import BUS_METER, CONSUMER_METER
from weightbus.tracing.metrics import BusMetrics, ConsumerMetrics
from weightbus.tracing.telemetry import Telemetry
from weightbus.tracing.waterfall import LinkName

__all__ = ("Metering",)

_logger = logging.getLogger(__name__)

REMEMBERED: Final = 16
"""Versions and rounds; a publisher has two versions alive at most."""

STAGES_WAITING: Final = 10_000
"""Stages that wait for the end of their update; more are counted at once."""

NS_PER_S: Final = 10**9

K = TypeVar("K")
V = TypeVar("V")


class _Flow:
    """What the ranks of an engine moved in one stage of one version, side by side."""

    def __init__(self) -> None:
        self.bytes = self.start_ns = self.end_ns = 0
        self.ranks: set[int | None] = set()

    def add(self, stage: StageComplete) -> None:
        self.start_ns = min(self.start_ns or stage.start_ns, stage.start_ns)
        self.end_ns = max(self.end_ns, stage.end_ns)
        self.bytes += stage.bytes
        self.ranks.add(stage.rank)

    @property
    def bytes_per_s(self) -> float | None:
        """None: no time has passed."""
        took_ns = self.end_ns - self.start_ns
        return self.bytes * NS_PER_S / took_ns if took_ns > 0 else None


class Metering:
    """Of one consumer."""

    def __init__(self, telemetry: Telemetry, model: str, engine: str, reporter: str) -> None:
        """`reporter`: what the connection to the bus is called."""
        self._engine = engine
        self._bus = BusMetrics(telemetry.meter(BUS_METER), model=model, reporter=reporter)
        self._metrics = ConsumerMetrics(telemetry.meter(CONSUMER_METER), model=model, engine=engine)
        self._ready: dict[int, CheckpointReady] = {}
        self._joins: dict[int, Join] = {}
        self._plans: dict[int, RoundPlan] = {}
        self._flows: dict[tuple[Stage, RouteName | None], _Flow] = {}
        self._flowing = ("", -1)
        """Round and version of `_flows`."""
        self._stages: list[StageComplete] = []
        """Said, and not yet counted: that is done once the engine serves again, or has failed."""
        self._newest = self._served = -1
        self._knows_state = False
        self._rounds: dict[str, int] = {}
        """Under way -> version."""
        self._closed: dict[str, int] = {}
        """Over -> epoch of its last plan."""
        self._rounds_told = 0
        self._has_failed = False

    def say(self, message: Message) -> None:
        """This consumer says something, of its own engine."""
        self._note(self._take_said, message)

    def hear(self, message: Message) -> None:
        """It hears something; what it says itself comes back, and counts once."""
        self._note(self._take_heard, message)

    def count_dead_letter(self, letter: DeadLetter) -> None:
        """The connection could not read something."""
        self._note(self._bus.dead_letter, letter)

    def leave(self) -> None:
        """The consumer ends: what waits for the end of its update counts, and it knows of no round
        any more."""
        self._note(self._take_stages)
        self._note(self._keep_rounds, lambda _name, _version: False)

    def _note(self, take: Callable[..., None], *arguments: object) -> None:
        try:
            take(*arguments)
        except Exception as error:  # noqa: BLE001 - no update fails for want of a figure
            if not self._has_failed:
                self._has_failed = True
                _logger.warning("figures are missing: %s: %s", type(error).__name__, error)

    def _take_said(self, message: Message) -> None:
        match message:
            case StageComplete() as stage:
                self._stages.append(stage)
                if len(self._stages) >= STAGES_WAITING:
                    self._take_stages()
            case FirstToken() as token:
                self._metrics.first_token(_seconds(token.start_ns, token.end_ns))
            case UpdateComplete() as done:
                self._take_stages()
                route = done.routes[-1] if done.routes else self._route(done.version)
                took_s = _seconds(done.start_ns, done.end_ns)
                self._metrics.completed(route, took_s, done.bytes, done.paused_s)
            case UpdateFailed() as failed:
                self._take_stages()
                self._take_failure(failed)
            case EngineState() as state:
                self._served, self._knows_state = state.version, True
                self._tell_versions()
            case Join() | RoundPlan():
                self._take_heard(message)
            case _:
                """Nothing that is measured."""

    def _take_heard(self, message: Message) -> None:
        match message:
            case CheckpointReady() as ready:
                _remember(self._ready, ready.version, ready)
                self._newest = max(self._newest, ready.version)
                self._tell_versions()
            case Join() as join:
                self._begin_round(join.round, join.version)
                if join.engine == self._engine:
                    _remember(self._joins, join.version, join)
            case RoundPlan() as plan:
                if plan.epoch > self._closed.get(plan.round, -1):  # else it was looked up again
                    self._begin_round(plan.round, plan.version)
                if any(route.engine == self._engine for route in plan.engines):
                    _remember(self._plans, plan.version, plan)
            case RoundComplete() as complete:
                _remember(self._closed, complete.round, complete.epoch)
                self._keep_rounds(
                    lambda name, version: name != complete.round and version >= complete.version
                )
            case _:
                """Nothing that is measured."""

    def _take_stages(self) -> None:
        stages, self._stages = self._stages, []
        for stage in stages:
            self._take_stage(stage)
        self._metrics.end_rates()

    def _take_stage(self, stage: StageComplete) -> None:
        took_s, moved_bytes = _seconds(stage.start_ns, stage.end_ns), stage.bytes if stage.ok else 0
        self._metrics.stage(stage.stage, stage.route, took_s, moved_bytes, ok=stage.ok)
        if not moved_bytes:
            return
        if self._flowing != (stage.round, stage.version):
            self._flows, self._flowing = {}, (stage.round, stage.version)
            self._metrics.begin_rates()
        flow = self._flows.setdefault((stage.stage, stage.route), _Flow())
        flow.add(stage)
        if (rate := flow.bytes_per_s) is not None:
            link, limit = self._link(stage, len(flow.ranks))
            share = rate / limit if limit else None
            self._metrics.rate(stage.stage, stage.route, link, rate, share)

    def _take_failure(self, failed: UpdateFailed) -> None:
        begun = 0 < failed.start_ns <= failed.end_ns
        took_s = _seconds(failed.start_ns, failed.end_ns) if begun else None
        route = self._route(failed.version)
        self._metrics.failed(failed.cause, failed.stage, route, took_s)
        if failed.version not in self._plans:  # nobody leads what did not come to a plan
            self._keep_rounds(lambda name, _: name != failed.round)

    def _tell_versions(self) -> None:
        if self._knows_state:
            self._metrics.serves(self._served, self._newest)

    def _route(self, version: int) -> RouteName | None:
        """As planned; all ranks of an engine take one."""
        routes = self._plans[version].engines if version in self._plans else ()
        return next((each.ranks[0].route for each in routes if each.engine == self._engine), None)

    def _link(self, stage: StageComplete, ranks: int) -> tuple[LinkName, int | None]:
        """Which link a stage took, and what so many ranks reach over it; None: not known."""
        ready, join = self._ready.get(stage.version), self._joins.get(stage.version)
        plan = self._plans.get(stage.version)
        if ready is None or join is None:
            return "", None
        gpu = any(offer.device.startswith("cuda") for offer in join.ranks)
        source = source_of(ready, join.host_id, gpu=gpu)
        lanes = plan is not None and plan.device
        link = link_of(stage.stage, stage.route, source, gpu=gpu, device_lanes=lanes)
        link = limiting_link(link, source, join.links)
        return link, link_rate(join.links, link, ranks)

    def _begin_round(self, name: str, version: int) -> None:
        _remember(self._rounds, name, version)
        self._tell_rounds()

    def _keep_rounds(self, goes_on: Callable[[str, int], bool]) -> None:
        self._rounds = {
            name: version for name, version in self._rounds.items() if goes_on(name, version)
        }
        self._tell_rounds()

    def _tell_rounds(self) -> None:
        more = len(self._rounds) - self._rounds_told
        self._rounds_told = len(self._rounds)
        self._metrics.rounds(more)


def _remember(kept: dict[K, V], key: K, value: V) -> None:
    """As the last of a bounded number."""
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > REMEMBERED:
        del kept[next(iter(kept))]


def _seconds(start_ns: int, end_ns: int) -> float:
    return max(0, end_ns - start_ns) / NS_PER_S

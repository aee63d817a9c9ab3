"""One of everything that is measured: for tests of what others read of it."""

from __future__ import annotations

from typing import Any

from weightbus.consumers.metering import Metering
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.progress import (
    DeadLetter,
    EngineState,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import (
    EngineRoute,
    Join,
    Links,
    RankOffer,
    RankRoute,
    RoundPlan,
)
from weightbus.tracing.metric_names import PRODUCER_METER
from weightbus.tracing.metrics import PublisherMetrics
from weightbus.tracing.telemetry import Telemetry

__all__ = ("measure_everything",)

S = 10**9


def measure_everything(telemetry: Telemetry, *, model: str = "m", engine: str = "a") -> None:
    """An update that ends well, one that fails, a version that is published and one that is not,
    and a message that cannot be read."""
    of: dict[str, Any] = {"model": model, "version": 7, "round": "v7", "engine": engine}
    metering = Metering(telemetry, model, engine, f"consumer-{engine}")
    segment = SharedMemorySegment(name="weightbus-x", host_id="h", generation=2)
    metering.hear(CheckpointReady(model=model, version=7, producer="t", placement=((segment,),)))
    offer = RankOffer(rank=0, needs_digest="0" * 64, need_bytes=100, routes=("local",))
    metering.say(Join(**of, consumer="c", host_id="h", ranks=(offer,), links=Links(memory=200)))
    route = EngineRoute(engine=engine, ranks=(RankRoute(rank=0, route="local"),))
    metering.hear(
        RoundPlan(model=model, version=7, round="v7", epoch=1, leader=engine, engines=(route,))
    )
    metering.say(
        StageComplete(
            **of, stage="reload", rank=0, route="local", bytes=100, start_ns=S, end_ns=2 * S
        )
    )
    metering.say(
        UpdateComplete(
            **of, verified="verified", routes=("local",), bytes=100, paused_s=0.5,
            start_ns=S, end_ns=3 * S,
        )
    )  # fmt: skip
    metering.say(FirstToken(**of, start_ns=3 * S, end_ns=4 * S))
    metering.say(
        UpdateFailed(**of, cause="TornRead", reason="torn", stage="reload", start_ns=S, end_ns=S)
    )
    metering.say(
        EngineState(
            model=model, engine=engine, consumer="c", host_id="h", status="serving", version=7
        )
    )
    metering.count_dead_letter(DeadLetter(model=model, subject="s", reason="no version"))
    publisher = PublisherMetrics(telemetry.meter(PRODUCER_METER), model=model, producer="t", rank=0)
    publisher.published()
    publisher.skipped("busy")
    publisher.blocked(1.0, 0.5)
    publisher.slots({"host": 100})

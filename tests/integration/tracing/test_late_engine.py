"""An engine that comes when a round is over and is refused, by what real consumers say of it."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.processes import trainer_process
from weightbus.cli.ui.rounds import RoundLog
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.rounds import RoundComplete
from weightbus.tracing.history import HISTORY_MESSAGES, build_waterfall
from weightbus.tracing.watcher import Fleet as FleetState

pytestmark = pytest.mark.anyio


async def test_good_round_stays_good_when_the_version_is_retired_before_a_late_engine_has_it(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a:
        version = fleet.next_version()
        async with trainer_process(fleet) as trainer:
            await trainer.tell(str(version))
            await fleet.log.wait(CheckpointReady, version=version)
            await a.completes(version)
            closed = await fleet.log.wait(RoundComplete, version=version)
            await trainer.kill()
        good = [each async for each in fleet.bus.replay(*HISTORY_MESSAGES, model=fleet.model)]
        async with fleet.follow("b", hold="before_describe") as b:
            await b.held.reached.wait()
            async with fleet.publisher():  # retires what the killed one has left
                failed = await b.fails(version, "VersionRetired")
                b.held.release()
    assert failed.start_ns > closed.ended_ns
    told = [each async for each in fleet.bus.replay(*HISTORY_MESSAGES, model=fleet.model)]
    waterfall = build_waterfall(fleet.model, closed.round, told)
    assert waterfall is not None
    (late,) = waterfall.late
    assert (late.engine, late.cause) == ("b", "VersionRetired")
    assert [row.ok for row in late.stages] == [False], "its negotiation"
    assert structs.replace(waterfall, late=()) == build_waterfall(fleet.model, closed.round, good)
    assert [engine.outcome for engine in waterfall.engines] == ["complete"]

    log, state = RoundLog(), FleetState()
    for each in told:
        log.feed(each.message, each.received_ns, each.headers, is_heard=False)
        state.feed(each.message, each.received_ns)
    (row,) = [row for row in log.rows([]) if row.round == closed.round]
    assert (row.state, row.engines, row.late) == ("complete", 1, ("b",))
    failures = state.view(fleet.bus.clock.now_ns()).failures
    assert [(each.engine, each.late) for each in failures] == [("b", True)]

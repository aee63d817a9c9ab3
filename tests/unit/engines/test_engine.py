"""What an engine tells of an update that did not end, with a front and ranks only pretended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest

from weightbus.consumers.engines.channel import WorkerChannel
from weightbus.consumers.engines.errors import RequestFailed
from weightbus.consumers.engines.torch.client import TorchEngineClient
from weightbus.consumers.engines.torch.engine import TorchEngine
from weightbus.consumers.errors import ConsumerError, DeadlineExceeded, EngineUnavailable
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import InPlace, WorkerMessage

pytestmark = pytest.mark.anyio


class StuckRanks:
    """No rank answers in time."""

    ranks = 2

    async def request_each(
        self, requests: Mapping[int, WorkerMessage], deadline_s: float, *, adopt: bool
    ) -> dict[int, WorkerMessage | WeightBusError]:
        return {rank: DeadlineExceeded("reload", deadline_s) for rank in requests}


class FailingFront:
    """Its restart fails."""

    def __init__(self, error: ConsumerError) -> None:
        self.error = error
        self.reasons: list[str] = []

    async def restart(self, reason: str, deadline_s: float) -> None:
        self.reasons.append(reason)
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RequestFailed("DeadlineExceeded", "restart"),
        EngineUnavailable("decoder", "it is gone"),
        DeadlineExceeded("restart", 5.0),
    ],
)
async def test_apply_tells_its_own_failure_touched_when_the_restart_after_it_fails(
    error: ConsumerError,
) -> None:
    front = FailingFront(error)
    engine = TorchEngine(
        cast(TorchEngineClient, front), cast(WorkerChannel, StuckRanks()), "decoder", (), "host"
    )
    with pytest.raises(DeadlineExceeded, match="reload") as caught:
        await engine.apply(1, "0" * 64, dict.fromkeys((0, 1), InPlace(sources=())), 7.0)
    assert caught.value.touched
    assert "still applying" in front.reasons[0]

"""What is said in order and again, and what is counted as lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import anyio
import pytest

from tests.unit.consumers.fakes import FakeBus
from weightbus.bus.errors import BusTimeout, BusUnavailable, RequestRefused
from weightbus.consumers.outbox import PROGRESS_KEPT, Outbox
from weightbus.schemas.base import Message
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.progress import StageComplete
from weightbus.schemas.rounds import Commit

pytestmark = pytest.mark.anyio

LONG_S = 60.0
SHORT_S = 0.05
REFUSALS = (BusTimeout("publish", 5.0), RequestRefused("publish", 10047, "no room"))


def commit(version: int) -> Commit:
    return Commit(model="m", version=version, round=f"v{version}", epoch=1)


def stage(version: int) -> StageComplete:
    return StageComplete(
        model="m",
        version=version,
        round=f"v{version}",
        engine="a",
        stage="commit",
        start_ns=1,
        end_ns=2,
    )


async def drained(outbox: Outbox) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox.run)
        assert await outbox.drain(LONG_S)
        tasks.cancel_scope.cancel()


async def test_control_messages_leave_in_order_and_again_until_the_bus_has_them() -> None:
    bus = FakeBus()
    outbox = Outbox(bus.as_bus())
    for version in (1, 2, 3):
        outbox.say_nowait(commit(version), {"traceparent": str(version)})
    bus.refusals = list(REFUSALS)
    await drained(outbox)
    assert [message.version for message in bus.said(Commit)] == [1, 2, 3]
    assert [headers["traceparent"] for headers in bus.headers] == ["1", "2", "3"]


@pytest.mark.parametrize("say", [Outbox.say_nowait, Outbox.report_nowait])
async def test_message_is_on_its_way_before_it_is_told(
    say: Callable[[Outbox, Message, Mapping[str, str]], None],
) -> None:
    bus = FakeBus()

    def tell(message: Message) -> None:
        raise RuntimeError("it was told")

    outbox = Outbox(bus.as_bus(), tell)
    with pytest.raises(RuntimeError, match="it was told"):
        say(outbox, commit(1), {})
    await drained(outbox)
    assert bus.published == [commit(1)]


async def test_progress_that_is_refused_is_counted_and_not_said_again() -> None:
    bus = FakeBus()
    outbox = Outbox(bus.as_bus())
    for version in (1, 2, 3, 4):
        outbox.report_nowait(stage(version), {})
    bus.refusals = [*REFUSALS, MessageInvalid("StageComplete", "error", "long", "shorter")]
    await drained(outbox)
    assert [message.version for message in bus.said(StageComplete)] == [4]
    assert outbox.progress_lost == 3


async def test_progress_that_does_not_fit_is_counted_and_control_is_not_held_up() -> None:
    bus = FakeBus()
    outbox = Outbox(bus.as_bus())
    for version in range(PROGRESS_KEPT + 2):
        outbox.report_nowait(stage(version), {})
    outbox.say_nowait(commit(1), {})
    assert outbox.progress_lost == 2
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox.run)
        while not bus.said(Commit):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert len(bus.said(StageComplete)) < 10, "control does not wait behind progress"


async def test_drain_gives_up_at_its_deadline_when_the_bus_does_not_take_anything() -> None:
    outbox = Outbox(FakeBus().as_bus())
    assert await outbox.drain(SHORT_S)
    outbox.say_nowait(commit(1), {})
    assert not await outbox.drain(SHORT_S)


@pytest.mark.parametrize("message", [commit(1), stage(1)])
async def test_outbox_ends_when_the_bus_is_gone(message: Message) -> None:
    bus = FakeBus()
    outbox = Outbox(bus.as_bus())
    bus.refusals = [BusUnavailable("nats://h", "lost")]
    if isinstance(message, Commit):
        outbox.say_nowait(message, {})
    else:
        outbox.report_nowait(message, {})
    with pytest.RaisesGroup(BusUnavailable):
        await outbox.run()

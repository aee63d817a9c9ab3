"""What tests of the staged routes have in common: engines elsewhere, brought to a first version."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from tests.integration.fleet.elsewhere import BUDGETS, elsewhere, filler, routes_of
from tests.integration.fleet.fleet import Fleet, Follower, Trainer
from tests.integration.fleet.processes import Child, consumer_process
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client
from weightbus.consumers.errors import ConsumerError
from weightbus.schemas.base import Message
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import RoundComplete, RoundPlan

__all__ = (
    "BROADCAST",
    "P2P",
    "assert_in_time",
    "bring_to_first_version",
    "broadcast_begins",
    "client_of",
    "comes_to",
    "following",
    "held_member",
    "is_named",
    "publish",
)

BROADCAST = ("broadcast",)
P2P = ("p2p",)
NS_PER_S = 1e9
ANSWER_S = 10.0


async def publish(trainer: Trainer) -> int:
    """The next version, large enough to have a middle."""
    return (await trainer.publish(filler=filler())).version


@asynccontextmanager
async def client_of(fleet: Fleet, name: str) -> AsyncIterator[TorchEngineClient]:
    """The users of an engine, who see no mix, whatever becomes of its consumer."""
    engine = await fleet.engine(name)
    async with open_torch_client(engine.directory) as client, fleet.watched(client):
        yield client


@asynccontextmanager
async def following(
    fleet: Fleet, *names: str, ranks: int = 1, **changes: Any
) -> AsyncIterator[tuple[Follower, ...]]:
    """Consumers in this process, each on a host of its own."""
    async with AsyncExitStack() as stack:
        followers = []
        for name in names:
            following = fleet.follow(name, ranks=ranks, **elsewhere(name, **changes))
            followers.append(await stack.enter_async_context(following))
        yield tuple(followers)


@asynccontextmanager
async def held_member(fleet: Fleet, name: str, **changes: Any) -> AsyncIterator[Child]:
    """A consumer in a process of its own, held when its first buckets are filled: its worker has
    read none of them, and nobody who shares them can go on for long."""
    settings = elsewhere(name, **changes)
    async with consumer_process(fleet, name, hold="before_apply", **settings) as child:
        yield child


async def bring_to_first_version(fleet: Fleet, trainer: Trainer, *names: str) -> int:
    """Their plans are proven then, so that the next version can be streamed. Engines outlive tests:
    one that has served another model of this layout knows it already."""
    async with following(fleet, *names) as followers:
        first = await publish(trainer)
        for follower in followers:
            await follower.completes(first)
    return first


async def broadcast_begins(fleet: Fleet, version: int, *names: str) -> None:
    """Wait for the plan of a version, which broadcasts to these engines."""
    plan = await fleet.log.wait(RoundPlan, version=version)
    assert routes_of(plan) == dict.fromkeys(names, "broadcast"), plan


async def is_named(fleet: Fleet, version: int, name: str) -> None:
    """Wait until somebody says that an engine has not reached a version."""

    def find() -> Message | None:
        failed = fleet.log.said(UpdateFailed, version=version, engine=name)
        closed = fleet.log.said(RoundComplete, version=version, failed=lambda whom: name in whom)
        return next(iter([*failed, *closed]), None)

    await fleet.log.wait_until(f"word that {name} is lost", find)


async def comes_to(fleet: Fleet, client: TorchEngineClient, version: int) -> None:
    """Wait until an engine serves a version, and see that it holds it."""

    async def is_there() -> bool:
        try:
            return (await client.fingerprint(ANSWER_S)).version == version
        except ConsumerError:  # it is paused, or stands still
            return False

    await fleet.eventually(f"version {version} is served", is_there)
    await fleet.serves(client, version)


def assert_in_time(fleet: Fleet, done: UpdateComplete) -> None:
    """Within the deadline of the version's first plan for it, and without a failure: whoever else
    failed, it is no failure of this engine."""
    failed = fleet.log.said(UpdateFailed, version=done.version, engine=done.engine)
    assert not failed, [failure.reason for failure in failed]
    plans = [
        plan
        for plan in fleet.log.said(RoundPlan, version=done.version)
        if done.engine in {part.engine for part in plan.engines}
    ]
    took_s = (done.end_ns - min(plan.created_ns for plan in plans)) / NS_PER_S
    assert took_s < BUDGETS.transfer_s, f"{done.engine} took {took_s:.1f} s, by {len(plans)} plans"

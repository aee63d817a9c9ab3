"""Bytes that are not what was published: not served, the tensors named; the next version heals."""

from __future__ import annotations

import pytest
from msgspec import structs
from safetensors.torch import save_file

from tests.integration.fleet.fleet import Fleet, Follower, Trainer
from tests.integration.fleet.slots import flip_bit
from tests.integration.fleet.weights import weights_of
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import UpdateComplete, UpdateFailed

pytestmark = pytest.mark.anyio

DAMAGED = "lm_head.weight"


async def test_damaged_version_is_not_served_and_its_tensor_is_named(fleet: Fleet) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(first)
        damaged = await publish_damaged(fleet, trainer, a, b)
        failed = await a.fails(damaged.version, "DigestMismatch")
        assert f"tensors at fault: {DAMAGED}" in failed.reason
        assert (failed.served_version, failed.quarantined) == (-1, True)
        state = await a.state()
        assert (state.paused, state.touched) == (True, True)
        third = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(third)
    assert fleet.log.said(UpdateComplete, engine="a", version=damaged.version) == []


async def test_engine_goes_back_to_the_version_before_when_the_newest_stays_damaged(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(first)
        damaged = await publish_damaged(fleet, trainer, a, b)
        await fleet.log.wait_until(
            "second UpdateComplete of the first version",
            lambda: next(iter(fleet.log.said(UpdateComplete, engine="a", version=first)[1:]), None),
        )
        await a.serves(first)
        failures = fleet.log.said(UpdateFailed, engine="a", version=damaged.version)
        assert [failed.cause for failed in failures] == ["DigestMismatch"] * 2
        third = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(third)


async def publish_damaged(
    fleet: Fleet, trainer: Trainer, a: Follower, b: Follower
) -> CheckpointReady:
    """A version that is damaged after `b` has read it and before `a` does."""
    hold = a.engine.hold("before_apply")
    ready = await trainer.publish()
    await hold.reached.wait()
    await b.completes(ready.version)
    assert ready.layout_digest is not None
    layout, _ = await fleet.bus.layouts.get(ready.layout_digest)
    number = [tensor.name for tensor in layout.tensors].index(DAMAGED)
    (shard,) = (shard for shard in layout.shards if shard.tensor == number)
    flip_bit(ready, shard.offset_bytes)
    hold.release()
    return ready


@pytest.mark.parametrize("offered", [True, False])
async def test_version_is_not_served_when_its_digest_is_of_other_weights(
    fleet: Fleet, offered: bool
) -> None:
    """Whether digests of tensors can be had or not, the mismatch is the cause that is named."""
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        first = await trainer.publish()
        await a.completes(first.version)
        version = fleet.next_version()
        liar = structs.replace(
            first,
            version=version,
            producer="liar",
            weights_digest="0" * 16,
            tensor_digests=first.tensor_digests if offered else "0" * 64,
            created_ns=first.created_ns + 1,
        )
        await fleet.say(liar)
        failed = await a.fails(version, "DigestMismatch")
        assert f"weights digest is {first.weights_digest}" in failed.reason
        assert "the publisher's is 0000000000000000" in failed.reason
        assert failed.quarantined
        await a.completes((await trainer.publish()).version)
    assert fleet.log.said(UpdateComplete, version=version) == []


async def test_version_is_taken_but_not_called_verified_when_no_digest_is_offered(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        version = fleet.next_version()
        path = fleet.directory / "weights.safetensors"
        save_file(weights_of(fleet.model, version), path)
        await trainer.publisher.publish_files(path, version, digest=False)
        done = await fleet.log.wait(UpdateComplete, version=version)
        assert (done.verified, done.weights_digest) == ("not_offered", None)
        await a.serves(version)
        await a.completes((await trainer.publish()).version)

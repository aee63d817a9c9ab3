"""Slots that are written again while an engine reads them: noticed, and never served."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import anyio.to_thread
import pytest
import torch

from tests.integration.fleet.fleet import Fleet, Follower, Trainer
from tests.integration.fleet.processes import consumer_process
from tests.integration.fleet.signals import stopped
from tests.integration.fleet.slots import block_of, overwrite
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.progress import UpdateComplete

pytestmark = pytest.mark.anyio

STATE_S = 60.0

FILLER_BYTES = 16 * 2**20
"""A tensor that no engine needs, but that is read for the digest's sake: it takes its time."""

STEP_S = 0.0005
ATTEMPTS = 10


async def test_engine_goes_on_serving_when_a_slot_was_overwritten_before_it_read(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(first)
        hold = a.engine.hold("before_apply")
        second = await trainer.publish()
        await b.completes(second.version)
        await hold.reached.wait()
        overwrite(second)
        hold.release()
        failed = await a.fails(second.version, "TornRead")
        assert (failed.served_version, failed.quarantined) == (first, False)
        assert block_of(second).name in failed.reason
        await a.serves(first)
        third = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(third)
    assert fleet.log.said(UpdateComplete, engine="a", version=second.version) == []


async def test_engine_serves_nothing_when_a_slot_is_overwritten_while_it_reads(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b:
        torn = None
        for _ in range(ATTEMPTS):  # a rank may be through before it is caught
            async with fleet.publisher() as trainer:
                torn = await publish_torn(a, b, trainer)
                if torn is None:
                    continue
                failed = await a.fails(torn.version, "TornRead")
                assert (failed.served_version, failed.quarantined) == (-1, True)
                state = await a.state()
                assert (state.paused, state.touched) == (True, True)
                version = (await trainer.publish()).version
                for follower in (a, b):
                    await follower.completes(version)
                break
        assert torn is not None, f"the rank was never caught reading, in {ATTEMPTS} versions"
    assert fleet.log.said(UpdateComplete, engine="a", version=torn.version) == []


async def publish_torn(a: Follower, b: Follower, trainer: Trainer) -> CheckpointReady | None:
    """A version whose slot is overwritten while `a` reads it; None: `a` was too fast."""
    hold = a.engine.hold("before_apply")
    ready = await trainer.publish(filler=torch.zeros(FILLER_BYTES, dtype=torch.uint8))
    await hold.reached.wait()
    await b.completes(ready.version)
    pid, block = (await a.state()).pids[0], block_of(ready)
    with stopped(pid):
        prepared_bytes = touched_bytes(pid, block)
        hold.release()
        await anyio.to_thread.run_sync(step_until_read, pid, block, prepared_bytes)
        if not (await a.state()).touched:
            return None
        overwrite(ready)
    return ready


def step_until_read(pid: int, block: Path, prepared_bytes: int) -> None:
    """Let a stopped process go on in small steps, until it has read more of a block than when that
    was prepared."""
    while touched_bytes(pid, block) <= prepared_bytes:
        os.kill(pid, signal.SIGCONT)
        time.sleep(STEP_S)
        os.kill(pid, signal.SIGSTOP)


def touched_bytes(pid: int, block: Path) -> int:
    """Of a block, by a process that maps it."""
    touched, is_block = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *words = line.split()
        if "-" in name:  # addresses: the next mapping begins
            is_block = line.endswith(str(block))
        elif is_block and name == "Rss:":
            touched += int(words[0]) * 1024
    return touched


async def test_engine_catches_up_when_its_consumer_slept_until_its_slot_was_written_again(
    fleet: Fleet,
) -> None:
    """By the trainer itself, who does not wait for a reader whose lease has run out."""
    engine = await fleet.engine("a")
    async with (
        fleet.publisher() as trainer,
        open_torch_client(engine.directory) as client,
        fleet.watched(client),
    ):
        async with fleet.follow("a") as a:
            await a.completes((await trainer.publish()).version)
        async with consumer_process(fleet, "a", hold="before_apply", reader_ttl_s=1) as sleeper:
            second = (await trainer.publish()).version
            await sleeper.hears("before_apply")
            with stopped(sleeper.pid):
                await trainer.publish()
                fourth = (await trainer.publish()).version
                await fleet.log.wait(CheckpointRetired, version=second)
            sleeper.go_on()
            await fleet.fails("a", second, "TornRead")
            await fleet.completes("a", client, fourth)
            await fleet.completes("a", client, (await trainer.publish()).version)
            assert await sleeper.stop() == 0
    assert fleet.log.said(UpdateComplete, engine="a", version=second) == []

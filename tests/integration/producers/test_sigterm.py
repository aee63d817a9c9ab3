"""SIGTERM, as launchers send it when a rank has died: the version that does not come is named."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.integration.producers.reader import next_message
from tests.integration.producers.test_transformers_ranks import running_ranks, said_by
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.bus.sweep import sweep_blocks
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

RANKS = 3
DEADLINE_S = 90.0
EXIT_CODE = 128 + signal.SIGTERM

Ranks = list[subprocess.Popen[str]]


@contextmanager
def loops(url: str, model: str) -> Iterator[Ranks]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    module = "tests.integration.producers.step_trainer"
    with ExitStack() as stack:
        ranks = []
        for rank in range(RANKS):
            process = subprocess.Popen(
                [sys.executable, "-m", module, url, model, str(rank), str(RANKS), str(port)],
                cwd=Path(__file__).parents[3],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield ranks


async def end(bus: Bus, model: str, ranks: Ranks, step: int) -> list[CheckpointSkipped]:
    """Once all have published `step`: the last is killed, and the others get SIGTERM."""
    async with bus.subscribe(CheckpointReady, model=model) as messages:
        for process in ranks:
            assert await said_by(process) == {"step": step}
        assert (await next_message(messages)).message.version == step
    ranks[-1].kill()
    for process in ranks[:-1]:
        process.send_signal(signal.SIGTERM)
    for process in ranks[:-1]:
        assert await anyio.to_thread.run_sync(process.wait, DEADLINE_S) == EXIT_CODE
    sweep_blocks(model)
    return [each.message async for each in bus.replay(CheckpointSkipped, model=model)]


async def test_rank_that_was_killed_is_named_when_others_of_a_loop_get_sigterm_in_a_collective(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    with loops(nats_server.url, model) as ranks, anyio.fail_after(DEADLINE_S):
        (skipped,) = await end(bus, model, ranks, 5)
    assert (skipped.version, skipped.cause, skipped.ranks) == (10, "ranks", (2,))
    assert "SIGTERM" in skipped.reason


async def test_rank_that_was_killed_is_named_when_others_of_a_trainer_of_transformers_get_sigterm(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    with running_ranks(nats_server.url, model, tmp_path) as ranks, anyio.fail_after(DEADLINE_S):
        (skipped,) = await end(bus, model, ranks, 1)
    assert (skipped.version, skipped.cause, skipped.ranks) == (2, "ranks", (1,))

"""`examples/fsdp_trainer.py` under torchrun: alone with its engines, and with a rank that dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.bus.guard import guarded_command
from weightbus.bus.sweep import sweep_blocks
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "fsdp_trainer.py"
RUN_S = 240.0
MANY = 100_000
"""Versions, of which few will come."""
END_S = 60.0
"""From a rank's death to the end of all others; torchrun sends SIGKILL after 30 s."""

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]


@contextmanager
def trainer(
    ranks: int, versions: int, model: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The example under torchrun; what it prints goes to its `stdout`."""
    inherited = {name: os.environ[name] for name in os.environ if "WEIGHTBUS" not in name}
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    with subprocess.Popen(
        guarded_command([sys.executable, "-m", *torchrun, str(EXAMPLE), str(versions), model]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()  # the guard ends it, if it runs


async def read(process: subprocess.Popen[str], within_s: float, until: str | None = None) -> str:
    """What it prints, up to the first line that holds `until`; None: to its end."""
    printed: list[str] = []

    def read_lines() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if until is not None and until in line:
                return
        assert until is None, f"{until!r} was never printed: {printed}"

    with anyio.move_on_after(within_s):
        await anyio.to_thread.run_sync(read_lines, abandon_on_cancel=True)
        return "".join(printed)
    raise AssertionError(f"no {until or 'end'} within {within_s:g} s: {printed}")


async def test_every_version_is_proven_in_both_engines_when_the_example_runs_by_itself() -> None:
    model = f"m{uuid.uuid4().hex[:12]}"
    with trainer(2, 2, model) as process:
        output = await read(process, RUN_S)
        assert process.wait(END_S) == 0, output
    proven = re.findall(r"(\w) serves version (\d) after .* verified", output)
    assert sorted(proven) == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")], output
    assert [name for name in os.listdir("/dev/shm") if model in name] == []


async def kill(process: subprocess.Popen[str], rank: int) -> str:
    """Kill a rank while it trains for version 3; what is printed from then on."""
    printed = await read(process, RUN_S, until="version 2: loss")
    (number,) = re.findall(rf"rank {rank} of \d is process (\d+)", printed)
    os.kill(int(number), signal.SIGKILL)
    output = await read(process, END_S)
    assert process.wait(END_S) == 1, output
    return output


@pytest.mark.faults
@pytest.mark.parametrize("dies", [0, 2])
async def test_version_fails_with_the_name_of_the_rank_when_a_rank_is_killed(
    nats_server: NatsServer, bus: Bus, dies: int
) -> None:
    model = f"m{uuid.uuid4().hex[:12]}"
    with trainer(3, MANY, model, WEIGHTBUS_NATS_URL=nats_server.url) as process:
        try:
            output = await kill(process, dies)
        finally:
            sweep_blocks(model)
    skipped = [each.message async for each in bus.replay(CheckpointSkipped, model=model)]
    ready = [each.message async for each in bus.replay(CheckpointReady, model=model)]
    assert [(each.cause, each.ranks) for each in skipped] == [("ranks", (dies,))], output
    assert skipped[0].version == ready[-1].version + 1


@pytest.mark.faults
async def test_killed_rank_is_named_and_nothing_is_left_when_the_example_runs_by_itself() -> None:
    model = f"m{uuid.uuid4().hex[:12]}"
    with trainer(3, MANY, model) as process:
        output = await kill(process, 1)
    assert re.search(r"version \d+ is skipped by trainer \(ranks; not heard of: rank 1\)", output)
    assert [name for name in os.listdir("/dev/shm") if model in name] == []

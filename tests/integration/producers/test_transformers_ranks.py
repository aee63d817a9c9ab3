"""Ranks of a real `Trainer` over DDP, processes of their own: one checkpoint, each tensor once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.producers.reader import next_message, read_checkpoint
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.schemas.checkpoint import CheckpointReady

RANKS = 2
DEADLINE_S = 90.0


@contextmanager
def running_ranks(url: str, model: str, directory: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    module = "tests.integration.producers.transformers_trainer"
    command = [sys.executable, "-m", module, url, model]
    with ExitStack() as stack:
        ranks = []
        for rank in range(RANKS):
            process = subprocess.Popen(
                [*command, str(rank), str(RANKS), str(port), str(directory / f"rank-{rank}")],
                cwd=Path(__file__).parents[3],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield ranks


async def said_by(process: subprocess.Popen[str]) -> Any:
    """The next JSON line: `Trainer` prints others, too."""

    def read() -> Any:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"'):
                return json.loads(line)
        return f"it ended with {process.wait()}"

    return await anyio.to_thread.run_sync(read, abandon_on_cancel=True)


@pytest.mark.anyio
async def test_ranks_of_ddp_publish_every_step_as_one_checkpoint_and_each_tensor_once(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    with running_ranks(nats_server.url, model, tmp_path) as ranks, anyio.fail_after(DEADLINE_S):
        async with bus.subscribe(CheckpointReady, model=model) as messages:
            for step in (1, 2):
                for process in ranks:
                    assert await said_by(process) == {"step": step}
                ready = (await next_message(messages)).message
                assert ready.version == step
                found = await read_checkpoint(bus, ready)
                expected = load_file(tmp_path / "rank-0" / f"step-{step}" / "model.safetensors")
                assert set(found) == set(expected)
                for name, tensor in expected.items():
                    assert torch.equal(found[name], tensor), name
                layout, _ = await bus.layouts.get(ready.layout_digest or "")
                assert len(layout.segments) == RANKS
                assert len(layout.shards) == len(layout.tensors)
                sizes = [segment.size_bytes for segment in layout.segments]
                assert max(sizes) < 0.6 * sum(sizes)
                for process in ranks:
                    assert process.stdin is not None
                    process.stdin.write("\n")
                    process.stdin.flush()
        for process in ranks:
            assert await said_by(process) == {"published": 2}
            assert await anyio.to_thread.run_sync(process.wait, DEADLINE_S) == 0

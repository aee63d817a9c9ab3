"""A real FSDP2 trainer: its sharded state dict becomes one checkpoint, and nothing is gathered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.producers.reader import digest_of_model, read_checkpoint
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.schemas.checkpoint import CheckpointReady

RANKS = 3


@contextmanager
def running_ranks(url: str, model: str, rendezvous: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """A trainer whose every rank has published version 1 and waits for the end of its stdin."""
    module = "tests.integration.producers.fsdp_trainer"
    command = [sys.executable, "-m", module, url, model]
    with ExitStack() as stack:
        ranks = []
        for rank in range(RANKS):
            process = subprocess.Popen(
                [*command, str(rank), str(RANKS), str(rendezvous)],
                cwd=Path(__file__).parents[3],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield ranks


@pytest.mark.anyio
async def test_state_dict_of_fsdp_is_published_whole_when_every_rank_gives_its_own(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    rendezvous = tmp_path / "rendezvous"
    with running_ranks(nats_server.url, model, rendezvous) as ranks:
        last = await bus.last(CheckpointReady, model=model)
        assert last is not None
        found = await read_checkpoint(bus, last.message)
        for process in ranks:
            assert process.stdin is not None
            process.stdin.close()
        assert [process.wait(60) for process in ranks] == [0] * RANKS
    expected = load_file(rendezvous.with_suffix(".safetensors"))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert last.message.weights_digest == digest_of_model(expected[name] for name in found)

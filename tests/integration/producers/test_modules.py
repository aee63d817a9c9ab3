"""Real ranks that hold one network in every way there is: each version is whole, cast and exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.producers.module_trainer import STEPS, WAYS
from tests.integration.producers.reader import blocks_of, digest_of_model, read_checkpoint
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.schemas.checkpoint import CheckpointReady

RANKS = 4

LORA_LAYERS = 2


@contextmanager
def running_ranks(url: str, model: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "tests.integration.producers.module_trainer", url, model]
    with ExitStack() as stack:
        ranks = []
        for rank in range(RANKS):
            process = subprocess.Popen(
                [*command, str(rank), str(RANKS), str(folder)],
                cwd=Path(__file__).parents[3],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield ranks


def publish(ranks: list[subprocess.Popen[str]], way: str, step: int) -> list[dict[str, Any]]:
    """One version of all ranks; returns what each says."""
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write(f"{way} {step}\n")
        process.stdin.flush()
    said = []
    for rank, process in enumerate(ranks):
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"rank {rank} ended in {way}, step {step}"
        said.append(json.loads(line))
    return said


@pytest.mark.anyio
async def test_checkpoints_are_whole_and_exact_when_ranks_hold_a_module_in_any_way(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    with running_ranks(nats_server.url, model, tmp_path) as ranks:
        for way in WAYS:
            for step in range(STEPS):
                said = publish(ranks, way, step)
                last = await bus.last(CheckpointReady, model=model)
                assert last is not None
                ready = last.message
                assert {each["version"] for each in said} == {ready.version}
                found = await read_checkpoint(bus, ready)
                expected = load_file(tmp_path / f"{way}-{step}.safetensors")
                assert_same(found, expected, way, exact="lora" not in way)
                assert ready.weights_digest == digest_of_model(found.values())
                assert_nothing_gathered(said, way)
                copied = sum(each["size_bytes"] for each in said)
                once = sum(tensor.nbytes for tensor in found.values())
                # its mesh of two dimensions is two of one to what is not tensor parallel
                assert copied == once if way != "fsdp_over_tp" else once < copied < 2 * once, way
                held = sum(len(block.data) for block in blocks_of(ready))
                assert held <= copied + 256 * (len(found) + 1) * RANKS
        for process in ranks:
            assert process.stdin is not None
            process.stdin.close()
        assert [process.wait(60) for process in ranks] == [0] * RANKS


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], way: str, *, exact: bool
) -> None:
    assert set(found) == set(expected), way
    for name, tensor in expected.items():
        cast = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert found[name].dtype == cast.dtype, (way, name)
        if exact:
            assert torch.equal(found[name], cast), (way, name)
        else:  # a product of some rows may differ from those rows of the whole one in the last bit
            torch.testing.assert_close(found[name], cast, rtol=2**-7, atol=1e-6)


def assert_nothing_gathered(said: list[dict[str, Any]], way: str) -> None:
    """But for the factor A of each LoRA layer, where it is cut."""
    assert {each["planning"] for each in said} == {0}, way
    gathers = LORA_LAYERS if way in ("lora_fsdp", "lora_hsdp") else 0
    assert {each["publishing"] for each in said} == {gathers}, way

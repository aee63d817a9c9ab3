"""A dense model behind vLLM's HTTP server, with one worker: every update is right, what is refused
changes nothing, and requests live through it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.vllm.checkpoints import tensors_of
from tests.vllm.consumers import consume_command, follow
from tests.vllm.engines import OverHttp, check_versions, is_fresh_at, is_unchanged
from tests.vllm.oracle import Oracle
from tests.vllm.server import BACKEND, Server, running_server
from tests.vllm.trainer import ENGINE, World
from weightbus.schemas.progress import FirstToken

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]

LONG_PROMPT = (11, 12, 13, 14, 15)
LONG = 200
STEP_S = "0.03"
"""How long a token takes at least: an update comes while a request generates, on any machine."""
FIRST_TOKENS = 20
BROKEN = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def server(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    with running_server(oracle.folder("qwen3", 0), log, *BACKEND) as server:
        yield server


async def test_ten_versions_are_as_in_fresh_engines_when_the_command_follows(
    server: Server, world: World, oracle: Oracle, short_path: Path
) -> None:
    async with consume_command(world, server, short_path / "engine"):
        engine = OverHttp(server)
        await check_versions(engine, world, oracle, "qwen3", 1, range(1, 11), from_files=(4,))
        assert await server.version() == "10"


async def test_request_goes_on_when_an_update_comes_while_it_generates(
    server: Server, world: World, oracle: Oracle, short_path: Path
) -> None:
    async with follow(world, server, short_path / "engine") as engine:
        await world.publish(tensors_of("qwen3", 21), 21)
        await world.completes(21)
        old = await server.complete(LONG_PROMPT, LONG)
        await server.call("probe_slow_down", STEP_S)
        pause = engine.hold("before_pause")
        await world.publish(tensors_of("qwen3", 22), 22)
        await pause.reached.wait()
        tokens: list[int] = []
        async with server.stream(LONG_PROMPT, LONG) as pieces:
            async for piece in pieces:
                before = len(tokens) < FIRST_TOKENS
                tokens += piece
                if before and len(tokens) >= FIRST_TOKENS:
                    pause.release()
                    await world.completes(22)
        assert len(tokens) == LONG, "it must end, and not before its time"
        assert tokens[:FIRST_TOKENS] == old[:FIRST_TOKENS], "it began with the old weights"
        assert tokens != old, "it ended before the update came"
        assert tokens != await server.complete(LONG_PROMPT, LONG)
        await is_fresh_at(OverHttp(server), oracle, "qwen3", 22, 1)


async def test_first_token_is_said_when_a_request_comes_after_the_update(
    server: Server, world: World, short_path: Path
) -> None:
    async with follow(world, server, short_path / "engine"):
        await world.publish(tensors_of("qwen3", 25), 25)
        done = await world.completes(25)
        asked_ns = world.bus.clock.now_ns()
        assert len(await server.complete(LONG_PROMPT, FIRST_TOKENS)) == FIRST_TOKENS
        answered_ns = world.bus.clock.now_ns()
        said = await world.log.wait(FirstToken, version=25)
        assert (said.engine, said.round, said.trace_id) == (ENGINE, done.round, done.trace_id)
        assert done.start_ns < said.start_ns < said.end_ns
        seen = f"asked {asked_ns}, answered {answered_ns}: {said}"
        assert asked_ns < said.end_ns, seen
        assert said.end_ns - said.resolution_ns < answered_ns, seen
        assert said.resolution_ns <= said.end_ns - said.start_ns + 10**6, seen


async def test_checkpoint_is_refused_before_anything_is_written_when_it_is_not_the_models(
    server: Server, world: World, oracle: Oracle, short_path: Path
) -> None:
    engine = OverHttp(server)
    async with follow(world, server, short_path / "engine"):
        await world.publish(tensors_of("qwen3", 31), 31)
        await world.completes(31)
        held = await is_fresh_at(engine, oracle, "qwen3", 31, 1)
        for version, (fault, tensors) in enumerate(_broken().items(), start=32):
            await world.publish(tensors, version)
            failed = await world.fails(version)
            told = f"{fault}: {failed}"
            assert (failed.served_version, failed.quarantined) == (31, False), told
            assert "model.layers.1.self_attn" in failed.reason, told
            await is_unchanged(engine, held)
        await world.publish(tensors_of("qwen3", 39), 39)
        await world.completes(39)
        await is_fresh_at(engine, oracle, "qwen3", 39, 1)


def _broken() -> dict[str, dict[str, torch.Tensor]]:
    """Fault -> a checkpoint that has it."""
    whole = tensors_of("qwen3", 32)
    right = whole[BROKEN]
    lacking = dict(whole)
    del lacking[BROKEN]
    return {
        "lacks a tensor": lacking,
        "has an extra one": whole | {BROKEN.replace("o_proj", "x_proj"): right},
        "wrong shape": whole | {BROKEN: right[:, 1:].contiguous()},
        "wrong dtype": whole | {BROKEN: right.to(torch.int32)},
    }

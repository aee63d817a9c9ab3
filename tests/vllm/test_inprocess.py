"""vLLM within a program of its user's, and Weight bus beside it in the same process: every update
is right, also where vLLM's own way to reload is not."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
import pytest

from tests.vllm.engines import check_versions, differing, running_inside
from tests.vllm.inprocess import Question
from tests.vllm.oracle import MAX_TOKENS, PROMPTS, Oracle
from tests.vllm.probe_extension import PROBE_EXTENSION
from tests.vllm.trainer import World

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]


async def test_ten_versions_of_experts_are_right_where_vllms_own_reload_is_wrong(
    world: World, oracle: Oracle, short_path: Path
) -> None:
    """Offline, one worker, by the extension."""
    folder = oracle.folder("qwen3_moe", 0)
    async with running_inside(
        world, folder, short_path / "engine", extension=PROBE_EXTENSION
    ) as engine:
        await check_versions(engine, world, oracle, "qwen3_moe", 1, range(1, 11), from_files=(2, 7))
        # It says that all is well, and serves something that is neither the old nor the new.
        reloaded = await engine.ask(
            Question(
                prompts=[*map(list, PROMPTS)],
                max_tokens=MAX_TOKENS,
                reload=str(oracle.folder("qwen3_moe", 11)),
            )
        )
        fresh = await anyio.to_thread.run_sync(oracle.generates, "qwen3_moe", 11, 1)
        assert any("experts" in name for name in differing(reloaded, fresh))
        assert reloaded.outputs != fresh.outputs


async def test_ten_versions_of_a_dense_model_are_as_in_fresh_engines(
    world: World, oracle: Oracle, short_path: Path
) -> None:
    """Asynchronous, two workers, as vLLM's backend."""
    folder = oracle.folder("qwen3", 0)
    async with running_inside(
        world, folder, short_path / "engine", ranks=2, kind="AsyncLLM"
    ) as engine:
        await check_versions(engine, world, oracle, "qwen3", 2, range(1, 11))

"""MiniLM, a real model, served by vLLM's pooling runner with weights from the bus."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio.to_thread
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.engines import differing, running_inside
from tests.vllm.inprocess import Question
from tests.vllm.oracle import Oracle
from tests.vllm.trainer import World
from weightbus.consumers.engines.torch.minilm import minilm_folder

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]

PROMPTS = ([101, 7592, 2088, 102], [101, 1037, 3899, 7719, 2058, 1996, 4231, 13241, 102])
"""`hello world` and `a dog jumps over the lazy fox`, as its tokenizer has them."""
CHECKPOINT = "model.safetensors"


async def test_embeddings_are_those_of_an_engine_that_loaded_the_same_from_disk(
    world: World, oracle: Oracle, short_path: Path, tmp_path: Path
) -> None:
    real = minilm_folder()
    other = tmp_path / "other"
    shutil.copytree(real, other)
    weights = load_file(real / CHECKPOINT)
    save_file(_changed(weights), other / CHECKPOINT, {"format": "pt"})
    question = Question(prompts=[*map(list, PROMPTS)])
    async with running_inside(world, other, short_path / "engine", runner="pooling") as engine:
        before = await engine.ask(question)
        for version, (folder, tensors) in enumerate(
            [(real, weights), (other, _changed(weights)), (real, weights)]
        ):
            if version == 2:
                (world.directory / CHECKPOINT).write_bytes((real / CHECKPOINT).read_bytes())
                await world.publisher.publish_files(world.directory / CHECKPOINT, version)
            else:
                await world.publish(tensors, version)
            await world.completes(version)
            fresh = await anyio.to_thread.run_sync(oracle.answers, folder, 1, PROMPTS, 0)
            found = await engine.ask(question)
            assert differing(found, fresh) == [], f"at version {version}"
            assert found.embeddings == fresh.embeddings, f"at version {version}"
            assert (found == before) == (folder == other)


def _changed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other weights of the same sizes: what is there is turned around."""
    return {
        name: tensor.flip(0).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }

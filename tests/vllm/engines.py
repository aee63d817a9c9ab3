"""Engines under test behind one face, and the one check that all of them have to pass.

Owns the processes of `running_inside` while it is open.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio.to_thread
import msgspec

from tests.vllm.checkpoints import FILE, Architecture, tensors_of
from tests.vllm.fresh import Answer
from tests.vllm.inprocess import Arguments, Question
from tests.vllm.oracle import MAX_TOKENS, PROMPTS, Oracle
from tests.vllm.probe import PROBE
from tests.vllm.processes import START_S, LineProcess, environment, running_group
from tests.vllm.server import Server
from tests.vllm.trainer import World

__all__ = (
    "InProcess",
    "OverHttp",
    "UnderTest",
    "check_versions",
    "differing",
    "is_fresh_at",
    "is_unchanged",
    "running_inside",
)

ANSWER_S = 150.0


class UnderTest(ABC):
    """An engine that follows a model."""

    @abstractmethod
    async def answer(self) -> Answer:
        """What it generates for `PROMPTS`, and what its ranks hold."""


class OverHttp(UnderTest):
    def __init__(self, server: Server) -> None:
        self.server = server

    async def answer(self) -> Answer:
        outputs = await self.server.generate()
        return Answer(outputs=outputs, embeddings=[], sums=await self.server.sums())


class InProcess(UnderTest):
    """In a process of the test's own: `inprocess.py`."""

    def __init__(self, process: LineProcess) -> None:
        self._process = process

    async def answer(self) -> Answer:
        prompts = [*map(list, PROMPTS)]
        return await self.ask(Question(prompts=prompts, max_tokens=MAX_TOKENS))

    async def ask(self, question: Question) -> Answer:
        plain = msgspec.to_builtins(question)
        found = await anyio.to_thread.run_sync(self._process.ask, plain, ANSWER_S)
        return msgspec.convert(found, Answer)


@asynccontextmanager
async def running_inside(
    world: World,
    folder: Path,
    directory: Path,
    *,
    ranks: int = 1,
    kind: Literal["LLM", "AsyncLLM"] = "LLM",
    runner: Literal["generate", "pooling"] = "generate",
    extension: str = "",
) -> AsyncIterator[InProcess]:
    """An engine of a checkpoint in a process of its own, with its consumer; entered once it
    follows. Weight bus reaches its workers by `extension`, or else as vLLM's backend."""
    arguments = Arguments(
        url=world.server.url,
        config=world.config,
        directory=str(directory),
        folder=str(folder),
        ranks=ranks,
        kind=kind,
        runner=runner,
        extension=extension or PROBE,
        backend=not extension,
    )
    command = [sys.executable, "-m", "tests.vllm.inprocess"]
    command += [msgspec.json.encode(arguments).decode()]
    log = world.directory / "vllm.log"
    with running_group(command, log, environment(), lines=True) as group:
        process = LineProcess(group)
        await anyio.to_thread.run_sync(process.answer, START_S)
        yield InProcess(process)


async def check_versions(
    engine: UnderTest,
    world: World,
    oracle: Oracle,
    architecture: Architecture,
    ranks: int,
    versions: Sequence[int],
    from_files: Sequence[int] = (),
) -> None:
    """Publish one version after the other: before each the engine is what it was, after it what a
    fresh engine is that was started from the same weights, in output and in every bit.

    The engine must have been started from version 0. Versions in `from_files` are published as
    files, the others in shared memory.
    """
    held = await is_fresh_at(engine, oracle, architecture, 0, ranks)
    seen = [held]
    for version in versions:
        await is_unchanged(engine, held)
        if version in from_files:
            path = oracle.folder(architecture, version) / FILE
            (world.directory / f"{version}-{FILE}").write_bytes(path.read_bytes())
            await world.publisher.publish_files(world.directory / f"{version}-{FILE}", version)
        else:
            await world.publish(tensors_of(architecture, version), version)
        await world.completes(version)
        held = await is_fresh_at(engine, oracle, architecture, version, ranks)
        seen.append(held)
    assert len({str(one.outputs) for one in seen}) == len(seen), "versions must differ in output"
    assert len({str(one.sums) for one in seen}) == len(seen), "versions must differ in what is held"


async def is_fresh_at(
    engine: UnderTest, oracle: Oracle, architecture: Architecture, version: int, ranks: int
) -> Answer:
    """See that an engine is as one that was started from a version; returns what it said."""
    fresh = await anyio.to_thread.run_sync(oracle.generates, architecture, version, ranks)
    found = await engine.answer()
    assert differing(found, fresh) == [], f"at version {version}"
    assert found.outputs == fresh.outputs, f"at version {version}"
    assert len(fresh.sums) == ranks
    return found


async def is_unchanged(engine: UnderTest, held: Answer) -> None:
    """See that an engine is still as it was when it gave this answer."""
    found = await engine.answer()
    assert differing(found, held) == []
    # The last prompt is found in the prefix cache now, and computed in other pieces.
    assert found.outputs[:-1] == held.outputs[:-1]


def differing(found: Answer, fresh: Answer) -> list[str]:
    """Names of what is not the same in two engines."""
    assert len(found.sums) == len(fresh.sums)
    names = []
    for rank, (one, other) in enumerate(zip(found.sums, fresh.sums, strict=True)):
        names += [
            f"rank {rank}: {name}"
            for name in sorted(one.keys() | other.keys())
            if one.get(name) != other.get(name)
        ]
    return names

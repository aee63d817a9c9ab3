"""A program that has vLLM in its own process, and Weight bus beside it, as a trainer's may.

    python -m tests.vllm.inprocess ARGUMENTS

Its one argument is JSON (`Arguments`). Says `{}` on stdout once its engine follows the model on the
bus; then each line on stdin is a question (`Question`), answered there by one line. It ends with
stdin.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import anyio
import anyio.to_thread
import msgspec
from msgspec import Struct

from tests.integration.fleet.reports import take_stdout
from tests.vllm.fresh import Answer
from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.vllm.engine import open_vllm_engine
from weightbus.consumers.engines.vllm.handle import VllmHandle
from weightbus.consumers.service import open_consumer
from weightbus.consumers.transfer.compose import open_routes
from weightbus.tracing.telemetry import Telemetry

__all__ = ("Arguments", "Question")

SERVING_S = 120.0


class Arguments(Struct, frozen=True, kw_only=True):
    url: str
    """Of the bus."""
    config: ConsumerConfig
    directory: str
    """Where the workers meet the consumer."""
    folder: str
    """The checkpoint that the engine is started from."""
    ranks: int
    kind: Literal["LLM", "AsyncLLM"]
    runner: Literal["generate", "pooling"] = "generate"
    extension: str
    """Class of the workers' extension."""
    backend: bool
    """Whether Weight bus is vLLM's weight-transfer backend."""


class Question(Struct, frozen=True, kw_only=True):
    prompts: list[list[int]] = []
    max_tokens: int = 0
    """0: the prompts are embedded."""
    reload: str = ""
    """First have vLLM reload this checkpoint by its own means."""


class Offline:
    """An `LLM`: blocking, so in a thread, and only while no update is under way."""

    def __init__(self, arguments: Arguments) -> None:
        from vllm import LLM

        self.llm: Any = LLM(**_options(arguments))
        self.handle = VllmHandle(self.llm)

    async def answer(self, question: Question) -> Answer:
        return await anyio.to_thread.run_sync(self._answer, question)

    def _answer(self, question: Question) -> Answer:
        from vllm import SamplingParams

        prompts: Any = [{"prompt_token_ids": prompt} for prompt in question.prompts]
        outputs: list[list[int]] = []
        embeddings: list[list[float]] = []
        with self.handle.serving(SERVING_S):
            if question.reload:
                self.llm.collective_rpc("probe_reload", args=(question.reload,))
            if question.max_tokens:
                sampling = SamplingParams(**_greedy(question.max_tokens))
                for prompt in prompts:  # one by one: rounding depends on who is in a batch
                    (done,) = self.llm.generate([prompt], sampling, use_tqdm=False)
                    outputs.append(list(done.outputs[0].token_ids))
            else:
                done = self.llm.embed(prompts, use_tqdm=False)
                embeddings = [list(one.outputs.embedding) for one in done]
            sums = self.llm.collective_rpc("probe_sums")
        return Answer(outputs=outputs, embeddings=embeddings, sums=sums)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class Online:
    """An `AsyncLLM`, on the consumer's own event loop."""

    def __init__(self, arguments: Arguments) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm: Any = AsyncLLM.from_engine_args(AsyncEngineArgs(**_options(arguments)))
        self.handle = VllmHandle(self.llm)

    async def answer(self, question: Question) -> Answer:
        outputs = [
            await self._generate(number, prompt, question.max_tokens)
            for number, prompt in enumerate(question.prompts)
        ]
        sums = await self.llm.collective_rpc("probe_sums")
        return Answer(outputs=outputs, embeddings=[], sums=sums)

    async def _generate(self, number: int, prompt: list[int], max_tokens: int) -> list[int]:
        from vllm import SamplingParams

        tokens: list[int] = []
        prompts: Any = {"prompt_token_ids": prompt}
        sampling = SamplingParams(**_greedy(max_tokens))
        async for output in self.llm.generate(prompts, sampling, f"request-{number}"):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    def close(self) -> None:
        self.llm.shutdown()


async def main(arguments: Arguments, replies: TextIO) -> None:
    engine = Offline(arguments) if arguments.kind == "LLM" else Online(arguments)
    try:
        async with _follow(arguments, engine.handle):
            print("{}", file=replies)  # it follows
            lines = asyncio.StreamReader()
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
            )
            while line := await lines.readline():
                question = msgspec.json.decode(line, type=Question)
                answer = await engine.answer(question)
                print(msgspec.json.encode(answer).decode(), file=replies)
    finally:
        engine.close()


@asynccontextmanager
async def _follow(arguments: Arguments, handle: VllmHandle) -> AsyncIterator[None]:
    config = arguments.config
    async with (
        open_bus(BusSettings(url=arguments.url)) as bus,
        open_vllm_engine(
            Path(arguments.directory),
            handle=handle,
            roots=config.file_roots,
            host_id=config.host_id,
        ) as engine,
        open_routes(config, bus) as routes,
        open_consumer(config, bus=bus, engine=engine, routes=routes, telemetry=Telemetry()),
    ):
        yield


def _options(arguments: Arguments) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": arguments.folder,
        "runner": arguments.runner,
        "tensor_parallel_size": arguments.ranks,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "worker_extension_cls": arguments.extension,
        "seed": 0,
    }
    if arguments.backend:
        from vllm.config import WeightTransferConfig

        options["weight_transfer_config"] = WeightTransferConfig(backend="weightbus")
    return options


def _greedy(max_tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[1], type=Arguments)
    if given.kind == "LLM" and given.ranks == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its one worker is in this process
    anyio.run(main, given, take_stdout())

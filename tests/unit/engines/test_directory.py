"""The engine's directory: who may enter, what fits, who is bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightbus.consumers.engines.directory import (
    MAX_SOCKET_PATH_BYTES,
    EngineDirectory,
    own_socket,
    socket_path,
)
from weightbus.consumers.errors import EngineUnavailable


def test_socket_path_is_refused_when_one_byte_too_long() -> None:
    fits = Path("/" + "é" * 53)
    assert len(os.fsencode(fits)) == MAX_SOCKET_PATH_BYTES
    assert socket_path(fits) == fits
    with pytest.raises(EngineUnavailable, match="has 108 bytes: a unix socket takes at most 107"):
        socket_path(Path(f"{fits}x"))


def test_directory_is_private_when_created(short_path: Path) -> None:
    place = EngineDirectory(short_path / "a" / "b")
    place.prepare()
    assert place.path.stat().st_mode & 0o777 == 0o700
    place.prepare()


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_directory_is_refused_when_others_may_enter(short_path: Path, mode: int) -> None:
    short_path.chmod(mode)
    with pytest.raises(EngineUnavailable, match=f"mode {mode:04o}"):
        EngineDirectory(short_path).prepare()


def test_directory_is_refused_when_it_is_a_file_or_absent(short_path: Path) -> None:
    (short_path / "file").touch(mode=0o700)
    with pytest.raises(EngineUnavailable, match="cannot be created"):
        EngineDirectory(short_path / "file").prepare()
    with pytest.raises(EngineUnavailable, match="no directory"):
        EngineDirectory(short_path / "absent").check()


def test_socket_has_one_owner_when_two_want_it(short_path: Path) -> None:
    socket = short_path / "control.ipc"
    with own_socket(socket):
        with pytest.raises(EngineUnavailable, match="another process"), own_socket(socket):
            pass
        socket.touch()
    assert not list(short_path.iterdir())
    with own_socket(socket):
        pass


def test_socket_is_free_again_when_its_owner_was_killed(short_path: Path) -> None:
    socket = short_path / "control.ipc"
    program = (
        "import sys, pathlib\n"
        "from weightbus.consumers.engines.directory import own_socket\n"
        "with own_socket(pathlib.Path(sys.argv[1])):\n"
        "    print('owned', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"owned\n"
        with pytest.raises(EngineUnavailable), own_socket(socket):
            pass
        owner.kill()
        owner.wait()
        with own_socket(socket):
            pass

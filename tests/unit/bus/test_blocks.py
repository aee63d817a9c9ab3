"""The shared-memory block: its file, its lock, its generation, and no room for it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from pathlib import Path

import pytest

from weightbus.bus import blocks
from weightbus.bus.blocks import SharedBlock, gives_huge_pages, warn_unless_ordered
from weightbus.bus.errors import SharedMemoryFull, SharedMemoryUnavailable
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, unpack_shm_header

NAME = "weightbus-test"


def test_block_is_private_allocated_and_even_when_created(tmp_path: Path) -> None:
    block = SharedBlock(NAME, 10_000, 6, tmp_path)
    found = (tmp_path / NAME).stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == SHM_HEADER_BYTES + 10_000
    assert found.st_blocks * 512 >= found.st_size
    assert unpack_shm_header((tmp_path / NAME).read_bytes()) == (10_000, 6)
    block.close()


@pytest.mark.parametrize(
    ("options", "gives"),
    [
        ("rw,huge=advise,size=8g", True),
        ("rw,size=8g", False),
        ("rw,huge=always", False),
        ("rw,huge=never", False),
    ],
)
def test_huge_pages_are_asked_for_where_the_mount_gives_them(
    tmp_path: Path, options: str, *, gives: bool
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "tmpfs /dev/shm tmpfs rw,huge=within_size 0 0\n"
        f"tmpfs /dev/shm tmpfs {options} 0 0\n"
        "tmpfs /dev/shm/below tmpfs rw,huge=advise 0 0\n"
    )
    assert gives_huge_pages(Path("/dev/shm"), mounts) is gives
    assert not gives_huge_pages(Path("/dev/shm"), tmp_path / "absent")


@pytest.mark.parametrize("size_bytes", [10, 3 * 2**20])
def test_block_is_whole_when_huge_pages_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    monkeypatch.setattr(blocks, "gives_huge_pages", lambda directory: True)
    name = f"{NAME}-huge-{os.getpid()}"
    block = SharedBlock(name, size_bytes)
    try:
        found = (blocks.SHM_DIRECTORY / name).stat()
        assert found.st_size == SHM_HEADER_BYTES + size_bytes
        assert found.st_blocks * 512 >= found.st_size
        assert not any(block.data)
    finally:
        block.close()


def test_generation_is_odd_while_written_and_greater_when_written_again(tmp_path: Path) -> None:
    block = SharedBlock(NAME, 4, 0, tmp_path)
    data = block.begin_write()
    assert unpack_shm_header((tmp_path / NAME).read_bytes()) == (4, 1)
    data[:] = b"abcd"
    assert block.end_write() == 2
    assert (tmp_path / NAME).read_bytes()[SHM_HEADER_BYTES:] == b"abcd"
    block.begin_write()
    assert block.generation == 3
    del data
    block.close()


def test_generation_stays_odd_when_a_write_is_given_up_and_begun_again(tmp_path: Path) -> None:
    block = SharedBlock(NAME, 4, 2, tmp_path)
    block.begin_write()
    block.begin_write()
    assert block.generation == 3
    assert block.end_write() == 4
    block.close()


def test_block_is_new_again_when_it_has_been_written(tmp_path: Path) -> None:
    block = SharedBlock(NAME, 4, 0, tmp_path)
    os.utime(tmp_path / NAME, (0, 0))
    block.begin_write()
    block.end_write()
    assert (tmp_path / NAME).stat().st_mtime > 0
    block.close()


def test_block_is_locked_until_closed(tmp_path: Path) -> None:
    block = SharedBlock(NAME, 4, 0, tmp_path)
    fd = os.open(tmp_path / NAME, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    block.close()
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    assert not (tmp_path / NAME).exists()
    block.close()


def test_block_goes_when_closed_while_a_view_is_held(tmp_path: Path) -> None:
    block = SharedBlock(NAME, 4, 0, tmp_path)
    data = block.begin_write()
    block.close()
    data[:] = b"abcd"
    assert bytes(data) == b"abcd"
    assert not (tmp_path / NAME).exists()


def test_creation_names_need_and_have_when_there_is_no_room(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    have_bytes = room.f_bavail * room.f_frsize
    with pytest.raises(SharedMemoryFull) as full:
        SharedBlock(NAME, 2 * have_bytes, 0, tmp_path)
    assert full.value.need_bytes == 2 * have_bytes + SHM_HEADER_BYTES
    assert 0 < full.value.have_bytes < full.value.need_bytes
    assert list(tmp_path.iterdir()) == []


def test_creation_leaves_what_is_there_when_the_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"another's")
    with pytest.raises(SharedMemoryUnavailable, match="exists"):
        SharedBlock(NAME, 4, 0, tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"another's"


def test_creation_fails_when_the_directory_is_gone(tmp_path: Path) -> None:
    with pytest.raises(SharedMemoryUnavailable, match="No such file"):
        SharedBlock(NAME, 4, 0, tmp_path / "nowhere")


def test_words_and_data_are_at_their_address_when_written(tmp_path: Path) -> None:
    block = SharedBlock("weightbus-stage.m.words", 64, 0, tmp_path)
    words, data = block.words(256, 2), block.data
    words[1], data[:3] = 7, b"abc"
    assert ctypes.string_at(block.address, 3) == b"abc"
    raw = (tmp_path / "weightbus-stage.m.words").read_bytes()
    assert (raw[264:272], raw[4096:4099]) == ((7).to_bytes(8, "little"), b"abc")
    block.close()
    data[3:4] = b"d"
    assert bytes(data[:4]) == b"abcd", "views outlive the name"


@pytest.mark.parametrize(("machine", "warnings"), [("x86_64", 0), ("aarch64", 1), ("riscv64", 1)])
def test_machine_is_named_when_it_does_not_keep_stores_in_order(
    machine: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert warn_unless_ordered(machine) == (not warnings)
    assert len(caplog.records) == warnings
    assert all(machine in record.getMessage() for record in caplog.records)

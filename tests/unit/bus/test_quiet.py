"""What a library writes at its start is kept from the terminal, and nothing else is."""

from __future__ import annotations

import logging
import os

import pytest

from weightbus.bus.quiet import quietly

LOGGER = logging.getLogger("test")
NOISE = (
    b"WARNING: Logging before InitGoogleLogging() is written to STDERR\n"
    b"E1121 16:48:42.615453  6430 transfer_metadata.cpp:1098] Local segment descriptor not found\n"
)


def test_noise_is_logged_and_the_rest_is_passed_on(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), quietly(LOGGER):
        os.write(2, NOISE + b"of another thread\n")
        os.write(1, b"result\n")
    assert capfd.readouterr() == ("result\n", "of another thread\n")
    assert [record.levelname for record in caplog.records] == ["DEBUG", "DEBUG"]
    assert "Local segment descriptor" in caplog.text


def test_streams_are_restored_when_the_body_fails(capfd: pytest.CaptureFixture[str]) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError), quietly(LOGGER):
        raise KeyError
    os.write(1, b"out")
    os.write(2, b"err")
    assert capfd.readouterr() == ("out", "err")
    assert len(os.listdir("/proc/self/fd")) == fds


def test_what_python_prints_keeps_its_order(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with quietly(LOGGER):
        print("within")
    print("after")
    assert capfd.readouterr().out == "before\nwithin\nafter\n"


def test_closed_stream_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    kept = os.dup(1)
    try:
        os.close(1)
        with quietly(LOGGER):
            os.write(2, NOISE)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(1)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert capfd.readouterr() == ("", "")

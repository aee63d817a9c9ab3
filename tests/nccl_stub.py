"""NCCL without GPUs: a stub of libnccl over files, and a fake of CUDA that knows its streams.

Members may be threads of one process, each with a `StubCuda` of its own, or processes.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.fake_cuda import FakeCuda

__all__ = ("FOLDER", "StubCuda", "build_stub", "load_stub", "why_no_stub")

FOLDER: Final = "STUB_NCCL_FOLDER"
"""Environment variable: where the stub keeps its files."""

SOURCE: Final = Path(__file__).parent / "unit" / "bus" / "stub_nccl.c"

_first_streams = itertools.count(0x1000, 0x100)
"""The members of one process call no two streams the same."""


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def why_no_stub() -> str:
    """Empty: there can be one."""
    return "" if compiler() else "there is no C compiler to build the stub of libnccl with"


def build_stub(folder: Path, *options: str) -> str:
    """Its path."""
    path, gcc = folder / "libnccl.so.2", compiler()
    assert gcc is not None
    command = [gcc, "-shared", "-fPIC", "-pthread", *options, "-o", str(path), str(SOURCE)]
    subprocess.run(command, check=True)
    return str(path)


def load_stub(path: str) -> ctypes.CDLL:
    """Its controls; the same library as `load_nccl` loads from there."""
    stub = ctypes.CDLL(path)
    stub.stub_refuse.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p)
    stub.stub_pending.argtypes, stub.stub_pending.restype = (ctypes.c_long,), ctypes.c_long
    return stub


class StubCuda(FakeCuda):
    """Streams are done when the stub has done what is in them, too."""

    def __init__(self, stub: ctypes.CDLL, devices: int = 1) -> None:
        super().__init__(devices)
        self._stub = stub
        self._numbers = itertools.count(next(_first_streams))

    @contextmanager
    def current(self, device: int) -> Iterator[None]:
        before = self.current_device
        with super().current(device):
            self._stub.stub_enter(device)
            try:
                yield
            finally:
                self._stub.stub_enter(-1 if before is None else before)

    def is_done(self, device: int, stream: int) -> bool:
        return super().is_done(device, stream) and not self._stub.stub_pending(stream)

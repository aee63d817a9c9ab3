"""A process that offers registered segments, and does with them what it is told.

Run as a module it makes the blocks, prints where they are as one line of JSON, and obeys lines on
its standard input. `Source` is the other end.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from weightbus.bus.blocks import SHM_DIRECTORY, SharedBlock
from weightbus.bus.endpoint import open_endpoint, register_block, unregister_block
from weightbus.schemas.placement import RemoteSegment

__all__ = ("Source", "content", "running_source")

ROOT = Path(__file__).resolve().parents[3]


def content(segment: int, size_bytes: int, version: int = 1) -> npt.NDArray[np.uint8]:
    """What lies in a segment of a version; every 8 bytes of it are different."""
    words = np.arange(-(-size_bytes // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(segment * 1_000_003 + version)
    return words.view(np.uint8)[:size_bytes]


class Source:
    """One such process."""

    def __init__(self, process: subprocess.Popen[str], ways: tuple[RemoteSegment, ...]) -> None:
        self.process, self.ways = process, ways

    def tell(self, command: str) -> None:
        """Returns when it is done."""
        stdin, stdout = _pipes(self.process)
        print(command, file=stdin, flush=True)
        assert stdout.readline() == "done\n", f"{command} failed"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Until it is killed. Returns when the kernel has stopped it."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)


@contextmanager
def running_source(sizes_bytes: Sequence[int], version: int = 1) -> Iterator[Source]:
    """A process that offers one segment of each size, filled with `content`."""
    prefix = f"weightbus-test.{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "tests.integration.p2p.source", prefix]
    with subprocess.Popen(
        [*command, str(version), *map(str, sizes_bytes)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            said = json.loads(_pipes(process)[1].readline())
            yield Source(process, tuple(RemoteSegment(**way) for way in said))
        finally:
            process.kill()
            for number in range(len(sizes_bytes)):  # it had no time to do so itself
                (SHM_DIRECTORY / f"{prefix}.{number}").unlink(missing_ok=True)


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def main(prefix: str, version: int, sizes_bytes: Sequence[int]) -> None:
    """`write N`: the next version, from `content`; `begin`: make it odd; `unregister`."""
    blocks = [
        SharedBlock(f"{prefix}.{number}", size_bytes)
        for number, size_bytes in enumerate(sizes_bytes)
    ]
    try:
        with open_endpoint("127.0.0.1") as endpoint:
            ways = []
            for number, block in enumerate(blocks):
                write(block, number, version)
                register_block(endpoint, block)
                way = {"protocol": endpoint.protocol, "session": endpoint.session}
                ways.append(way | {"address": block.address, "generation": block.generation})
            os.write(REPORT, (json.dumps(ways) + "\n").encode())
            for line in sys.stdin:
                match line.split():
                    case ["write", to]:
                        for number, block in enumerate(blocks):
                            write(block, number, int(to))
                    case ["begin"]:
                        for block in blocks:
                            block.begin_write()
                    case ["unregister"]:
                        for block in blocks:
                            unregister_block(endpoint, block)
                os.write(REPORT, b"done\n")
    finally:
        for block in blocks:
            block.close()


def write(block: SharedBlock, number: int, version: int) -> None:
    block.begin_write()[:] = content(number, block.size_bytes, version).data
    block.end_write()


if __name__ == "__main__":
    REPORT = os.dup(1)
    os.dup2(2, 1)  # mooncake writes to both
    main(sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3:]])

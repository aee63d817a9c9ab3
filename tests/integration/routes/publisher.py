"""A publisher's process: blocks of shared memory that other hosts read through a transfer engine.

Run as a module it obeys lines of JSON on its standard input and answers each with another.
`PublisherProcess` is the other end.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from weightbus.bus.blocks import SHM_DIRECTORY, SharedBlock
from weightbus.bus.endpoint import Endpoint, open_endpoint, register_block, unregister_block
from weightbus.schemas.placement import RemoteSegment, SharedMemorySegment

__all__ = ("ADDRESS", "Offer", "PublisherProcess", "running_publisher")

ADDRESS = "127.0.0.1"

ROOT = Path(__file__).resolve().parents[3]


class Command(Struct, frozen=True, kw_only=True):
    sizes_bytes: tuple[int, ...] | None = None
    """Make new segments; the old ones go."""
    paths: tuple[str, ...] = ()
    """What the segments shall hold; empty: what they hold is written again."""


class Offer(Struct, frozen=True, kw_only=True):
    """Where one segment is."""

    name: str
    protocol: str
    session: str
    address: int
    generation: int

    def near(self, host_id: str) -> SharedMemorySegment:
        return SharedMemorySegment(name=self.name, host_id=host_id, generation=self.generation)

    def far(self) -> RemoteSegment:
        return RemoteSegment(
            protocol=self.protocol,
            session=self.session,
            address=self.address,
            generation=self.generation,
        )


class PublisherProcess:
    """One such process."""

    def __init__(self, process: subprocess.Popen[bytes], prefix: str) -> None:
        self._process, self._prefix = process, prefix

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def open(self, sizes_bytes: Sequence[int]) -> tuple[Offer, ...]:
        """New segments; the old ones are gone."""
        return self._ask(Command(sizes_bytes=tuple(sizes_bytes)))

    def write(self, paths: Sequence[Path] = ()) -> tuple[Offer, ...]:
        """A new version of all segments, from files; from none: the same bytes once more."""
        return self._ask(Command(paths=tuple(map(str, paths))))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for path in SHM_DIRECTORY.glob(f"{self._prefix}.*"):  # it had no time to do so itself
            path.unlink()

    def _ask(self, command: Command) -> tuple[Offer, ...]:
        stdin, stdout = _pipes(self._process)
        stdin.write(msgspec.json.encode(command) + b"\n")
        stdin.flush()
        return msgspec.json.decode(stdout.readline(), type=tuple[Offer, ...])


@contextmanager
def running_publisher() -> Iterator[PublisherProcess]:
    prefix = f"weightbus-test.{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "tests.integration.routes.publisher", prefix]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        publisher = PublisherProcess(process, prefix)
        try:
            yield publisher
        finally:
            publisher.kill()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


class _Publisher:
    def __init__(self, prefix: str, endpoint: Endpoint) -> None:
        self._prefix, self._endpoint = prefix, endpoint
        self._blocks: list[SharedBlock] = []
        self._made = 0

    def obey(self, command: Command) -> tuple[Offer, ...]:
        if command.sizes_bytes is not None:
            self.close()
            self._blocks = [self._make(size_bytes) for size_bytes in command.sizes_bytes]
        else:
            self._write(command.paths)
        return tuple(
            Offer(
                name=block.name,
                protocol=self._endpoint.protocol,
                session=self._endpoint.session,
                address=block.address,
                generation=block.generation,
            )
            for block in self._blocks
        )

    def close(self) -> None:
        for block in self._blocks:
            unregister_block(self._endpoint, block)
            block.close()
        self._blocks = []

    def _make(self, size_bytes: int) -> SharedBlock:
        self._made += 1
        block = SharedBlock(f"{self._prefix}.{self._made}", size_bytes)
        register_block(self._endpoint, block)
        return block

    def _write(self, paths: Sequence[str]) -> None:
        for number, block in enumerate(self._blocks):
            data = block.begin_write()
            if paths:
                data[:] = Path(paths[number]).read_bytes()
            block.end_write()


def main(prefix: str, report: int) -> None:
    with open_endpoint(ADDRESS) as endpoint:
        publisher = _Publisher(prefix, endpoint)
        for line in sys.stdin:
            answer = publisher.obey(msgspec.json.decode(line, type=Command))
            os.write(report, msgspec.json.encode(answer) + b"\n")
        publisher.close()


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # mooncake writes to both
    main(sys.argv[1], out)

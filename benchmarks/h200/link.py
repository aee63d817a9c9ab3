"""The link itself: memcpy from host memory to all GPUs at once, and between all GPUs at once.

    python -m benchmarks.h200.link ARGUMENTS

A process of its own. Answers each line of JSON on stdin (`Copy`) with one on stdout (`Copied`).
Host memory is what ours is: a file in /dev/shm, registered with the CUDA runtime. What is copied is
a block of `BLOCK_BYTES`, as often as it takes: larger than any cache, and soon filled.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final, Literal

import msgspec
import torch
from msgspec import Struct

from benchmarks.h200.processes import Processes, answer_commands
from benchmarks.h200.report import Run, run_of
from benchmarks.h200.setup import Setup

__all__ = ("LINKS", "Arguments", "LinkName", "measure_link")

BLOCK_BYTES: Final = 4 * 2**30
PATTERN_BYTES: Final = 2**26
START_S: Final = 120.0

LinkName = Literal["link_h2d", "link_peer"]
LINKS: Final[tuple[LinkName, ...]] = ("link_h2d", "link_peer")


class Arguments(Struct, frozen=True, kw_only=True):
    setup: Setup
    need_bytes: int
    """What each rank needs of a checkpoint."""


class Copy(Struct, frozen=True):
    link: LinkName


class Copied(Struct, frozen=True):
    seconds: float
    bytes: int


async def measure_link(
    names: Sequence[str],
    processes: Processes,
    arguments: Arguments,
    repetitions: int,
    on_run: Callable[[Run], None],
) -> None:
    """Those of `LINKS` that are named; a warm-up, then the repetitions."""
    process = await processes.start_commanded("link", __name__, arguments)
    for link in LINKS:
        if link in names:
            copied = [
                await process.ask(Copy(link), Copied, START_S) for _ in range(1 + repetitions)
            ]
            seconds = [one.seconds for one in copied[1:]]
            on_run(run_of(link, seconds, copied[0].bytes, {}))
    await processes.end("link")


class Links:
    """The memory that is copied from and to, on every device."""

    def __init__(self, arguments: Arguments) -> None:
        setup = arguments.setup
        self._devices = [setup.device(number) for number in range(setup.devices)]
        self._need_bytes = arguments.need_bytes
        self._block_bytes = min(BLOCK_BYTES, arguments.need_bytes)
        with ThreadPoolExecutor() as pool:
            self._host = list(pool.map(self._host_block, self._devices))
        self._streams: dict[tuple[torch.device, torch.device], list[torch.cuda.Stream]] = {}
        blocks = [
            [torch.empty(self._block_bytes, dtype=torch.uint8, device=d) for d in self._devices]
            for _ in range(2)
        ]
        self._sources, self._targets = blocks
        for source, host in zip(self._sources, self._host, strict=True):
            source.copy_(host)

    def _host_block(self, device: torch.device) -> torch.Tensor:
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="weightbus-link-") as file:
            file.truncate(self._block_bytes)
            block = torch.from_file(file.name, True, self._block_bytes, dtype=torch.uint8)
        pattern = torch.randint(0, 256, (min(PATTERN_BYTES, self._block_bytes),))
        for begin in range(0, self._block_bytes, PATTERN_BYTES):
            part = block[begin : begin + PATTERN_BYTES]
            part.copy_(pattern[: part.numel()])
        if device.type == "cuda":
            with torch.cuda.device(device):
                runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                code = runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)
                if int(code):
                    raise SystemExit(f"host memory is not registered: {code}")
        return block

    def copy(self, link: LinkName) -> Copied:
        self._synchronize()
        start = time.perf_counter()
        copied = self._from_host() if link == "link_h2d" else self._from_peers()
        self._synchronize()
        return Copied(time.perf_counter() - start, copied)

    def _from_host(self) -> int:
        """What a rank needs, to every GPU."""
        for begin in range(0, self._need_bytes, self._block_bytes):
            count = min(self._block_bytes, self._need_bytes - begin)
            for target, host in zip(self._targets, self._host, strict=True):
                target[:count].copy_(host[:count], non_blocking=True)
        return self._need_bytes * len(self._devices)

    def _from_peers(self) -> int:
        """To every GPU its share of what a rank needs from each other GPU, never two to one."""
        count = len(self._devices)
        share = self._need_bytes // count
        for begin in range(0, share, self._block_bytes):
            size = min(self._block_bytes, share - begin)
            for step in range(1, count):
                for owner, source in enumerate(self._sources):
                    target = self._targets[(owner + step) % count]
                    with self._apart(source.device, target.device):
                        target[:size].copy_(source[:size], non_blocking=True)
        return share * (count - 1) * count

    @contextmanager
    def _apart(self, owner: torch.device, target: torch.device) -> Iterator[None]:
        """Copies of one pair are on streams of their own: torch lets a copy between two GPUs wait
        for the current streams of both, so by their common ones all pairs would take turns."""
        with ExitStack() as stack:
            if owner.type == "cuda":
                pair = (owner, target)
                if pair not in self._streams:
                    self._streams[pair] = [torch.cuda.Stream(device) for device in pair]  # type: ignore[no-untyped-call]
                for stream in self._streams[pair]:
                    stack.enter_context(torch.cuda.stream(stream))
            yield

    def _synchronize(self) -> None:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def main(arguments: Arguments) -> None:
    commands = answer_commands(Copy)
    links = Links(arguments)
    for command, answer in commands:
        answer(links.copy(command.link))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Arguments))

"""One version as safetensors files in shared memory: what vLLM and checkpoint-engine read.

    python -m benchmarks.vllm_h200.files ARGUMENTS

A process for each rank of the trainers makes its share on its GPU. Answers a line of JSON on stdin
(`Write`) with one on stdout (`Written`). Owns no file: who asks for them removes them.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec
import torch
from msgspec import Struct

from benchmarks.h200.processes import Processes, answer_commands
from benchmarks.h200.setup import Setup, Source, sources_of
from benchmarks.h200.trainer import owned_by
from benchmarks.h200.weights import fill

__all__ = ("file_of", "have_files", "header_of")

WRITE_S: Final = 120.0
ALIGNMENT: Final = 256
NAMES: Final = {torch.bfloat16: "BF16", torch.float32: "F32"}


class Arguments(Struct, frozen=True, kw_only=True):
    setup: Setup
    rank: int
    folder: str


class Write(Struct, frozen=True):
    version: int


class Written(Struct, frozen=True):
    seconds: float


def file_of(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors"


async def have_files(setup: Setup, processes: Processes, folder: Path, version: int) -> float:
    """A file of every rank, written if it is not there; how long the slowest took.

    Raises:
        BenchFailed: a process has ended, or takes too long.
    """
    seconds: list[float] = []

    async def write(rank: int) -> None:
        name = f"files-{rank}"
        arguments = Arguments(setup=setup, rank=rank, folder=str(folder))
        process = await processes.start_commanded(name, __name__, arguments)
        try:
            seconds.append((await process.ask(Write(version), Written, WRITE_S)).seconds)
        finally:
            with anyio.CancelScope(shield=True):
                await processes.end(name)

    async with anyio.create_task_group() as tasks:
        for rank in range(setup.devices):
            tasks.start_soon(write, rank)
    return max(seconds)


def header_of(sources: list[Source]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The head of a file, padded; where each tensor lies behind it."""
    said: dict[str, Any] = {}
    places, end = {}, 0
    for source in sources:
        begin, end = end, end + source.size_bytes
        places[source.name] = begin, end
        said[source.name] = {
            "dtype": NAMES[source.dtype],
            "shape": source.shape,
            "data_offsets": (begin, end),
        }
    encoded = msgspec.json.encode(said)
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded, places


def write(arguments: Arguments, version: int) -> None:
    setup, rank = arguments.setup, arguments.rank
    path = file_of(Path(arguments.folder), rank, setup.devices)
    if path.exists():
        return
    sources = owned_by(sources_of(setup.config), rank, setup.devices)
    head, places = header_of(sources)
    size_bytes = len(head) + max((end for _, end in places.values()), default=0)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w+b") as file:
        file.truncate(size_bytes)
        with mmap.mmap(file.fileno(), size_bytes) as mapped:
            mapped.madvise(mmap.MADV_HUGEPAGE)
            mapped[: len(head)] = head
            whole = torch.frombuffer(mapped, dtype=torch.uint8)
            for source in sources:
                begin, end = places[source.name]
                made = torch.empty(source.shape, dtype=source.dtype, device=setup.device(rank))
                fill(made, source.name, version)
                place = whole[len(head) + begin : len(head) + end]
                place.copy_(made.view(-1).view(torch.uint8))
            del whole, place  # else the mapping could not be closed
    os.replace(unfinished, path)


def main(arguments: Arguments) -> None:
    commands = answer_commands(Write)
    for command, answer in commands:
        start = time.monotonic()
        write(arguments, command.version)
        answer(Written(time.monotonic() - start))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Arguments))

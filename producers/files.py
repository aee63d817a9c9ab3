"""Publishes safetensors files where they lie; a trainer in another language does no more than this.

Reads headers, and for the digest every byte once, in blocks: through `pread` and not a mapping, so
that a file that becomes shorter is an error and not a SIGBUS. Needs no torch.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from typing import Final

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np
from msgspec import structs

from weightbus.bus.digest import digest_box
from weightbus.bus.errors import FileUnreadable
from weightbus.bus.files import expand_index_files, read_layout_of_files
from weightbus.producers.announcing import Announcer
from weightbus.producers.digests import Sums
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout, ShardSpec
from weightbus.schemas.layout_codec import tensor_bytes
from weightbus.tracing.attributes import BYTES
from weightbus.tracing.telemetry import Span

__all__ = ("Files", "find_files", "publish_files")

Files = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""Paths, patterns (`step-7/*.safetensors`) or indexes (`model.safetensors.index.json`)."""

BLOCK_BYTES: Final = 8 * 2**20
FILES_AT_ONCE: Final = 4


async def publish_files(
    announcer: Announcer,
    files: Files,
    version: int,
    metadata: Mapping[str, str],
    *,
    digest: bool,
    span: Span,
) -> CheckpointReady:
    """Announce `files`; see `Publisher.publish_files`.

    Raises:
        FileUnreadable: a file is missing or cannot be read.
        MessageInvalid: a file is not safetensors, a tensor is in two files, or metadata is wrong.
        VersionNotNew
        BusUnavailable, BusTimeout, RequestRefused
    """
    draft = announcer.draft(version, metadata)
    paths = await anyio.to_thread.run_sync(find_files, files)
    layout = await anyio.to_thread.run_sync(read_layout_of_files, paths, None)
    await announcer.check_new(version)
    ready = structs.replace(draft, files=paths)
    if digest:
        tensor_digests = await digest_files(layout, paths)
        weights_digest, key = await announcer.put_digests(tensor_digests)
        ready = structs.replace(ready, weights_digest=weights_digest, tensor_digests=key)
    span.set(BYTES, sum(map(tensor_bytes, layout.tensors)))
    return await announcer.say(ready, span.ref.headers())


def find_files(files: Files) -> tuple[str, ...]:
    """The absolute paths of the safetensors files that are meant, each once. Blocking.

    Files of a pattern or an index come in the order of their names.

    Raises:
        FileUnreadable: there is no file of that name.
        MessageInvalid: an index cannot be read.
    """
    given = [files] if isinstance(files, str | os.PathLike) else list(files)
    if not given:
        raise FileUnreadable("nothing", "no file is named")
    found = [path for one in given for path in _find(os.path.abspath(one))]
    return tuple(dict.fromkeys(expand_index_files(found, None)))


def _find(path: str) -> list[str]:
    if not os.path.exists(path) and glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise FileUnreadable(path, "no file matches")
        return matches
    if os.path.isdir(path):
        raise FileUnreadable(path, "it is a directory; name its files, such as *.safetensors")
    return [path]


async def digest_files(layout: Layout, paths: Iterable[str]) -> Sums:
    """The digest of every tensor of the layout of files; several files are read at once."""
    of_file: list[list[ShardSpec]] = [[] for _ in layout.segments]
    for shard in layout.shards:
        of_file[shard.segment].append(shard)
    digests = np.zeros(len(layout.tensors), dtype=np.uint64)
    failures: list[FileUnreadable] = []
    limiter = anyio.CapacityLimiter(FILES_AT_ONCE)

    async def digest_one(path: str, shards: list[ShardSpec]) -> None:
        try:
            sums = await anyio.to_thread.run_sync(
                _digest_file, path, layout, shards, limiter=limiter
            )
        except FileUnreadable as error:
            failures.append(error)
        else:
            digests[[shard.tensor for shard in shards]] = sums

    async with anyio.create_task_group() as group:
        for path, shards in zip(paths, of_file, strict=True):
            group.start_soon(digest_one, path, shards)
    if failures:
        raise failures[0]
    return digests


def _digest_file(path: str, layout: Layout, shards: list[ShardSpec]) -> list[int]:
    """Blocking; the digest of each of a file's tensors."""
    try:
        with open(path, "rb", buffering=0) as file:
            fd = file.fileno()
            return [
                _digest_range(fd, shard.offset_bytes, tensor_bytes(layout.tensors[shard.tensor]))
                for shard in shards
            ]
    except OSError as error:
        raise FileUnreadable(path, str(error.strerror or error)) from error


def _digest_range(fd: int, offset_bytes: int, size_bytes: int) -> int:
    """The digest of a tensor that lies at one place of a file.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    buffer = bytearray(min(BLOCK_BYTES, size_bytes))
    total = 0
    for begin in range(0, size_bytes, BLOCK_BYTES):
        anyio.from_thread.check_cancelled()
        block = memoryview(buffer)[: size_bytes - begin]
        _read_into(block, fd, offset_bytes + begin)
        data = np.frombuffer(block, dtype=np.uint8)
        total += digest_box(data, (size_bytes,), 1, (begin,), (len(block),))
    return total % 2**64


def _read_into(block: memoryview, fd: int, offset_bytes: int) -> None:
    while block:
        count = os.preadv(fd, [block], offset_bytes)
        if not count:
            raise OSError("it became shorter while it was read")
        block = block[count:]
        offset_bytes += count

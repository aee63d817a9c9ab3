"""Checkpoints as a trainer publishes them: tensors cut into shards over several segments."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tests.unit.transfer.blocks import Block, open_block
from weightbus.bus.digest import combine, digest_hex, digest_tensors
from weightbus.consumers.reload.dtypes import DTYPE_NAMES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import check_layout, encode_layout, layout_digest
from weightbus.schemas.placement import FileSegment, Segment

__all__ = ("HOST", "Kind", "Trainer", "cut_layout", "open_trainer")

HOST = "test-host"

Kind = Literal["memory", "files"]
Tensors = Mapping[str, torch.Tensor]


def cut_layout(tensors: Tensors, segments: int = 1, seed: int = 0) -> Layout:
    """Every tensor in uneven boxes, here and there, at odd and at aligned places."""
    source = random.Random(seed)
    ends = [0] * segments
    shards = []
    for number, tensor in enumerate(tensors.values()):
        for starts, sizes in _boxes(tuple(tensor.shape), source):
            segment = source.randrange(segments)
            alignment = source.choice([1, 8, 256])
            offset = -(-ends[segment] // alignment) * alignment
            shards.append(ShardSpec(number, starts, sizes, segment, offset))
            ends[segment] = offset + tensor.itemsize * torch.Size(sizes).numel()
    specs = (
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    )
    return Layout(tuple(specs), tuple(shards), tuple(SegmentSpec(end) for end in ends))


def _boxes(
    shape: tuple[int, ...], source: random.Random
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a shape at random into boxes."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(source.randrange(3)):
        starts, sizes = boxes.pop(source.randrange(len(boxes)))
        dims = [dim for dim, size in enumerate(sizes) if size > 1]
        if not dims:
            boxes.append((starts, sizes))
            continue
        dim = source.choice(dims)
        cut = source.randrange(1, sizes[dim])
        for start, size in ((0, cut), (cut, sizes[dim] - cut)):
            boxes.append(
                (
                    (*starts[:dim], starts[dim] + start, *starts[dim + 1 :]),
                    (*sizes[:dim], size, *sizes[dim + 1 :]),
                )
            )
    return iter(boxes)


class Trainer:
    """Publishes versions of one layout as segments of one kind."""

    def __init__(
        self, layout: Layout, kind: Kind, directory: Path, blocks: Sequence[Block]
    ) -> None:
        check_layout(layout)
        self.layout, self.kind = layout, kind
        self.layout_blob = encode_layout(layout)
        self.layout_digest = layout_digest(layout)
        self.blocks = blocks
        self._directory = directory

    @property
    def roots(self) -> tuple[str, ...]:
        return (str(self._directory),)

    def publish(self, tensors: Tensors, version: int) -> tuple[Segment, ...]:
        """Where the version is; blocks are overwritten, files are new ones."""
        return tuple(
            self._write(number, bytes(data), version)
            for number, data in enumerate(self.segments(tensors))
        )

    def path(self, number: int, version: int) -> Path:
        return self._directory / f"{version}-{number}.bin"

    def _write(self, number: int, data: bytes, version: int) -> Segment:
        if self.kind == "memory":
            return self.blocks[number].write(data)
        path = self.path(number, version)
        path.write_bytes(data)
        return FileSegment(path=str(path))

    def segments(self, tensors: Tensors) -> list[bytearray]:
        """What the segments of a version hold."""
        segments = [bytearray(spec.size_bytes) for spec in self.layout.segments]
        values = list(tensors.values())
        for shard in self.layout.shards:
            box = values[shard.tensor]
            for dim, (start, size) in enumerate(zip(shard.starts, shard.sizes, strict=True)):
                box = box.narrow(dim, start, size)
            data = _raw(box)
            segments[shard.segment][shard.offset_bytes : shard.offset_bytes + len(data)] = data
        return segments


@contextmanager
def open_trainer(layout: Layout, kind: Kind, directory: Path) -> Iterator[Trainer]:
    """A trainer whose blocks are removed at the end."""
    with ExitStack() as stack:
        sizes = [spec.size_bytes for spec in layout.segments] if kind == "memory" else []
        blocks = [stack.enter_context(open_block(bytes(size), HOST)) for size in sizes]
        yield Trainer(layout, kind, directory, blocks)


def weights_digest(tensors: Tensors) -> str:
    """What a publisher says of a version."""
    raw = [np.frombuffer(_raw(tensor), dtype=np.uint8) for tensor in tensors.values()]
    return digest_hex(combine(digest_tensors(raw)))


def _raw(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

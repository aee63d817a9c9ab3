"""Where every byte of one version lies: by the store, or by headers of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightbus.bus.files import expand_index_files, read_layout_of_files
from weightbus.consumers.errors import SegmentUnavailable
from weightbus.consumers.planning.source import SourceMemory
from weightbus.consumers.transfer.opening import stamped
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import encode_layout, layout_digest
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    Placement,
    RemoteSegment,
    SharedMemorySegment,
)

__all__ = ("Manifest", "read_manifest")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a reader needs to find every byte of one version."""

    layout: Layout
    layout_digest: str
    layout_blob: bytes
    placement: Placement

    @property
    def hosts(self) -> int:
        """How many hosts it can be read from, copies included. A host that offers its memory both
        to itself and to others counts once."""
        ways = [way for offered in self.placement for way in offered]
        memories = {
            way.host_id for way in ways if isinstance(way, SharedMemorySegment | CudaSegment)
        }
        remotes = {way.session.rpartition(":")[0] for way in ways if isinstance(way, RemoteSegment)}
        return max(1, len(memories), len(remotes))

    @property
    def in_files(self) -> bool:
        """Whether it lies in files alone."""
        return all(isinstance(way, FileSegment) for offered in self.placement for way in offered)

    @property
    def memory(self) -> SourceMemory:
        """In which its host reads it: what is offered in memory of GPUs is read there."""
        kinds = [{type(way) for way in offered} for offered in self.placement]
        if any(CudaSegment in offered for offered in kinds):
            return "gpus"
        whole = bool(kinds) and all(SharedMemorySegment in offered for offered in kinds)
        return "host" if whole else "other"


def read_manifest(files: Sequence[str], roots: Sequence[str]) -> Manifest:
    """Of safetensors files, indexes expanded. Blocking; only reads.

    Raises:
        WeightBusError: a file is absent, outside the roots, or not what it must be.
    """
    paths = expand_index_files(files, roots)
    try:  # before the headers are read: what is read must be what is stamped
        segments = [stamped(FileSegment(path=path)) for path in paths]
    except SegmentUnavailable:
        read_layout_of_files(paths, roots)  # names what is wrong: absent, or outside the roots
        raise
    layout = read_layout_of_files(paths, roots)
    return Manifest(
        layout=layout,
        layout_digest=layout_digest(layout),
        layout_blob=encode_layout(layout),
        placement=tuple((segment,) for segment in segments),
    )

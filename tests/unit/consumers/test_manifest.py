"""How many hosts a version can be read from, and in what it lies there."""

from __future__ import annotations

import pytest

from weightbus.consumers.manifest import Manifest
from weightbus.consumers.planning.source import SourceMemory
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    RemoteSegment,
    Segment,
    SharedMemorySegment,
)

FILE = FileSegment(path="/a")


def memory(host: str) -> SharedMemorySegment:
    return SharedMemorySegment(name="weightbus-a", host_id=host, generation=2)


def on_gpu(host_id: str) -> CudaSegment:
    return CudaSegment(handle=b"", host_id=host_id, device_uuid="GPU-x", generation=2)


def remote(session: str) -> RemoteSegment:
    return RemoteSegment(protocol="tcp", session=session, address=0, generation=2)


@pytest.mark.parametrize(
    ("placement", "hosts", "in_files"),
    [
        ([[memory("h")], [memory("h")]], 1, False),
        ([[memory("h"), remote("10.0.0.1:5")]], 1, False),
        ([[memory("h"), remote("10.0.0.1:5")], [memory("i"), remote("10.0.0.2:5")]], 2, False),
        ([[remote("10.0.0.1:5"), remote("10.0.0.1:6"), remote("[fd00::1]:6")]], 2, False),
        ([[on_gpu("h"), memory("h")], [on_gpu("h")]], 1, False),
        ([[on_gpu("h")], [on_gpu("i")], [memory("j")]], 3, False),
        ([[FILE], [FILE]], 1, True),
        ([[FILE], [FILE, remote("10.0.0.1:5")]], 1, False),
    ],
)
def test_hosts_are_counted_once_whatever_they_offer(
    placement: list[list[Segment]], hosts: int, in_files: bool
) -> None:
    found = manifest(placement)
    assert (found.hosts, found.in_files) == (hosts, in_files)


@pytest.mark.parametrize(
    ("placement", "kind"),
    [
        ([[memory("h"), remote("10.0.0.1:5")], [memory("h")]], "host"),
        ([[memory("h"), FILE]], "host"),
        ([[memory("h")], [FILE]], "other"),
        ([[memory("h")], [remote("10.0.0.1:5")]], "other"),
        ([[FILE], [FILE]], "other"),
        ([[memory("h"), on_gpu("h")], [memory("h"), on_gpu("h")]], "gpus"),
        ([[memory("h")], [on_gpu("h")]], "gpus"),
        ([], "other"),
    ],
)
def test_memory_is_of_one_kind_only_when_every_segment_is_in_it(
    placement: list[list[Segment]], kind: SourceMemory
) -> None:
    assert manifest(placement).memory == kind


def manifest(placement: list[list[Segment]]) -> Manifest:
    return Manifest(
        layout=Layout((), (), ()),
        layout_digest="0" * 64,
        layout_blob=b"",
        placement=tuple(tuple(ways) for ways in placement),
    )

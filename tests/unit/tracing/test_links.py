"""Which link a stage takes, by its route, by where the version lies and where it is to go."""

from __future__ import annotations

from typing import Any

import pytest

from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    RemoteSegment,
    SharedMemorySegment,
)
from weightbus.schemas.rounds import Links
from weightbus.tracing.links import Source, limiting_link, link_of, link_rate, source_of
from weightbus.tracing.waterfall import LinkName

HOST = SharedMemorySegment(name="weightbus-x", host_id="here", generation=2)
GPU = CudaSegment(handle=b"x", host_id="here", device_uuid="g", generation=2)
REMOTE = RemoteSegment(protocol="tcp", session="there:1", address=64, generation=2)
FILE = FileSegment(path="/w")


def ready(*ways: Any, files: tuple[str, ...] = ()) -> CheckpointReady:
    placement = (ways,) if ways else ()
    return CheckpointReady(model="m", version=1, producer="t", placement=placement, files=files)


@pytest.mark.parametrize(
    ("announced", "host_id", "gpu", "source"),
    [
        (ready(files=("/w",)), "here", True, "files"),
        (ready(FILE), "here", False, "files"),
        (ready(HOST, REMOTE), "here", True, "host"),
        (ready(GPU, HOST, REMOTE), "here", True, "gpu"),
        (ready(GPU, HOST, REMOTE), "here", False, "host"),
        (ready(GPU, HOST, REMOTE), "there", True, "remote"),
        (ready(), "here", True, ""),
    ],
)
def test_source_is_the_nearest_way_that_a_host_has(
    announced: CheckpointReady, host_id: str, gpu: bool, source: Source
) -> None:
    assert source_of(announced, host_id, gpu=gpu) == source


@pytest.mark.parametrize(
    ("stage", "route", "source", "gpu", "lanes", "link"),
    [
        ("negotiate", None, "host", True, False, ""),
        ("commit", None, "host", True, False, ""),
        ("reload", "local", "host", False, False, "memory"),
        ("reload", "local", "host", True, False, "device"),
        ("reload", "local", "gpu", True, False, "peer"),
        ("reload", "local", "files", True, False, "device"),
        ("reload", "p2p", "remote", True, False, "device"),
        ("reload", "broadcast", "host", True, True, "peer"),
        ("reload", "broadcast", "host", True, False, "device"),
        ("fetch", "local", "files", False, False, "disk"),
        ("fetch", "p2p", "remote", True, False, "p2p"),
        ("fetch", "p2p", "host", True, False, "p2p"),
        ("fetch", "broadcast", "remote", True, True, "p2p"),
        ("fetch", "broadcast", "host", True, True, "device"),
        ("fetch", "broadcast", "gpu", True, True, "peer"),
        ("fetch", "broadcast", "host", False, False, "memory"),
        ("fetch", "broadcast", "", False, False, ""),
        ("h2d", "broadcast", "remote", True, False, "device"),
        ("broadcast", "broadcast", "remote", False, False, "broadcast"),
    ],
)
def test_link_is_that_of_the_stage(
    stage: Any, route: Any, source: Source, gpu: bool, lanes: bool, link: LinkName
) -> None:
    assert link_of(stage, route, source, gpu=gpu, device_lanes=lanes) == link


@pytest.mark.parametrize(
    ("link", "source", "links", "slower"),
    [
        ("broadcast", "host", Links(broadcast=10, network=5), "network"),
        ("broadcast", "host", Links(broadcast=10, network=6, cards=2), "broadcast"),
        ("broadcast", "host", Links(network=5), "network"),
        ("broadcast", "host", Links(broadcast=10), "broadcast"),
        ("p2p", "remote", Links(p2p=10, network=5), "network"),
        ("p2p", "host", Links(p2p=10, network=5), "p2p"),
        ("memory", "host", Links(memory=10, network=5), "memory"),
    ],
)
def test_network_is_the_link_when_its_cards_are_slower_than_what_drives_them(
    link: LinkName, source: Source, links: Links, slower: LinkName
) -> None:
    assert limiting_link(link, source, links) == slower


def test_ranks_share_a_link_unless_each_has_its_own() -> None:
    links = Links(memory=1, disk=2, network=3, broadcast=4, p2p=5, device=6, peer=7, cards=8)
    rates = {
        "memory": 1, "disk": 2, "network": 24, "broadcast": 12, "p2p": 5, "device": 18, "peer": 21,
    }  # fmt: skip
    names: tuple[LinkName, ...] = (
        "memory", "disk", "network", "broadcast", "p2p", "device", "peer",
    )  # fmt: skip
    assert {name: link_rate(links, name, 3) for name in names} == rates
    assert [link_rate(Links(), name, 3) for name in (*names, "")] == [None] * 8

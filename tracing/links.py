"""Which measured link the bytes of a stage took, and what its rate allows. Pure.

The links are those of `Links`, as `weightbus doctor` measures them, and as the cost model of
`consumers/planning` takes them for the same stages.
"""

from __future__ import annotations

from typing import Literal

from weightbus.schemas.base import RouteName, Stage
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import CudaSegment, FileSegment, SharedMemorySegment
from weightbus.schemas.rounds import Links
from weightbus.tracing.waterfall import LinkName

__all__ = ("Source", "limiting_link", "link_of", "link_rate", "source_of")

Source = Literal["files", "host", "gpu", "remote", ""]
"""Where a host finds a version: files, its memory, memory of its GPUs, another host; empty: not
known."""


def source_of(ready: CheckpointReady, host_id: str, *, gpu: bool) -> Source:
    """Where engines of a host find a version; `gpu`: they can read memory of GPUs.

    The nearest way to the first segment stands for all.
    """
    if ready.files:
        return "files"
    ways = ready.placement[0] if ready.placement else ()
    for way in ways:
        if gpu and isinstance(way, CudaSegment) and way.host_id == host_id:
            return "gpu"
        if isinstance(way, SharedMemorySegment) and way.host_id == host_id:
            return "host"
    if any(isinstance(way, FileSegment) for way in ways):
        return "files"
    return "remote" if ways else ""


def link_of(
    stage: Stage, route: RouteName | None, source: Source, *, gpu: bool, device_lanes: bool
) -> LinkName:
    """The link of a stage of one rank; empty: it moves nothing, or it is not known.

    Args:
        gpu: the rank's parameters are in memory of a GPU.
        device_lanes: `device` of the plan: what a broadcast stages lies in memory of GPUs.
    """
    staged = device_lanes and route == "broadcast"
    match stage:
        case "fetch":
            return _link_of_fetch(route, source, staged=staged)
        case "h2d":
            return "device"
        case "broadcast":
            return "broadcast"
        case "reload" if not gpu:
            return "memory"
        case "reload":
            return "peer" if staged or (route == "local" and source == "gpu") else "device"
        case _:
            return ""


def _link_of_fetch(route: RouteName | None, source: Source, *, staged: bool) -> LinkName:
    """Of what is staged on its way."""
    if route == "p2p" or source == "remote":
        return "p2p"
    if source == "files":
        return "disk"
    if staged:  # workers copy into lanes in memory of their GPUs
        return "peer" if source == "gpu" else "device"
    return "memory" if source else ""


def limiting_link(link: LinkName, source: Source, links: Links) -> LinkName:
    """The link itself, or the network if the link crosses it and the cards are slower."""
    if not (link == "broadcast" or (link == "p2p" and source == "remote")):
        return link
    cards, driven = link_rate(links, "network", 1), link_rate(links, link, 1)
    return "network" if cards and (not driven or cards < driven) else link


def link_rate(links: Links, link: LinkName, ranks: int) -> int | None:
    """Bytes per second that `ranks` of one host can reach over a link together; None: not known.

    Every GPU has a link of its own to its host's memory, and to its peers, and receives broadcasts
    by itself; every card has one to the network.
    """
    each: dict[LinkName, int] = {
        "memory": links.memory,
        "device": links.device * ranks,
        "peer": links.peer * ranks,
        "network": links.network * links.cards,
        "broadcast": links.broadcast * ranks,
        "p2p": links.p2p,
        "disk": links.disk,
    }
    return each.get(link) or None

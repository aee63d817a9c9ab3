"""Which link a stage took, and what all that shared it made of its rate."""

from __future__ import annotations

import pytest

from tests.unit.tracing.rounds import MODEL, T0_NS, heard, join, plan, ready, route, stage
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import CudaSegment, RemoteSegment, Segment, SharedMemorySegment
from weightbus.schemas.rounds import Links
from weightbus.tracing.history import build_waterfall
from weightbus.tracing.waterfall import StageRow

GB = 10**9
RATES = Links(
    memory=10 * GB, disk=GB, network=3 * GB, broadcast=4 * GB, p2p=2 * GB, device=50 * GB,
    peer=400 * GB, cards=2,
)  # fmt: skip


def placed(*ways: Segment) -> CheckpointReady:
    return CheckpointReady(
        model=MODEL, version=7, producer="t", layout_digest="0" * 64, placement=(ways,),
        created_ns=T0_NS,
    )  # fmt: skip


SHARED = SharedMemorySegment(name="weightbus-m.0", host_id="host", generation=2)
ON_GPU = CudaSegment(handle=b"h", host_id="host", device_uuid="GPU-1", generation=2)
FAR = RemoteSegment(protocol="tcp", session="far:1", address=0, generation=2)


def rows_of(*messages: Message) -> dict[tuple[str, str, int | None], StageRow]:
    waterfall = build_waterfall(MODEL, "v7", heard(*messages))
    assert waterfall is not None
    return {
        (engine.engine, row.stage, row.rank): row
        for engine in waterfall.engines
        for row in engine.stages
    }


@pytest.mark.parametrize(
    ("version", "device", "stage_name", "taken", "lanes", "link", "share"),
    [
        (placed(SHARED), "cpu", "reload", "local", False, "memory", 0.1),
        (placed(SHARED), "cuda:0", "reload", "local", False, "device", 0.02),
        (placed(ON_GPU, SHARED), "cuda:0", "reload", "local", False, "peer", 0.0025),
        (ready(), "cpu", "fetch", "local", False, "disk", 1.0),
        (placed(FAR), "cpu", "fetch", "p2p", False, "p2p", 0.5),
        (placed(FAR), "cpu", "broadcast", "broadcast", False, "broadcast", 0.25),
        (placed(FAR), "cpu", "reload", "broadcast", False, "memory", 0.1),
        (placed(FAR), "cuda:0", "reload", "broadcast", True, "peer", 0.0025),
        (placed(SHARED), "cuda:0", "fetch", "broadcast", True, "device", 0.02),
    ],
)  # fmt: skip
def test_stage_names_its_link_and_its_share(
    version: CheckpointReady, device: str, stage_name: str, taken: str, lanes: bool, link: str,
    share: float,
) -> None:  # fmt: skip
    """10^9 bytes in one second."""
    row = rows_of(
        version,
        join("a", links=RATES, device=device),
        plan(route("a", taken=taken), device=lanes),  # type: ignore[arg-type]
        stage("a", stage_name, 0, 1000, rank=0, taken=taken, moved_bytes=GB),  # type: ignore[arg-type]
    )[("a", stage_name, 0)]
    assert row.link == link
    assert row.link_share == pytest.approx(share)


def test_link_is_the_network_when_its_cards_are_slower_than_what_drives_them() -> None:
    slow = Links(p2p=2 * GB, network=GB // 4, cards=2, broadcast=GB)
    rows = rows_of(
        placed(FAR),
        join("a", links=slow),
        stage("a", "fetch", 0, 1000, rank=0, taken="p2p", moved_bytes=GB // 4),
        stage("a", "broadcast", 0, 1000, rank=0, taken="broadcast", moved_bytes=GB // 4),
    )
    assert {(row.link, row.link_share) for row in rows.values()} == {("network", 1.0)}


def test_share_counts_all_that_goes_over_the_memory_of_one_host_at_the_same_time() -> None:
    """Rank 0 moves 4 GB/s for 1 s, rank 1 of another engine 2 GB/s for 2 s, the other host's 9."""
    rows = rows_of(
        placed(SHARED),
        *[join(engine, links=RATES) for engine in "ab"],
        join("c", links=RATES, host="far"),
        stage("a", "reload", 0, 1000, rank=0, taken="local", moved_bytes=4 * GB),
        stage("b", "reload", 0, 2000, rank=1, taken="p2p", moved_bytes=4 * GB),
        stage("c", "reload", 0, 1000, rank=0, taken="p2p", moved_bytes=9 * GB),
    )
    assert rows["a", "reload", 0].link_share == pytest.approx(0.6)
    assert rows["b", "reload", 1].link_share == pytest.approx((6 + 2) / 2 / 10)
    assert rows["c", "reload", 0].link_share == pytest.approx(0.9)


def test_share_of_a_gpu_is_its_own() -> None:
    rows = rows_of(
        placed(SHARED),
        join("a", links=RATES, device="cuda:0", ranks=2),
        stage("a", "reload", 0, 1000, rank=0, taken="local", moved_bytes=25 * GB),
        stage("a", "reload", 0, 1000, rank=1, taken="local", moved_bytes=40 * GB),
    )
    assert rows["a", "reload", 0].link_share == pytest.approx(0.5)
    assert rows["a", "reload", 1].link_share == pytest.approx(0.8)


def test_share_is_not_known_when_nothing_was_measured_or_nothing_moved() -> None:
    rows = rows_of(
        placed(SHARED),
        join("a"),
        join("b", links=RATES),
        stage("a", "reload", 0, 1000, rank=0, taken="local", moved_bytes=GB),
        stage("b", "reload", 0, 0, rank=0, taken="local", moved_bytes=GB),
        stage("b", "commit", 0, 10),
        stage("c", "reload", 0, 1000, rank=0, taken="local", moved_bytes=GB),
    )
    assert [rows[key].link_share for key in rows] == [None] * 4
    assert rows["a", "reload", 0].link == "memory"
    assert (rows["b", "commit", None].link, rows["c", "reload", 0].link) == ("", "")

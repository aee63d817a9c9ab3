"""What other engines say of their copies is looked at before it is relied on."""

from __future__ import annotations

import pytest

from weightbus.consumers.transfer.copies import MAX_OFFERS, Copies, with_copies
from weightbus.schemas.checkpoint import CopyReady, CopyRetired
from weightbus.schemas.layout import Layout, SegmentSpec
from weightbus.schemas.placement import (
    FileSegment,
    Placement,
    RemoteSegment,
    SharedMemorySegment,
)
from weightbus.schemas.progress import EngineState

HOST = "host"
DIGEST = "0" * 64
LAYOUT = Layout((), (), (SegmentSpec(8), SegmentSpec(16)))


def far(address: int, generation: int = 2) -> RemoteSegment:
    return RemoteSegment(protocol="tcp", session="h:1", address=address, generation=generation)


def near(name: str, host_id: str = HOST) -> SharedMemorySegment:
    return SharedMemorySegment(name=f"weightbus-copy.{name}", host_id=host_id, generation=2)


WHOLE: Placement = ((near("a"), far(4096)), (near("b"), far(8192)))


def offer(engine: str, placement: Placement = WHOLE, version: int = 1) -> CopyReady:
    return CopyReady(
        model="m", version=version, engine=engine, layout_digest=DIGEST, placement=placement
    )


def heard(*offers: CopyReady) -> Copies:
    copies = Copies("m", "own")
    for copy in offers:
        copies.hear(state(copy.engine))
        copies.hear(copy)
    return copies


def state(engine: str, consumer: str = "one") -> EngineState:
    return EngineState(model="m", engine=engine, consumer=consumer, host_id=HOST, status="serving")


def matching(copies: Copies) -> list[str]:
    return [copy.engine for copy in copies.matching(1, DIGEST, 0, LAYOUT)]


@pytest.mark.parametrize(
    "placement",
    [
        WHOLE[:1],
        (*WHOLE, *WHOLE),
        (),
        ((FileSegment(path="/etc/passwd"),), WHOLE[1]),
        (WHOLE[0], (far(8192, 3),)),
    ],
    ids=["short", "long", "empty", "file", "half written"],
)
def test_copy_is_forgotten_when_it_does_not_fit_the_layout(
    placement: Placement, caplog: pytest.LogCaptureFixture
) -> None:
    copies = heard(offer("bad", placement), offer("good"))
    for _ in range(2):
        assert matching(copies) == ["good"]
    assert caplog.text.count("the copy of engine bad is not read") == 1
    offered = copies.matching(1, DIGEST, 0, LAYOUT)
    assert with_copies(((far(1),), (far(2),)), offered) == (
        (far(1), far(4096)),
        (far(2), far(8192)),
    )


def test_offers_are_bounded() -> None:
    copies = heard(*(offer(f"e{number:04}") for number in range(MAX_OFFERS + 5)))
    assert len(matching(copies)) == MAX_OFFERS
    assert "e0004" not in matching(copies)


def test_own_copy_and_retired_ones_are_not_offered() -> None:
    copies = heard(offer("own"), offer("b"), offer("c", version=2))
    assert matching(copies) == ["b"]
    copies.hear(CopyRetired(model="m", version=1, engine="b"))
    assert matching(copies) == []


def test_copy_goes_with_its_engine_and_with_its_consumer() -> None:
    copies = heard(offer("b"), offer("c"))
    (b, c) = copies.sources(copies.matching(1, DIGEST, 0, LAYOUT), "tcp")
    b.has_answered = c.has_answered = True
    assert b.is_usable()
    copies.lose_engine("b")
    copies.hear(state("c", "one"))
    assert matching(copies) == ["c"]
    copies.hear(state("c", "two"))
    assert matching(copies) == []
    assert not b.is_usable()
    assert not c.is_usable()


def test_copy_is_not_named_before_its_engine_is_present() -> None:
    copies = Copies("m", "own")
    copies.hear(offer("b"))
    assert matching(copies) == []
    copies.hear(state("b"))
    assert matching(copies) == ["b"]


def test_copies_of_this_host_are_those_that_lie_here_whole() -> None:
    elsewhere = ((near("a", "other"),), (near("b", "other"),))
    half = ((near("a"),), (far(4096),))
    copies = heard(offer("b", elsewhere), offer("c"), offer("d", half))
    (here,) = copies.here(copies.matching(1, DIGEST, 0, LAYOUT), HOST)
    assert (here.name, dict(here.ways)) == (
        "the copy of engine c",
        {0: near("a"), 1: near("b")},
    )

"""What is told about a fleet that a file describes: why every route was taken, and why not."""

from __future__ import annotations

import json

import msgspec
import pytest

from weightbus.consumers.planning.choice import seconds_text
from weightbus.consumers.planning.explain import Explanation, Fleet, explain
from weightbus.consumers.planning.shapes import Family
from weightbus.schemas.shared_memory import MAX_READERS

MODEL = (Family(name="model.norm.weight", dtype="U8", shape=(10**9,), count=100),)


def told(*engines: dict[str, object], **source: object) -> Explanation:
    fleet = {"engines": engines, "source": source}
    return explain(MODEL, msgspec.json.decode(json.dumps(fleet), type=Fleet))


def test_broadcast_is_rejected_with_its_own_reason_when_an_engine_is_alone() -> None:
    (part,) = told({"id": "a"}).parts
    assert part.route == "p2p"
    assert part.rejected == {
        "local": "it is not offered",
        "broadcast": "no other engine could share a broadcast",
    }
    assert part.reason.startswith("no other engine could share a broadcast: ")


def test_ranks_and_hosts_are_counted_when_engines_lie_on_several() -> None:
    links = {"network": 10**10, "broadcast": 10**10}
    told_of = told({"id": "a", "count": 4, "tp": 4, "ranks_per_host": 2, "links": links})
    assert {part.route for part in told_of.parts} == {"broadcast"}
    for part in told_of.parts:
        assert part.reason.startswith("16 ranks of 8 hosts share it in 2 lanes: ")
        assert " s, at the pace of the source's " in part.rejected["p2p"]
    crowd = ["h"] * 2
    beside = told({"id": "a", "count": 2, "hosts": crowd})
    assert beside.parts[0].reason.startswith("2 ranks of 1 host share it in 2 lanes: ")


def test_reason_is_of_readers_when_a_host_has_too_many_ranks() -> None:
    part = told({"id": "a", "count": 600, "hosts": ["h"] * 600}).parts[0]
    assert part.rejected["broadcast"] == f"its host has 600 ranks, and a lane {MAX_READERS} readers"


def test_pulling_is_rejected_for_another_s_sake_when_that_can_only_broadcast() -> None:
    parts = told({"id": "a", "count": 3}, {"id": "z", "routes": ["broadcast"]}).parts
    shared = [part for part in parts if part.route == "broadcast"]
    assert "z" in {part.engine for part in shared}
    assert "an engine that offers only broadcast needs it there" in {
        part.rejected["p2p"] for part in shared
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(10_299.7, "10,300 s"), (1000.0, "1,000 s"), (999.4, "999 s"), (0.01234, "0.0123 s")],
)
def test_seconds_are_told_without_an_exponent(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text

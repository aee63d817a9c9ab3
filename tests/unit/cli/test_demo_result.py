"""What the demo makes of its updates."""

from __future__ import annotations

from typing import Any

import pytest

from weightbus.cli.demo.kinds import EngineSpec
from weightbus.cli.demo.result import Result, result_of, verdict
from weightbus.cli.demo.story import Checked
from weightbus.cli.demo.torch_kind import TorchKind
from weightbus.schemas.progress import UpdateComplete

ROUTES = ("broadcast", "local", "p2p")
MISSING = "no transfer engine: libnuma.so.1. To get it: apt-get install libnuma1"


def checked(engine: str, route: Any, version: int = 1, *faults: str) -> Checked:
    update = UpdateComplete(
        model="m",
        version=version,
        round=f"v{version}",
        engine=engine,
        routes=(route,),
        verified="verified",
        weights_digest="0" * 16,
        bytes=1,
        start_ns=1,
        end_ns=2,
        paused_s=0.0,
        trace_id=f"{version}",
    )
    spec = EngineSpec(engine=engine, model="m", kind=TorchKind("minilm"))
    return Checked(spec=spec, update=update, faults=faults)


LOCAL, BROADCAST = checked("a", "local"), checked("b", "broadcast", 2)
PULLED = checked("b", "p2p", 1)


def told(*updates: Checked, dead_letters: int = 0, missing: str = "") -> tuple[Result, str]:
    result = result_of(updates, dead_letters, missing, ROUTES)
    return result, verdict(result)


def test_all_is_well_when_every_route_was_taken_and_nothing_is_wrong() -> None:
    result, line = told(LOCAL, PULLED, BROADCAST)
    assert result.ok
    assert result.routes_used == ("broadcast", "local", "p2p")
    assert (result.versions, result.engines["b"].version) == ((1, 2), 2)
    assert result.engines["b"].routes == ("broadcast", "p2p")
    assert line == "everything was verified: 3 updates, 2 traces, by broadcast, local, p2p"


@pytest.mark.parametrize(
    ("updates", "dead_letters", "said"),
    [
        ((LOCAL, PULLED), 0, "; never taken: broadcast"),
        ((LOCAL, PULLED, checked("b", "broadcast", 2, "it is wrong")), 0, ""),
        ((LOCAL, PULLED, BROADCAST), 1, ""),
    ],
)
def test_it_fails_when_a_route_is_missing_or_something_is_wrong(
    updates: tuple[Checked, ...], dead_letters: int, said: str
) -> None:
    result, line = told(*updates, dead_letters=dead_letters)
    assert not result.ok
    assert line.startswith("NOT EVERYTHING WAS VERIFIED: ")
    assert line.endswith(said)


def test_local_alone_will_do_and_is_explained_when_there_is_no_transfer_engine() -> None:
    result, line = told(LOCAL, missing=MISSING)
    assert result.ok
    assert line == f"everything was verified: 1 update, 1 trace, by local ALONE: {MISSING}"
    assert not told(checked("a", "local", 1, "it is wrong"), missing=MISSING)[0].ok

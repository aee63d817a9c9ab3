"""What a round machine's request says of the version's origin reaches the plan."""

from __future__ import annotations

import re

import pytest
from msgspec import structs

from tests.unit.consumers.machines import ready
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planner import plan_request
from weightbus.consumers.planning.source import SourceMemory
from weightbus.consumers.round.config import Origin, PlanRequest
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Budgets, Join, Links, RankOffer

LINKS = Links(memory=10**11, disk=10**8, network=10**9, broadcast=10**9, p2p=10**9)
NEED_BYTES = 10**9


def join(engine: str, *routes: RouteName) -> Join:
    return Join(
        model="m",
        version=1,
        round="v1",
        engine=engine,
        consumer=f"{engine}-1",
        host_id=f"host-{engine}",
        ranks=(RankOffer(rank=0, needs_digest="0" * 64, need_bytes=NEED_BYTES, routes=routes),),
        links=LINKS,
        rendezvous=f"tcp://host-{engine}:1",
    )


def request(origin: Origin, *joins: Join) -> PlanRequest:
    return PlanRequest(
        joins=joins,
        origin=origin,
        ready=structs.replace(ready(1), created_ns=7),
        round="v1",
        epoch=3,
        leader=joins[0].engine,
        late=False,
        commit="each",
        budgets=Budgets(transfer_s=1.0),
        now_ns=9,
    )


def test_plan_is_of_the_request() -> None:
    plan = plan_request(request(Origin(), join("a", "p2p")))
    assert (plan.round, plan.epoch, plan.leader, plan.checkpoint_ns) == ("v1", 3, "a", 7)


def test_whole_layout_is_counted_when_an_engine_takes_a_part_of_it() -> None:
    joins = [join("a", "p2p"), join("b", "p2p")]
    least = plan_request(request(Origin(), *joins)).budgets.transfer_s
    whole = plan_request(request(Origin(layout_bytes=50 * NEED_BYTES), *joins)).budgets.transfer_s
    assert whole > 40 * least > 40


@pytest.mark.parametrize(("hosts", "route"), [(1, "broadcast"), (16, "p2p")])
def test_route_depends_on_how_many_hosts_offer_the_version(hosts: int, route: str) -> None:
    """One source's network is shared by all who pull; sixteen serve each his own."""
    joins = [
        structs.replace(join(f"e{n:02}", "broadcast", "p2p"), links=SLOW_BROADCAST)
        for n in range(16)
    ]
    origin = Origin(layout_bytes=20 * NEED_BYTES, hosts=hosts)
    plan = plan_request(request(origin, *joins))
    assert {part.ranks[0].route for part in plan.engines} == {route}


SLOW_BROADCAST = structs.replace(LINKS, broadcast=LINKS.p2p // 4)


def test_local_is_predicted_by_the_disk_when_the_version_lies_in_files() -> None:
    (memory, files) = (
        plan_request(request(Origin(files=files), join("a", "local"))).engines[0].ranks[0].reason
        for files in (False, True)
    )
    assert re.search(r": 10(\.0)? s", files), files
    assert memory != files


@pytest.mark.parametrize(("memory", "route"), [("host", "broadcast"), ("gpus", "local")])
def test_replicas_share_what_lies_in_memory_of_their_host(
    memory: SourceMemory, route: RouteName
) -> None:
    offer = RankOffer(
        rank=0,
        device="cuda:0",
        needs_digest="0" * 64,
        need_bytes=50 * NEED_BYTES,
        routes=("local", "broadcast"),
    )
    joins = [structs.replace(join(engine), host_id="h", ranks=(offer,)) for engine in "ab"]
    plan = plan_request(request(Origin(memory=memory), *joins))
    assert {part.ranks[0].route for part in plan.engines} == {route}
    assert plan.device == (route == "broadcast")


def test_every_reason_is_given_when_nobody_can_be_planned_for() -> None:
    with pytest.raises(PlanError, match=r"no engine can be planned for: a: .*; b: ") as raised:
        plan_request(request(Origin(), join("a", "broadcast"), join("b")))
    assert raised.value.thing == "round"

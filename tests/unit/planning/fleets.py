"""Fleets for tests of plans: what engines would say when they join."""

from __future__ import annotations

from hypothesis import strategies as st

from weightbus.consumers.planning.routes import PlanLimits, PlanSource, RoundDecision, plan_round
from weightbus.consumers.planning.staging import (
    MIB,
)
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Join, Links, RankOffer, RoundPlan

GB = 10**9


def offer(
    rank: int,
    *routes: RouteName,
    needs: str = "a",
    need_bytes: int = 1000,
    free_bytes: int = 0,
    device_bytes: int = 0,
    device: str = "cpu",
) -> RankOffer:
    return RankOffer(
        rank=rank,
        device=device,
        needs_digest=needs * 64,
        need_bytes=need_bytes,
        free_bytes=free_bytes,
        device_bytes=device_bytes,
        routes=routes,
    )


def join(
    engine: str,
    *ranks: RankOffer,
    host: str = "host",
    joined_ns: int = 0,
    rendezvous: str | None = None,
    groups: tuple[str, ...] = (),
    broken_epoch: int = 0,
    consumer: str = "c",
    links: Links | None = None,
) -> Join:
    return Join(
        model="m",
        version=7,
        round="r",
        engine=engine,
        consumer=consumer,
        host_id=host,
        ranks=ranks,
        links=links or Links(),
        rendezvous=f"tcp://{host}:1" if rendezvous is None else rendezvous,
        groups=groups,
        broken_epoch=broken_epoch,
        joined_ns=joined_ns,
    )


def remote(engine: str, host: str, ranks: int = 1, **fields: object) -> Join:
    """An engine that offers both staged routes."""
    offers = [offer(rank, "broadcast", "p2p") for rank in range(ranks)]
    return join(engine, *offers, host=host, **fields)  # type: ignore[arg-type]


def decide(
    *joins: Join,
    late: bool = False,
    limits: PlanLimits | None = None,
    epoch: int = 3,
    source: PlanSource | None = None,
) -> RoundDecision:
    return plan_round(
        joins,
        version=7,
        round_id="r",
        epoch=epoch,
        leader="lead",
        now_ns=11,
        late=late,
        limits=limits or PlanLimits(),
        source=source or PlanSource(),
    )


def planned(decision: RoundDecision) -> RoundPlan:
    assert decision.plan is not None, decision.refused
    return decision.plan


def routes_of(decision: RoundDecision) -> dict[str, RouteName]:
    if decision.plan is None:
        return {}
    return {part.engine: part.ranks[0].route for part in decision.plan.engines}


def reason_of(decision: RoundDecision, engine: str) -> str:
    (part,) = (part for part in planned(decision).engines if part.engine == engine)
    return part.ranks[0].reason


def members_of(decision: RoundDecision) -> list[list[tuple[str, int]]]:
    return [
        [(member.engine, member.rank) for member in group.members]
        for group in planned(decision).groups
    ]


ROUTES: tuple[RouteName, ...] = ("local", "broadcast", "p2p")


rates = st.sampled_from([0, 10**6, 10**9, 10**12])


@st.composite
def many_joins(draw: st.DrawFn) -> list[Join]:
    joins = []
    for number in range(draw(st.integers(1, 6))):
        some = draw(st.lists(st.sampled_from(ROUTES), unique=True))
        ranks = [
            offer(
                rank,
                *(draw(st.lists(st.sampled_from(ROUTES), unique=True)) if odd else some),
                needs=draw(st.sampled_from("ab")),
                free_bytes=draw(st.just(0) | st.integers(0, 2**20) | st.integers(0, 2**36)),
                need_bytes=draw(st.integers(0, 2**44)),
                device=draw(st.sampled_from(["cpu", "cuda:0"])),
            )
            for odd in [draw(st.integers(0, 4)) == 0]
            for rank in range(draw(st.integers(1, 4)))
        ]
        joins.append(
            join(
                f"e{number}",
                *ranks,
                host=draw(st.sampled_from(["h1", "h2", "h3"])),
                rendezvous=draw(st.sampled_from(["tcp://h:1", "tcp://h:1", ""])),
                links=draw(st.builds(Links, network=rates, broadcast=rates, p2p=rates)),
            )
        )
    return joins


def large(engine: str, host: str, **links: int) -> Join:
    offers = [offer(rank, "broadcast", "p2p", need_bytes=50 * GB) for rank in range(2)]
    return join(engine, *offers, host=host, links=Links(**links))


def roomy(engine: str, host: str, *free_mib: int, device: str = "cpu") -> Join:
    ranks = [
        offer(rank, "broadcast", "p2p", free_bytes=free * MIB, device=device)
        for rank, free in enumerate(free_mib)
    ]
    return join(engine, *ranks, host=host)

"""A driver for one round machine, by hand: what it is told, and what it wants done."""

from __future__ import annotations

from typing import TypeVar

from msgspec import structs

from weightbus.consumers.errors import PlanError
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.config import Planner, PlanRequest, RoundConfig
from weightbus.consumers.round.leader import Leadership
from weightbus.consumers.round.machine import RoundMachine
from weightbus.consumers.round.member import Member
from weightbus.schemas.base import RouteName
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import EngineState, EngineStatus
from weightbus.schemas.rounds import EngineRoute, Join, RankOffer, RankRoute, RoundPlan

__all__ = ("Driver", "join", "make_plan", "offer", "plan_of", "ready", "state")

NS_PER_S = 1_000_000_000
Order = TypeVar("Order")


def ready(version: int, created_ns: int = 0) -> CheckpointReady:
    return CheckpointReady(
        model="m",
        version=version,
        producer="t",
        layout_digest="0" * 64,
        created_ns=created_ns or version + 1,
    )


def offer(*routes: RouteName, rank: int = 0) -> RankOffer:
    return RankOffer(
        rank=rank,
        needs_digest="a" * 64,
        need_bytes=1,
        free_bytes=2**30,
        routes=routes or ("local",),
    )


def join(
    engine: str,
    version: int,
    *,
    consumer: str = "",
    broken_epoch: int = 0,
    route: RouteName = "local",
) -> Join:
    return Join(
        model="m",
        version=version,
        round=f"v{version}",
        engine=engine,
        consumer=consumer or f"{engine}-1",
        host_id="h",
        ranks=(offer(route),),
        checkpoint_ns=version + 1,
        broken_epoch=broken_epoch,
    )


def state(
    engine: str,
    *,
    version: int = -1,
    target: int = -1,
    status: EngineStatus = "serving",
    consumer: str = "",
) -> EngineState:
    return EngineState(
        model="m",
        engine=engine,
        consumer=consumer or f"{engine}-1",
        host_id="h",
        status=status,
        version=version,
        target_version=target,
    )


def plan_of(
    version: int,
    routes: dict[str, RouteName],
    *,
    epoch: int = 1,
    round: str = "",
    together: bool = False,
) -> RoundPlan:
    """A plan that sends every engine of `routes`, of one rank each, its way."""
    return RoundPlan(
        model="m",
        version=version,
        round=round or f"v{version}",
        epoch=epoch,
        leader=min(routes),
        engines=tuple(
            EngineRoute(engine=engine, ranks=(RankRoute(rank=0, route=route),))
            for engine, route in sorted(routes.items())
        ),
        commit="together" if together else "each",
        checkpoint_ns=version + 1,
    )


def make_plan(request: PlanRequest) -> RoundPlan:
    """Every engine goes the first way that it offers; `broadcast` alone is no way."""
    routes: dict[str, RouteName] = {}
    for joined in request.joins:
        offered = joined.ranks[0].routes
        if request.late and offered[0] == "broadcast":
            raise PlanError("round", request.round, "broadcast needs two engines")
        routes[joined.engine] = offered[0]
    plan = plan_of(
        request.ready.version,
        routes,
        epoch=request.epoch,
        round=request.round,
        together=request.commit == "together",
    )
    return structs.replace(plan, checkpoint_ns=request.ready.created_ns)


class Driver:
    """Feeds the machine of engine `a`."""

    def __init__(self, **config: object) -> None:
        settings = {"model": "m", "engine": "a", "consumer": "a-1", "host_id": "h", **config}
        self.config = RoundConfig(**settings)  # type: ignore[arg-type]
        self.planner: Planner = make_plan
        """May be replaced."""
        self.machine = RoundMachine(self.config, lambda request: self.planner(request))
        self.now_ns = 1_000 * NS_PER_S
        self.orders: list[do.Instruction] = []
        """Everything that was wanted, in order."""

    @property
    def member(self) -> Member:
        return self.machine.member

    def leadership(self, version: int) -> Leadership:
        return self.machine.rounds.known[f"v{version}"]

    def feed(self, event: ev.Event, after_s: float = 0.0) -> tuple[do.Instruction, ...]:
        """What the machine wants done about `event`, `after_s` after the last one."""
        self.now_ns += round(after_s * NS_PER_S)
        orders = self.machine.handle(event, self.now_ns)
        self.orders.extend(orders)
        return orders

    def fire(self, name: str) -> tuple[do.Instruction, ...]:
        """Let the timer `name` fire when it is due."""
        timer = self.last(do.SetTimer, name)
        self.now_ns = max(self.now_ns, timer.at_ns)
        return self.feed(ev.TimerFired(name, timer.token))

    def last(self, kind: type[Order], name: str | None = None) -> Order:
        """The last instruction of a kind."""
        for order in reversed(self.orders):
            if isinstance(order, kind) and name in (None, getattr(order, "name", None)):
                return order
        raise AssertionError(f"no {kind.__name__} {name or ''} was wanted")

    def count(self, kind: type[do.Instruction]) -> int:
        return sum(isinstance(order, kind) for order in self.orders)

    def said(self, kind: type[Order]) -> list[Order]:
        """Messages of a kind, in order."""
        return [
            order.message
            for order in self.orders
            if isinstance(order, do.Send) and isinstance(order.message, kind)
        ]

    # Ways to a phase.

    def start(self, served: int = -1, *, touched: bool = False) -> Driver:
        self.feed(ev.Started(served, touched))
        return self

    def see(self, version: int, created_ns: int = 0) -> Driver:
        self.feed(ev.CheckpointSeen(ready(version, created_ns), "f" * 32))
        return self

    def prepared(self, *routes: RouteName, planned: RoundPlan | None = None) -> Driver:
        token = self.last(do.Prepare).token
        self.feed(ev.Prepared(token, (offer(*routes),), planned, "0" * 64))
        return self

    def joined(self, version: int, *routes: RouteName) -> Driver:
        """In the phase `JOINING`."""
        return self.see(version).prepared(*routes)

    def planned(self, plan: RoundPlan) -> Driver:
        self.feed(ev.PlanSeen(plan))
        return self

    def transferred(self) -> Driver:
        token = self.last(do.Transfer).token
        self.feed(ev.TransferDone(token, "verified", ("local",), bytes=7))
        return self

    def failed(self, cause: str, *, touched: bool) -> Driver:
        token = self.last(do.Transfer).token
        self.feed(ev.TransferFailed(token, cause, "the reason", touched, "reload"))
        return self

    def resumed(self) -> Driver:
        self.feed(ev.Resumed(self.last(do.Resume).token, 0.5))
        return self

"""Which way the bytes take to every engine of a round. Pure: decides, moves nothing.

The plan depends on nothing but the arguments, in whatever order the joins came:

- `local` wherever all ranks of an engine offer it: nothing comes by the network, and nobody is
  waited for; but for replicas on GPUs of one host, that read memory of it: they take `broadcast`
  where that is much faster, since each of their links then brings a part of what all need;
- of the others, those that offer `broadcast` and could share one take it together, all or those of
  the fastest hosts, or each `p2p`: whatever is predicted to be faster (`choice.py`, `cost.py`). If
  they are about as fast it is `broadcast` from two engines on, since the source then sends
  everything once;
- `p2p` for whoever is alone, comes late (its peers are not disturbed), cannot stream yet, would
  hold up the others, or has no memory for its lanes of a broadcast.

All ranks of an engine take one route. An engine is planned whole or not at all: if no route is left
for it, it is refused, and the others are planned without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct, field, structs

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.choice import Choice, Outcome
from weightbus.consumers.planning.cost import RouteCost
from weightbus.consumers.planning.limits import PlanLimits
from weightbus.consumers.planning.source import PlanSource
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import (
    Budgets,
    CommitPolicy,
    EngineRoute,
    Join,
    RankRoute,
    RoundPlan,
)

__all__ = ("DEFAULT_PLAN_LIMITS", "PlanLimits", "RoundDecision", "PlanSource", "plan_round")

_LONGEST_S: Final = 86_400.0
"""The longest duration that a plan can hold: one day."""

_REASON_CHARS: Final = 512
"""What a plan holds of a reason."""


DEFAULT_BUDGETS = Budgets()
DEFAULT_PLAN_LIMITS = PlanLimits()
DEFAULT_SOURCE = PlanSource()


class RoundDecision(Struct, frozen=True, kw_only=True):
    """A plan, what it costs, and who has no part in it."""

    plan: RoundPlan | None
    """None: every engine was refused."""
    refused: dict[str, str]
    """Engine id -> why it cannot take part, in order of the ids."""
    costs: dict[str, RouteCost] = field(default_factory=dict)
    """Engine id -> what its route is predicted to cost."""
    others: dict[str, RouteCost] = field(default_factory=dict)
    """Engine id -> what the other route would have cost, where there was a choice: alone, or
    together with all others; of replicas, in place, or together with those of their host."""
    apart: dict[str, str] = field(default_factory=dict)
    """Engine id -> why it could take no broadcast."""


def plan_round(
    joins: Sequence[Join],
    *,
    version: int,
    round_id: str,
    epoch: int,
    leader: str,
    now_ns: int,
    late: bool = False,
    commit: CommitPolicy = "each",
    budgets: Budgets = DEFAULT_BUDGETS,
    limits: PlanLimits = DEFAULT_PLAN_LIMITS,
    source: PlanSource = DEFAULT_SOURCE,
) -> RoundDecision:
    """Assign every engine that joined a route which all its ranks offer.

    Args:
        joins: one or more; if one engine joined several times, its latest counts.
        leader: engine id of the round's leader.
        now_ns: goes into the plan; nothing depends on it.
        late: the engines must disturb no peer: `local` or `p2p` only.
        budgets: deadlines of the plan; those of the transfer grow with the bytes to be moved.

    Raises:
        PlanError: there is no join, or one is of another model, version or round.
    """
    choice = Choice(_latest(joins, version, round_id), epoch, late, limits, source)
    settled = choice.settle()
    refused = {engine: choice.refused[engine] for engine in sorted(choice.refused)}
    if settled is None:
        return RoundDecision(plan=None, refused=refused)
    outcome = settled.outcome
    plan = RoundPlan(
        model=joins[0].model,
        version=version,
        round=round_id,
        epoch=epoch,
        leader=leader,
        engines=tuple(
            _engine_route(join, outcome.routes[engine], settled.reasons[engine])
            for engine, join in choice.joins.items()
        ),
        groups=outcome.groups,
        bucket_bytes=outcome.staging.bucket_bytes,
        slots=outcome.staging.slots,
        device=outcome.device,
        budgets=_scaled(budgets, choice.joins, outcome, limits),
        commit=commit,
        created_ns=now_ns,
    )
    return RoundDecision(
        plan=plan,
        refused=refused,
        costs=outcome.costs,
        others=settled.others,
        apart=choice.sharing.apart,
    )


def _latest(joins: Sequence[Join], version: int, round_id: str) -> dict[str, Join]:
    """The join that counts of every engine, in order of the ids."""
    if not joins:
        raise PlanError("round", f"{round_id} without a join", "at least one engine must join")
    expected = (joins[0].model, version, round_id)
    latest: dict[str, Join] = {}
    for join in joins:
        found = (join.model, join.version, join.round)
        if found != expected:
            raise PlanError(f"join of engine {join.engine}", found, f"must be of {expected}")
        known = latest.get(join.engine)
        if known is None or join.joined_ns >= known.joined_ns:
            latest[join.engine] = join
    return dict(sorted(latest.items()))


def _engine_route(join: Join, route: RouteName, reason: str) -> EngineRoute:
    """The reason is said once, of the first rank: a plan of thousands of ranks is one message."""
    numbers = sorted(offer.rank for offer in join.ranks)
    return EngineRoute(
        engine=join.engine,
        ranks=tuple(
            RankRoute(rank=rank, route=route, reason="" if n else reason[:_REASON_CHARS])
            for n, rank in enumerate(numbers)
        ),
    )


def _scaled(
    budgets: Budgets, joins: Mapping[str, Join], outcome: Outcome, limits: PlanLimits
) -> Budgets:
    """Deadlines that a host which moves its bytes at the slowest rate still meets, and that leave
    room beyond what is predicted."""
    of_host: dict[str, int] = {}
    for engine, join in joins.items():
        moved = sum(offer.need_bytes for offer in join.ranks)
        if outcome.routes[engine] != "local":
            moved = max(moved, outcome.layout_bytes)
        of_host[join.host_id] = of_host.get(join.host_id, 0) + moved
    slowest_s = max(of_host.values()) / limits.slowest_bytes_per_s
    predicted_s = max(cost.seconds for cost in outcome.costs.values())
    transfer_s = max(budgets.transfer_s, slowest_s, predicted_s * limits.predicted_times)
    transfer_s = min(transfer_s, _LONGEST_S)
    whole_s = budgets.prepare_s + transfer_s + budgets.commit_s
    round_s = min(max(budgets.round_s, whole_s), _LONGEST_S)
    return structs.replace(budgets, transfer_s=transfer_s, round_s=round_s)

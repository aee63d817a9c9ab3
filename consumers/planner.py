"""The planner that a service gives to its round machine: `plan_round`, or one clear error. Pure."""

from __future__ import annotations

from msgspec import structs

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.routes import plan_round
from weightbus.consumers.planning.source import PlanSource
from weightbus.consumers.round.config import PlanRequest
from weightbus.schemas.rounds import RoundPlan

__all__ = ("plan_request",)


def plan_request(request: PlanRequest) -> RoundPlan:
    """Plan for the engines that can be reached; who is left out goes on alone and meets the reason.

    Raises:
        PlanError: no engine can be reached by any route.
    """
    origin = request.origin
    decision = plan_round(
        request.joins,
        version=request.ready.version,
        round_id=request.round,
        epoch=request.epoch,
        leader=request.leader,
        now_ns=request.now_ns,
        late=request.late,
        commit=request.commit,
        budgets=request.budgets,
        source=PlanSource(
            hosts=origin.hosts,
            layout_bytes=origin.layout_bytes,
            files=origin.files,
            memory=origin.memory,
        ),
    )
    if decision.plan is None:
        reasons = "; ".join(f"{engine}: {reason}" for engine, reason in decision.refused.items())
        raise PlanError("round", request.round, f"no engine can be planned for: {reasons}")
    return structs.replace(decision.plan, checkpoint_ns=request.ready.created_ns)

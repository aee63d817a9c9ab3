"""Who takes part in one round, and how each of them fares. Pure bookkeeping, does no I/O.

Every engine of a round keeps it from the first word on, because it may have to lead later. What was
lost on the way, presence tells: who serves the version, who went on, who is gone.
"""

from __future__ import annotations

from weightbus.consumers.round.work import REASON_CHARS, concerns, in_group
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import EngineState, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join, RoundPlan

__all__ = ("MAX_ENGINES", "Roll")

MAX_ENGINES = 4096
"""What a plan can name."""
GONE = "its consumer is gone"
"""Why a member that left presence does not serve the version."""


class Roll:
    """The engines of one round, by their ids."""

    def __init__(self, version: int) -> None:
        self.plan: RoundPlan | None = None
        """The plan of the latest epoch that is known."""
        self.members: set[str] = set()
        """Every engine that any plan of the round names."""
        self.joins: dict[str, Join] = {}
        self.reports: dict[str, UpdateComplete | UpdateFailed] = {}
        self.alone: set[str] = set()
        """Engines that go for the version in a round of their own."""
        self.proven: set[str] = set()
        self._version = version
        self._serving: set[str] = set()
        """Engines whose presence says that they serve the version, or a later one."""
        self._lost: dict[str, str] = {}
        """Engine id -> why it will not report."""

    # What is heard.

    def keep_join(self, join: Join) -> None:
        """The last join of an engine counts; an old one that comes late does not."""
        known = self.joins.get(join.engine)
        if known is None and len(self.joins) >= MAX_ENGINES:
            return
        if (
            known is None
            or known.consumer != join.consumer
            or known.broken_epoch <= join.broken_epoch
        ):
            self.joins[join.engine] = join
        if join.engine not in self.members:
            self._lost.pop(join.engine, None)

    def keep_plan(self, plan: RoundPlan) -> bool:
        """Whether it is the latest plan now."""
        self.members.update(part.engine for part in plan.engines)
        if self.plan is not None and plan.epoch <= self.plan.epoch:
            return False
        self.plan = plan
        return True

    def keep_report(self, update: UpdateComplete | UpdateFailed) -> None:
        """The last report of an engine counts; but once complete, complete."""
        if not isinstance(self.reports.get(update.engine), UpdateComplete):
            self.reports[update.engine] = update

    def keep_state(self, state: EngineState) -> None:
        """Presence tells what a lost report would have told, and who has left the round."""
        join = self.joins.get(state.engine)
        if state.version >= self._version:
            self._serving.add(state.engine)
        elif state.target_version > self._version:
            self._lost[state.engine] = f"it went on to version {state.target_version}"
        elif state.status == "stopping":
            self._lost[state.engine] = "it is stopping"
        elif join is not None and join.consumer != state.consumer:
            self._lost[state.engine] = "its consumer was started again"
        elif self._lost.get(state.engine) == GONE:
            del self._lost[state.engine]

    def keep_loss(self, engine: str) -> None:
        """An engine has left presence; it may come back."""
        self._lost[engine] = GONE

    # How an engine fares.

    def completed(self, engine: str) -> bool:
        return engine in self._serving or isinstance(self.reports.get(engine), UpdateComplete)

    def settled(self, engine: str) -> bool:
        """Whether nothing more is to be heard from an engine."""
        return engine in self.reports or engine in self._lost or engine in self._serving

    def gave_up(self, engine: str) -> bool:
        """Whether an engine will not get the version in this round."""
        return not self.completed(engine) and (
            engine in self._lost or engine in self.reports or engine in self.alone
        )

    def broke(self, engine: str) -> bool:
        """Whether an engine has said that the group of the current plan broke."""
        join, plan = self.joins.get(engine), self.plan
        return join is not None and plan is not None and join.broken_epoch >= plan.epoch > 0

    def why(self, engine: str) -> str:
        """Why an engine does not serve the version; empty: not known."""
        report = self.reports.get(engine)
        if isinstance(report, UpdateFailed):
            return f"{report.cause}: {report.reason}"[:REASON_CHARS]
        return self._lost.get(engine, "")

    # Who.

    def candidates(self, ready: CheckpointReady) -> dict[str, Join]:
        """The joins for this very checkpoint of engines that are still there, in order."""
        return {
            engine: join
            for engine, join in sorted(self.joins.items())
            if engine not in self._lost and concerns(join, ready)
        }

    def waited_for(self) -> set[str]:
        """Members that have not been heard from to the end."""
        return {engine for engine in self.members if not self.settled(engine)}

    def group(self) -> list[str]:
        """Engines of the current plan that depend on each other."""
        plan = self.plan
        return [] if plan is None else [part.engine for part in plan.engines if in_group(part)]

    def rest_of_group(self) -> list[str]:
        """Those of the group that still have to get the version."""
        return [
            engine
            for engine in self.group()
            if not (self.settled(engine) or engine in self.alone or engine in self.proven)
        ]

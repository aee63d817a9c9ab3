"""The version in hand, its rounds, and what an engine says about it. Does no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from weightbus.consumers.round.config import Origin, RoundConfig
from weightbus.consumers.round.events import TransferDone
from weightbus.consumers.round.versions import Candidate
from weightbus.schemas.base import Stage
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import EngineRoute, Join, Proven, RankOffer, RoundComplete, RoundPlan

__all__ = (
    "CAUSE_CHARS",
    "NO_VERSION",
    "REASON_CHARS",
    "Work",
    "concerns",
    "in_group",
    "main_round",
    "solo_round",
)

NO_VERSION = -1
"""In messages and events: none."""
TOKEN_CHARS = 64
"""What a round's id may have."""
CAUSE_CHARS = 128
REASON_CHARS = 4096
"""What messages hold of an error."""
MOST_PAUSED_S = 86_400.0
"""What they hold of a pause, which may have begun by another reading of the clock."""


def main_round(version: int) -> str:
    """Id of the round that brings `version` to all engines that are present."""
    return f"v{version}"


def solo_round(version: int, config: RoundConfig, number: int) -> str:
    """Id of a round of one engine alone: no other has it, also not one of an earlier consumer."""
    head, tail = f"{main_round(version)}-", f"-{config.consumer[-6:]}-{number}"
    return head + config.engine[: TOKEN_CHARS - len(head) - len(tail)] + tail


def concerns(message: Join | RoundPlan, ready: CheckpointReady) -> bool:
    """Whether a message is about this very checkpoint; a version may be published again.

    A sender that does not tell (0) is believed.
    """
    return message.checkpoint_ns in (0, ready.created_ns)


def in_group(part: EngineRoute) -> bool:
    """Whether some rank of an engine depends on other engines."""
    return any(rank.route == "broadcast" for rank in part.ranks)


@dataclass
class Work:
    """One attempt to bring one version to this engine."""

    config: RoundConfig
    candidate: Candidate
    start_ns: int
    """When it was heard that the version can be had, or when the attempt began if it is not the
    first one."""
    round: str
    token: int
    """Of the instruction that was given last: `Prepare`, `Transfer` or `Resume`."""
    prepared: bool = False
    """`Prepare` was answered, whatever the answer."""
    offers: tuple[RankOffer, ...] = ()
    layout_digest: str | None = None
    rendezvous: str = ""
    """Where a group meets that this engine is the first member of."""
    groups: tuple[str, ...] = ()
    """Ids of the groups that are ready."""
    origin: Origin = field(default_factory=Origin)
    alone: bool = False
    """In a round of this engine's own."""
    plan: RoundPlan | None = None
    """The plan that is run, or was run last."""
    latest: RoundPlan | None = None
    """A plan of a later epoch, heard while `plan` was run."""
    aborted_epoch: int = -1
    """The latest epoch of which an `Abort` was heard."""
    broken_epoch: int = 0
    """Epoch of the last plan whose group broke; 0: none did."""
    runs: int = 0
    """How many plans were run."""
    repeats: int = 0
    """How often the same thing was said while waiting."""
    done: TransferDone | None = None
    """The proof."""
    doubted_ns: int = 0
    """Since when requests have waited, if `Resume` failed."""

    @property
    def version(self) -> int:
        return self.candidate.version

    @property
    def epoch(self) -> int:
        """Of the latest plan heard; -1: none."""
        plan = self.latest or self.plan
        return -1 if plan is None else plan.epoch

    @property
    def running(self) -> RoundPlan:
        """The plan that is run, or was run last."""
        assert self.plan is not None, "a transfer has a plan, and a proof has had one"
        return self.plan

    @property
    def depends(self) -> bool:
        """Whether the plan that is run makes this engine depend on others."""
        part = None if self.plan is None else self.part_of(self.plan)
        return part is not None and in_group(part)

    def part_of(self, plan: RoundPlan) -> EngineRoute | None:
        """What this engine does in a plan; None: it is not named."""
        return next((part for part in plan.engines if part.engine == self.config.engine), None)

    def awaits(self, plan: RoundPlan) -> bool:
        """Whether a plan is of the round in hand, and of a later epoch than all before."""
        ours = plan.round == self.round and concerns(plan, self.candidate.ready)
        return ours and plan.epoch > self.epoch

    def ended_by(self, complete: RoundComplete) -> bool:
        """Whether a leader that knows the plan in hand, if there is one, has closed its round."""
        return complete.round == self.round and complete.epoch >= self.epoch

    def join(self, served_version: int, now_ns: int) -> Join:
        return Join(
            model=self.config.model,
            version=self.version,
            round=self.round,
            engine=self.config.engine,
            consumer=self.config.consumer,
            host_id=self.config.host_id,
            ranks=self.offers,
            served_version=served_version,
            links=self.config.links,
            rendezvous=self.rendezvous,
            groups=() if self.broken_epoch else self.groups,
            checkpoint_ns=self.candidate.ready.created_ns,
            layout_digest=self.layout_digest,
            broken_epoch=self.broken_epoch,
            joined_ns=now_ns,
        )

    def proven(self) -> Proven:
        return Proven(
            model=self.config.model,
            version=self.version,
            round=self.round,
            epoch=self.running.epoch,
            engine=self.config.engine,
        )

    def complete(self, paused_s: float, now_ns: int) -> UpdateComplete:
        done = self.done
        assert done is not None, "only a proof leads to serving"
        return UpdateComplete(
            model=self.config.model,
            version=self.version,
            round=self.round,
            engine=self.config.engine,
            verified=done.verified,
            weights_digest=done.weights_digest,
            routes=done.routes,
            bytes=done.bytes,
            start_ns=min(self.start_ns, now_ns),
            end_ns=now_ns,
            paused_s=min(max(0.0, paused_s), MOST_PAUSED_S),
            direct_parameters=done.direct_parameters,
            processed_parameters=done.processed_parameters,
            reason=done.reason,
            trace_id=self.candidate.trace_id,
        )

    def failed(
        self,
        cause: str,
        reason: str,
        stage: Stage | None,
        *,
        served_version: int,
        quarantined: bool,
        now_ns: int,
    ) -> UpdateFailed:
        return UpdateFailed(
            model=self.config.model,
            version=self.version,
            round=self.round,
            engine=self.config.engine,
            cause=cause[:CAUSE_CHARS],
            reason=reason[:REASON_CHARS],
            stage=stage,
            served_version=served_version,
            quarantined=quarantined,
            start_ns=min(self.start_ns, now_ns),
            end_ns=now_ns,
            trace_id=self.candidate.trace_id,
        )

    def end_alone(self, failure: str, now_ns: int) -> RoundComplete | None:
        """The closing word on a round of this engine's own, if it is one and got as far as a plan.

        Args:
            failure: why the engine does not serve the version; empty: it does.
        """
        if self.plan is None or not self.alone:
            return None
        engine = self.config.engine
        return RoundComplete(
            model=self.config.model,
            version=self.version,
            round=self.round,
            epoch=self.plan.epoch,
            leader=engine,
            completed=() if failure else (engine,),
            failed={engine: failure[:REASON_CHARS]} if failure else {},
            layout_digest=self.layout_digest,
            bytes=0 if self.done is None else self.done.bytes,
            engines=1,
            started_ns=self.plan.created_ns,
            ended_ns=now_ns,
            trace_id=self.candidate.trace_id,
        )

"""Everything that affects a transition of the round machine: phases, rules and two tables.

Does no I/O. A table says which handler takes which event (or timer) in which phase. A pair that is
not in it must not happen: it raises.

**The member's half**, one per engine (`member.py`):

- `NEW`: before `Started`.
- `IDLE`: nothing in hand; serves a version, or none yet. `QUARANTINED`: the same with an engine
  that must not serve, because its parameters may be a mix. In both a retry may be set.
- `PREPARING`: the driver gets layout, needs, routes and a reader lease for a version.
- `JOINING`: says `Join`, again and again; waits for a plan.
- `TRANSFERRING`: runs a plan. `CANCELLING`: has asked the driver to end the transfer.
- `REPLANNING`: its broadcast group broke; says `Join` again, waits for the plan of a later epoch.
- `PROVEN`: under `together`: holds the version, proven; says `Proven`, waits for `Commit`.
- `RESUMING`: the engine is told to serve.
- `STOPPED`: the service has ended.

**The leader's half**, one per round that an engine has heard of, since any of them may have to lead
(`leader.py`):

- `HEARD`: others have joined or planned; this engine has not joined.
- `CANDIDATE`: joined; someone else leads, or nobody. Campaigns for the round's lease now and then,
  until the round is closed: a dead leader's lease expires, and the next campaign wins it.
- `COLLECTING`: won the lease and knows of no plan; collects joins until every present engine that
  needs the version has joined, or the join window ends. Then it plans.
- `WATCHING`: there is a plan; collects reports until every planned engine has reported or has left,
  or the round's budget ends. Then it says `RoundComplete`. Under `together` it says `Commit` once
  all that are still in the round have proof. It says the plan again to whoever joins late.
- `REGROUPING`: a broadcast group broke: a member is lost, or says so. `Abort` is said, and the
  members that are left join again. `local` and `p2p` are not disturbed. `REPLANNING`: the next
  epoch is being won; in it, who has joined again is planned anew. Then it is `WATCHING` again.
- `OVER`: closed, or left.

Rules:

- The main round of a version is `v<version>`. Who comes after its plan, is not named by the plan,
  waits for it in vain, or tries a version again, goes alone: in a round of its own,
  `v<version>-<engine>-<consumer>-<n>`, led by itself, at once, on routes that disturb nobody.
- Every plan of a main round has an epoch of its own, which the lease store gives with the lease, so
  that two leaders never act in one epoch. A leader that hears a later epoch's plan leads no more.
- Only a proof (`TransferDone`) leads to `Resume`, and only `Resumed` makes a version the served
  one; or, if a `Resume` only seemed to fail, that the engine is found to serve the version: then
  `UpdateComplete` follows the `UpdateFailed`. It never goes back: `floor` is the last version that
  was, or may have been, served. An older one that is published after it is refused, and that is
  said once (`VersionNotNew`).
- A newer version takes the place of one that is not being transferred yet, but not of a third in a
  row: that one is brought to its end, however fast versions come. A transfer that runs ends first;
  then the newest is gone for. What is tried after a failure is in `versions.py`.
- Every wait ends: by an answer that the driver owes by a deadline, or by a timer. Nothing that an
  engine serves depends on a leader: a plan that does not come is done without, alone; a `Commit`
  that does not come is done without, because the weights are whole and proven.
"""

from __future__ import annotations

from weightbus.consumers.round.effects import Timer
from weightbus.consumers.round.events import (
    AbortSeen,
    CheckpointGone,
    CheckpointSeen,
    CommitSeen,
    EngineGone,
    EngineLost,
    EngineSeen,
    EngineServes,
    Event,
    JoinSeen,
    LeaseHeld,
    LeaseLost,
    LeaseWon,
    PlanSeen,
    Prepared,
    PrepareFailed,
    ProvenSeen,
    Resumed,
    ResumeFailed,
    RoundCompleteSeen,
    Started,
    Stop,
    TransferDone,
    TransferFailed,
    UpdateSeen,
    WentAlone,
)
from weightbus.consumers.round.leader import LeaderHandler, Leadership, LeaderTable
from weightbus.consumers.round.member import Member, MemberHandler, MemberTable
from weightbus.consumers.round.phases import Lead, Phase

__all__ = ("LEADER_TABLE", "MEMBER_TABLE")

LeaderRow = dict[type[Event] | Timer, LeaderHandler]
MemberRow = dict[type[Event] | Timer, MemberHandler]


def _ignore(half: Member | Leadership, event: Event) -> None:
    """Nothing to do."""


_ROUND_TALK: MemberRow = {
    PlanSeen: _ignore,
    CommitSeen: _ignore,
    AbortSeen: _ignore,
    RoundCompleteSeen: _ignore,
}
"""What is said in rounds concerns a member only while it waits for it."""

_LATE_ANSWERS: MemberRow = {Prepared: _ignore, PrepareFailed: _ignore}
"""A cancelled `Prepare` may still be answered, at any time."""

_RESTING: MemberRow = {
    **_ROUND_TALK,
    **_LATE_ANSWERS,
    CheckpointSeen: Member.learn_and_settle,
    CheckpointGone: Member.forget_and_settle,
    EngineLost: Member.lose_engine_and_settle,
    EngineServes: Member.find_engine,
    Timer.RETRY: Member.retry,
    Stop: Member.stop_at_once,
}

_NEGOTIATING: MemberRow = {
    **_ROUND_TALK,
    **_LATE_ANSWERS,
    CheckpointSeen: Member.learn_and_reconsider,
    CheckpointGone: Member.forget_and_reconsider,
    EngineLost: Member.lose_engine,
    EngineServes: Member.find_engine_and_reconsider,
    Stop: Member.stop_at_once,
}

_MOVING: MemberRow = {
    **_ROUND_TALK,
    **_LATE_ANSWERS,
    CheckpointSeen: Member.learn,
    CheckpointGone: Member.forget,
    EngineLost: _ignore,
    EngineServes: _ignore,
}

MEMBER_TABLE: MemberTable = {
    Phase.NEW: {
        Started: Member.start,
        Stop: Member.stop_at_once,
    },
    Phase.IDLE: _RESTING,
    Phase.QUARANTINED: _RESTING,
    Phase.PREPARING: {
        **_NEGOTIATING,
        Prepared: Member.prepared,
        PrepareFailed: Member.prepare_failed,
    },
    Phase.JOINING: {
        **_NEGOTIATING,
        PlanSeen: Member.take_plan,
        AbortSeen: Member.keep_abort,
        RoundCompleteSeen: Member.end_of_round,
        Timer.JOIN: Member.join_again,
        Timer.NEGOTIATE: Member.lose_patience,
    },
    Phase.TRANSFERRING: {
        **_MOVING,
        PlanSeen: Member.weigh_plan,
        AbortSeen: Member.obey_abort,
        TransferDone: Member.transferred,
        TransferFailed: Member.transfer_failed,
        Stop: Member.stop_after_transfer,
    },
    Phase.CANCELLING: {
        **_MOVING,
        PlanSeen: Member.keep_plan,
        AbortSeen: Member.keep_abort,
        TransferDone: Member.transferred,
        TransferFailed: Member.transfer_failed,
        Stop: Member.stop_after_transfer,
    },
    Phase.REPLANNING: {
        **_NEGOTIATING,
        PlanSeen: Member.take_plan,
        AbortSeen: Member.keep_abort,
        RoundCompleteSeen: Member.end_of_round,
        Timer.JOIN: Member.join_again,
        Timer.REPLAN: Member.lose_patience,
    },
    Phase.PROVEN: {
        **_MOVING,
        CommitSeen: Member.commit,
        RoundCompleteSeen: Member.commit_at_end,
        Timer.PROVEN: Member.prove_again,
        Timer.COMMIT: Member.commit_alone,
        Stop: Member.stop_after_resume,
    },
    Phase.RESUMING: {
        **_MOVING,
        Resumed: Member.resumed,
        ResumeFailed: Member.resume_failed,
        Stop: Member.stop_after_resume,
    },
    Phase.STOPPED: {
        **_ROUND_TALK,
        **_LATE_ANSWERS,
        CheckpointSeen: _ignore,
        CheckpointGone: _ignore,
        EngineLost: _ignore,
        EngineServes: _ignore,
        Stop: _ignore,
    },
}

_KEEP: LeaderRow = {
    JoinSeen: Leadership.keep_join,
    PlanSeen: Leadership.keep_plan,
    UpdateSeen: Leadership.keep_report,
    ProvenSeen: Leadership.keep_proof,
    EngineSeen: Leadership.keep_state,
    EngineGone: Leadership.keep_loss,
    WentAlone: Leadership.keep_solo,
    RoundCompleteSeen: Leadership.heard_end,
}
"""What every engine of a round remembers, because it may have to lead later."""

LEADER_TABLE: LeaderTable = {
    Lead.HEARD: {
        **_KEEP,
        LeaseWon: Leadership.won_too_late,
        LeaseHeld: _ignore,
        LeaseLost: _ignore,
    },
    Lead.CANDIDATE: {
        **_KEEP,
        LeaseWon: Leadership.won,
        LeaseHeld: Leadership.held,
        LeaseLost: _ignore,
        EngineGone: Leadership.suspect_leader,
        Timer.CAMPAIGN: Leadership.campaign_again,
    },
    Lead.COLLECTING: {
        **_KEEP,
        LeaseWon: Leadership.won_again,
        LeaseHeld: _ignore,
        LeaseLost: Leadership.step_down,
        PlanSeen: Leadership.heard_plan,
        Timer.WINDOW: Leadership.window_ended,
        Timer.RENEW: Leadership.renew,
    },
    Lead.WATCHING: {
        **_KEEP,
        LeaseWon: Leadership.won_again,
        LeaseHeld: _ignore,
        LeaseLost: Leadership.step_down,
        JoinSeen: Leadership.answer_join,
        PlanSeen: Leadership.heard_plan,
        ProvenSeen: Leadership.answer_proof,
        Timer.ROUND: Leadership.budget_ended,
        Timer.RENEW: Leadership.renew,
    },
    Lead.REGROUPING: {
        **_KEEP,
        LeaseWon: Leadership.won_again,
        LeaseHeld: _ignore,
        LeaseLost: Leadership.step_down,
        PlanSeen: Leadership.heard_plan,
        Timer.WINDOW: Leadership.regroup_window_ended,
        Timer.ROUND: Leadership.budget_ended,
        Timer.RENEW: Leadership.renew,
    },
    Lead.REPLANNING: {
        **_KEEP,
        LeaseWon: Leadership.won_next_epoch,
        LeaseHeld: Leadership.step_down,
        LeaseLost: _ignore,
        PlanSeen: Leadership.heard_plan,
        Timer.CAMPAIGN: Leadership.campaign_again,
        Timer.ROUND: Leadership.budget_ended,
        Timer.RENEW: Leadership.renew,
    },
    Lead.OVER: {
        **dict.fromkeys(_KEEP, _ignore),
        LeaseWon: Leadership.won_too_late,
        LeaseHeld: _ignore,
        LeaseLost: _ignore,
    },
}

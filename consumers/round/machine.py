"""The round state machine: what one consumer does about every event, as instructions. Does no I/O.

Pure: no clock, no randomness, no waiting. The driver calls `RoundMachine.handle` with one event at
a time and executes what comes back. Phases, rules and transitions are in `table.py`.

The machine has two halves, a member's and a leader's, which are orthogonal: a leader is a member
too. What a machine says it hears itself, at once, so that nothing it decides depends on hearing its
own voice from the bus.
"""

from __future__ import annotations

from weightbus.consumers.round.config import Planner, RoundConfig
from weightbus.consumers.round.effects import Effects
from weightbus.consumers.round.events import (
    AbortSeen,
    CommitSeen,
    Event,
    JoinSeen,
    PlanSeen,
    ProvenSeen,
    RoundCompleteSeen,
    TimerFired,
    UpdateSeen,
)
from weightbus.consumers.round.instructions import Instruction
from weightbus.consumers.round.leader import LeaderTable
from weightbus.consumers.round.member import Member, MemberTable
from weightbus.consumers.round.phases import Phase
from weightbus.consumers.round.rounds import Rounds
from weightbus.consumers.round.table import LEADER_TABLE, MEMBER_TABLE
from weightbus.schemas.base import Message
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Abort, Commit, Join, Proven, RoundComplete, RoundPlan

__all__ = ("RoundMachine",)


class RoundMachine:
    """One consumer's part in every round. Not re-entrant; made anew with every consumer process."""

    def __init__(
        self,
        config: RoundConfig,
        planner: Planner,
        *,
        member_table: MemberTable = MEMBER_TABLE,
        leader_table: LeaderTable = LEADER_TABLE,
    ) -> None:
        self._effects = Effects()
        self.rounds = Rounds(config, planner, self._effects, leader_table)
        self.member = Member(config, planner, self._effects, self.rounds, member_table)

    def handle(self, event: Event, now_ns: int) -> tuple[Instruction, ...]:
        """What is to be done about `event`, in order.

        Args:
            now_ns: when it happened: nanoseconds since the Unix epoch, by a steady clock.

        Raises:
            UnexpectedEvent: it cannot happen now; the machine is of no use any more.
        """
        effects = self._effects
        effects.now_ns = now_ns
        if isinstance(event, TimerFired) and not effects.fired(event):
            return ()
        self._pass_on(event)
        while (message := effects.heard()) is not None:
            self._pass_on(_heard(message))
        self.member.announce()
        return effects.end()

    @property
    def stopped(self) -> bool:
        """The service may end: nothing is under way any more."""
        return self.member.phase is Phase.STOPPED

    @property
    def timers(self) -> frozenset[str]:
        """Names of the timers that are set."""
        return self._effects.timers

    def _pass_on(self, event: Event) -> None:
        self.rounds.handle(event, self.member.floor)
        self.member.handle(event)


def _heard(message: Message) -> Event:
    """What a machine hears when it says `message`."""
    match message:
        case Join():
            return JoinSeen(message)
        case RoundPlan():
            return PlanSeen(message)
        case Proven():
            return ProvenSeen(message)
        case Commit():
            return CommitSeen(message)
        case Abort():
            return AbortSeen(message)
        case RoundComplete():
            return RoundCompleteSeen(message)
        case UpdateComplete() | UpdateFailed():
            return UpdateSeen(message)
        case _:
            raise AssertionError(f"a round machine never says {type(message).__name__}")

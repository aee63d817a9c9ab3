"""The rounds that a consumer knows of, and who else is there. Does no I/O.

Owns one `Leadership` per main round and the presence of the other engines; passes every event that
concerns the leader's half to the rounds it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from weightbus.consumers.round.config import Planner, RoundConfig
from weightbus.consumers.round.effects import Effects, timer_of
from weightbus.consumers.round.errors import UnexpectedEvent
from weightbus.consumers.round.events import (
    EngineGone,
    EngineSeen,
    Event,
    JoinSeen,
    LeaseHeld,
    LeaseLost,
    LeaseWon,
    PlanSeen,
    ProvenSeen,
    RoundCompleteSeen,
    TimerFired,
    UpdateSeen,
    WentAlone,
)
from weightbus.consumers.round.instructions import ReleaseRound
from weightbus.consumers.round.leader import Leadership, LeaderTable
from weightbus.consumers.round.phases import Lead
from weightbus.consumers.round.roll import MAX_ENGINES
from weightbus.consumers.round.work import main_round
from weightbus.schemas.progress import EngineState

__all__ = ("Rounds",)

MAX_ROUNDS = 16
"""Rounds kept."""
ROOM_FIRST = (Lead.OVER, Lead.HEARD)
"""Rounds in these phases make room first, in this order."""


class Rounds:
    """The leader's half of a round machine."""

    def __init__(
        self, config: RoundConfig, planner: Planner, effects: Effects, table: LeaderTable
    ) -> None:
        self._config = config
        self._planner = planner
        self._effects = effects
        self._table = table
        self._rounds: dict[str, Leadership] = {}
        self._present: dict[str, EngineState] = {}

    @property
    def known(self) -> Mapping[str, Leadership]:
        """Round id -> what this engine knows of it. A view."""
        return self._rounds

    def open(self, version: int) -> Leadership:
        """The main round of a version; a new one if it is not known."""
        known = self._rounds.get(main_round(version))
        if known is not None:
            return known
        known = Leadership(version, self._config, self._planner, self._effects, self._present)
        self._rounds[known.round] = known
        if len(self._rounds) > MAX_ROUNDS:
            oldest = min(
                (other for other in self._rounds.values() if other is not known),
                key=lambda other: (
                    *(other.phase is not lead for lead in ROOM_FIRST),
                    other.version,
                ),
            )
            oldest.finish()
            del self._rounds[oldest.round]
        return known

    def leave(self, version: int) -> None:
        """The engine is done with the main round of a version, or goes on without it."""
        if (known := self._rounds.get(main_round(version))) is not None:
            known.leave()

    def finish(self) -> None:
        """The service ends: someone else shall lead what this engine leads."""
        for known in self._rounds.values():
            known.finish()

    def handle(self, event: Event, floor: int) -> None:
        """Pass an event to the rounds it concerns; `floor`: older versions are of no interest.

        Raises:
            UnexpectedEvent: it cannot happen to such a round now.
        """
        if isinstance(event, EngineSeen | EngineGone):
            self._keep_presence(event)
        elif isinstance(event, PlanSeen) and event.plan.round != main_round(event.plan.version):
            event = WentAlone(event.plan.leader, event.plan.version)
        find = _CONCERNED.get(type(event))
        if find is None:
            return
        key = timer_of(event) if isinstance(event, TimerFired) else type(event)
        for known in find(self, event, floor):
            handler = self._table[known.phase].get(key)
            if handler is None:
                raise UnexpectedEvent(f"{known.round}: {known.phase.value}", str(key))
            handler(known, event)

    def _keep_presence(self, event: EngineSeen | EngineGone) -> None:
        if isinstance(event, EngineGone):
            self._present.pop(event.engine, None)
            return
        engine = event.state.engine
        room = engine in self._present or len(self._present) < MAX_ENGINES
        if engine != self._config.engine and room:
            self._present[engine] = event.state

    # Which rounds an event concerns.

    def _of_lease(self, event: LeaseWon | LeaseHeld | LeaseLost, _: int) -> Iterable[Leadership]:
        if event.round in self._rounds:
            return (self._rounds[event.round],)
        if isinstance(event, LeaseWon):
            self._effects.put(ReleaseRound(event.round))
        return ()

    def _of_timer(self, event: TimerFired, _: int) -> Iterable[Leadership]:
        known = self._rounds.get(event.name.partition(":")[2])
        return () if known is None else (known,)

    def _of_join(self, event: JoinSeen, floor: int) -> Iterable[Leadership]:
        return self._of_message(event.join.round, event.join.version, floor)

    def _of_plan(self, event: PlanSeen, floor: int) -> Iterable[Leadership]:
        return self._of_message(event.plan.round, event.plan.version, floor)

    def _of_proof(self, event: ProvenSeen, _: int) -> Iterable[Leadership]:
        return (self._rounds[event.proven.round],) if event.proven.round in self._rounds else ()

    def _of_end(self, event: RoundCompleteSeen, _: int) -> Iterable[Leadership]:
        known = self._rounds.get(event.complete.round)
        return () if known is None else (known,)

    def _of_update(self, event: UpdateSeen, _: int) -> Iterable[Leadership]:
        return self._of_version(event.update.version)

    def _of_solo(self, event: WentAlone, _: int) -> Iterable[Leadership]:
        return self._of_version(event.version)

    def _of_presence(self, event: EngineSeen | EngineGone, _: int) -> Iterable[Leadership]:
        engine = event.engine if isinstance(event, EngineGone) else event.state.engine
        return () if engine == self._config.engine else tuple(self._rounds.values())

    def _of_version(self, version: int) -> Iterable[Leadership]:
        known = self._rounds.get(main_round(version))
        return () if known is None else (known,)

    def _of_message(self, round: str, version: int, floor: int) -> Iterable[Leadership]:
        if round in self._rounds:
            return (self._rounds[round],)
        if version > floor and round == main_round(version):
            return (self.open(version),)
        return ()


_CONCERNED: dict[type[Event], Callable[[Rounds, Any, int], Iterable[Leadership]]] = {
    LeaseWon: Rounds._of_lease,
    LeaseHeld: Rounds._of_lease,
    LeaseLost: Rounds._of_lease,
    JoinSeen: Rounds._of_join,
    PlanSeen: Rounds._of_plan,
    WentAlone: Rounds._of_solo,
    ProvenSeen: Rounds._of_proof,
    RoundCompleteSeen: Rounds._of_end,
    UpdateSeen: Rounds._of_update,
    EngineSeen: Rounds._of_presence,
    EngineGone: Rounds._of_presence,
    TimerFired: Rounds._of_timer,
}

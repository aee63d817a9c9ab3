"""Who came when a round was over, and gave up: that is not the failure of the round.

Does no I/O. A round is over when a leader has closed it; where no leader said so, when all engines
that were planned serve the version. An attempt that began later and came to no plan had no part in
it: the version was gone by then, or could not be read. One that came to a plan opens the round
again, and has a part in it as everybody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from weightbus.schemas.progress import StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan
from weightbus.tracing.waterfall import RoundMessage

__all__ = ("LateAttempts", "RoundEnd", "part_late")


class LateAttempts(Struct, frozen=True):
    """Of one engine."""

    count: int
    last: Sequence[RoundMessage]
    """What it told of the last one."""


class RoundEnd:
    """When one round was over, as far as its messages tell; a version that was published again has
    a round of the same name again: then the last one."""

    def __init__(self) -> None:
        self._joined_for_ns = self._began_ns = 0
        """The last publication that somebody joined for, and the first join for it, if that is
        earlier: the clock of a foreign trainer may be ahead."""
        self._closed_ns: set[int] = set()
        self._planned_ns: dict[str, int] = {}
        """Engine id -> when the last plan was made that names it."""
        self._served_ns: dict[str, int] = {}
        self._over_ns: int | None = None

    def take(self, message: RoundMessage) -> None:
        """In any order, and as often as it comes."""
        self._over_ns = None
        match message:
            case Join() if message.checkpoint_ns >= self._joined_for_ns:
                if message.checkpoint_ns > self._joined_for_ns:
                    self._joined_for_ns = self._began_ns = message.checkpoint_ns
                self._began_ns = min(self._began_ns, message.joined_ns)
            case RoundComplete():
                self._closed_ns.add(message.ended_ns)
            case RoundPlan():
                for route in message.engines:
                    known_ns = self._planned_ns.get(route.engine, 0)
                    self._planned_ns[route.engine] = max(known_ns, message.created_ns)
            case UpdateComplete():
                self._served_ns[message.engine] = message.end_ns

    @property
    def over_ns(self) -> int:
        """0: it is not."""
        if self._over_ns is None:
            self._over_ns = self._find_over_ns()
        return self._over_ns

    def _find_over_ns(self) -> int:
        closed_ns = [ended_ns for ended_ns in self._closed_ns if ended_ns > self._began_ns]
        if closed_ns:
            return min(closed_ns)
        planned = [engine for engine, at_ns in self._planned_ns.items() if at_ns > self._began_ns]
        served_ns = [self._served_ns.get(engine, 0) for engine in planned]
        return max(served_ns, default=0) if min(served_ns, default=0) > self._began_ns else 0

    def is_late(self, failed: UpdateFailed) -> bool:
        """Whether an attempt began when the round was over, and came to no plan."""
        planned_ns = self._planned_ns.get(failed.engine, 0)
        return 0 < self.over_ns < failed.start_ns and not (
            failed.start_ns <= planned_ns <= failed.end_ns
        )


def part_late(
    messages: Sequence[RoundMessage],
) -> tuple[Sequence[RoundMessage], Mapping[str, LateAttempts]]:
    """The messages of one round without late attempts, and these by engine."""
    end = RoundEnd()
    told: dict[str, list[RoundMessage]] = {}
    for message in messages:
        end.take(message)
        if not isinstance(message, RoundPlan | RoundComplete):
            told.setdefault(message.engine, []).append(message)
    attempts: dict[str, LateAttempts] = {}
    apart: set[int] = set()
    for engine, own in told.items():
        late = {each for each in own if isinstance(each, UpdateFailed) and end.is_late(each)}
        if late:
            ordered = sorted(late, key=lambda failed: failed.end_ns)
            before_ns = [0, *(failed.end_ns for failed in ordered)][-2]
            taken = _taken(own, ordered, end.over_ns)
            apart.update(map(id, taken))
            last = [each for each in taken if each == ordered[-1] or _began_ns(each) >= before_ns]
            attempts[engine] = LateAttempts(len(ordered), last)
    return [each for each in messages if id(each) not in apart], attempts


def _taken(
    told: Iterable[RoundMessage], late: Sequence[UpdateFailed], over_ns: int
) -> list[RoundMessage]:
    """What belongs to the late attempts of one engine. An attempt before them may have gone on when
    the round was over: what it tells is not of them."""
    ends_ns = [
        each.end_ns
        for each in told
        if isinstance(each, UpdateComplete | UpdateFailed) and each not in late
    ]
    since_ns = max([over_ns, *(end_ns for end_ns in ends_ns if end_ns <= late[0].start_ns)])
    return [each for each in told if each in late or since_ns < _began_ns(each) <= late[-1].end_ns]


def _began_ns(message: RoundMessage) -> int:
    """When what an attempt without a plan tells began; 0: it does not tell that."""
    match message:
        case Join():
            return message.joined_ns
        case StageComplete() | UpdateFailed():
            return message.start_ns
    return 0

"""The messages of one round, sorted by what they tell and merged where several tell of one thing.

Does no I/O. A message that comes twice counts once. An engine that comes late writes a plan of its
own, of a later epoch and with itself alone, into the same round: so a plan counts for the engines
that it names, and of several the one of the last epoch; and so does a leader's closing word. One
that came when the round was over and gave up had no part in it, and is kept apart. A version that
is published again has a round of the same name again: of the two, the last counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import FirstToken, StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan
from weightbus.tracing.context import SpanRef
from weightbus.tracing.late import part_late
from weightbus.tracing.text import NS_PER_S
from weightbus.tracing.waterfall import ROUND_MESSAGES, Origin, Outcome, RoundMessage

__all__ = ("PROMPT_NS", "RoundFacts", "Told", "late_ns")

PROMPT_NS: Final = 2 * NS_PER_S
"""Who hears of a version later than this after it was there was not there itself by then: a bus
delivers within milliseconds."""


class Told(Protocol):
    """A message and how it came: what `weightbus.bus.received.Received` is."""

    @property
    def message(self) -> Message: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def received_ns(self) -> int:
        """When the bus stored it, by its own clock; 0: not known."""


def late_ns(published_ns: int, heard_ns: int) -> int:
    """How long a version was there before the first engine of a round heard of it; 0: it heard
    promptly, or one of the times, which are nanoseconds since the epoch, is 0: not known."""
    waited_ns = heard_ns - published_ns if published_ns and heard_ns else 0
    return waited_ns if waited_ns > PROMPT_NS else 0


class RoundFacts:
    """One round; `version` is None if nobody told of it."""

    def __init__(self, model: str, round_id: str, history: Iterable[Told]) -> None:
        self.model, self.round = model, round_id
        self.version: int | None = None
        self.joins: dict[str, Join] = {}
        """The last one of every engine."""
        self.join_times_ns: dict[str, set[int]] = {}
        self.plans: dict[str, RoundPlan] = {}
        """Engine id -> the plan of the last epoch that names it."""
        self._stages: dict[str, dict[StageComplete, None]] = {}
        self.updates: dict[str, UpdateComplete | UpdateFailed] = {}
        self.tokens: dict[str, FirstToken] = {}
        self.closed: list[RoundComplete] = []
        announced: list[Told] = []
        own: list[RoundMessage] = []
        for told in history:
            message = told.message
            if isinstance(message, CheckpointReady) and message.model == model:
                announced.append(told)
            elif isinstance(message, ROUND_MESSAGES) and (
                (message.model, message.round) == (model, round_id)
            ):
                self.version = message.version
                own.append(message)
        rest, late = part_late(_of_the_last_run(own, announced))
        for message in rest:
            self._take(message)
        self._announce(announced)
        self.late = {
            engine: (attempts.count, self._apart(attempts.last, announced))
            for engine, attempts in late.items()
        }
        """Engine id -> how often it came when the round was over, and what it told the last time;
        nothing else here knows of that."""

    def _apart(self, messages: Iterable[RoundMessage], announced: Sequence[Told]) -> RoundFacts:
        facts = RoundFacts(self.model, self.round, ())
        facts.version = self.version
        for message in messages:
            facts._take(message)
        facts._announce(announced)
        return facts

    def _take(self, message: RoundMessage) -> None:
        match message:
            case Join():
                self.joins[message.engine] = message
                self.join_times_ns.setdefault(message.engine, set()).add(message.joined_ns)
            case RoundPlan():
                for route in message.engines:
                    known = self.plans.get(route.engine)
                    if known is None or message.epoch >= known.epoch:
                        self.plans[route.engine] = message
            case StageComplete():
                self._stages.setdefault(message.engine, {})[message] = None
            case UpdateComplete() | UpdateFailed():
                self.updates[message.engine] = message
            case FirstToken():
                self.tokens[message.engine] = message
            case RoundComplete():
                self.closed += [message] if message not in self.closed else []

    def _announce(self, announced: Sequence[Told]) -> None:
        """Of several announcements of the version (it may be published again), the last one that
        somebody joined for; else the last."""
        joined_for_ns = {join.checkpoint_ns for join in self.joins.values()}
        self.ready: CheckpointReady | None = None
        self.stored_ns = 0
        """When the bus stored `ready`; 0: not known, or an engine says that it heard of it before:
        that one's clock is not the bus's."""
        self.publish: SpanRef | None = None
        """The span in which it was published."""
        for told in sorted(announced, key=lambda told: told.received_ns):
            ready = told.message
            assert isinstance(ready, CheckpointReady), "nothing else was collected"
            if ready.version != self.version:
                continue
            known = self.ready is not None and self.ready.created_ns in joined_for_ns
            if not known or ready.created_ns in joined_for_ns:
                self.ready, self.stored_ns = ready, told.received_ns
                self.publish = SpanRef.from_headers(told.headers)
        heard_ns = min((u.start_ns for u in self.updates.values() if u.start_ns), default=0)
        if heard_ns and self.stored_ns > heard_ns + self._residual_ns():
            self.stored_ns = 0

    def _residual_ns(self) -> int:
        """By how much two of the times may be off against each other, as far as is told."""
        of_engines = [update.clock_residual_ns or 0 for update in self.updates.values()]
        of_trainer = 0 if self.ready is None else self.ready.clock_residual_ns or 0
        return of_trainer + max(of_engines, default=0)

    @property
    def plan(self) -> RoundPlan | None:
        """The plan that most engines ran; of several, that of the last epoch."""
        counts = Counter(plan.epoch for plan in self.plans.values())
        return max(
            self.plans.values(), key=lambda plan: (counts[plan.epoch], plan.epoch), default=None
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """Everyone who takes part or is said to, in the order of their names."""
        names = {*self.joins, *self.plans, *self.updates, *self.tokens, *self._stages}
        for word in self.closed:
            names.update(word.completed, word.failed)
        return tuple(sorted(names))

    @property
    def trace_id(self) -> str:
        """That of the publication; else the first that a message names."""
        if self.publish is not None:
            return self.publish.trace_id
        traced = (*self._all_stages(), *self.updates.values(), *self.tokens.values(), *self.closed)
        return next((message.trace_id for message in traced if message.trace_id), "")

    def trace_id_of(self, engine: str) -> str:
        """The last that one engine's messages name: where the publication was not traced, each may
        have a trace of its own."""
        told = (self.tokens.get(engine), self.updates.get(engine), *self.stages_of(engine)[::-1])
        return next((each.trace_id for each in told if each is not None and each.trace_id), "")

    def origin(self) -> tuple[Origin, int]:
        """What time 0 is, and when that was.

        Nothing can be announced later than it was stored. A time that lies before the creation by
        no more than what the clocks may be off is taken to be that of the creation.
        """
        if self.late_ns():
            return "heard", min(self._times_ns())
        earliest_ns = min(self._times_ns(), default=0)
        if self.ready is None:
            return "earliest", earliest_ns
        origin: Origin = "checkpoint_ready"
        created_ns, stored_ns = self.ready.created_ns, self.stored_ns
        if stored_ns and not 0 < created_ns <= stored_ns:
            if not created_ns or created_ns - stored_ns > (self.ready.clock_residual_ns or 0):
                origin = "stored"
            created_ns = stored_ns
        if created_ns and (not earliest_ns or created_ns <= earliest_ns + self._residual_ns()):
            return origin, created_ns
        return "earliest", earliest_ns

    def late_ns(self) -> int:
        """How long the version was there before the first engine heard of it; 0: not so long that
        it would not be its delivery."""
        published_ns = 0 if self.ready is None else self.stored_ns or self.ready.created_ns
        return late_ns(published_ns, min(self._times_ns(), default=0))

    def last_ns(self) -> int:
        """The latest time that a message tells; 0: none."""
        return max(self._times_ns(), default=0)

    def _times_ns(self) -> list[int]:
        """Every point in time that the engines tell; 0 stands for none."""
        times = [plan.created_ns for plan in self.plans.values()]
        for joined_ns in self.join_times_ns.values():
            times += joined_ns
        for timed in (*self._all_stages(), *self.updates.values(), *self.tokens.values()):
            times += [timed.start_ns, timed.end_ns]
        for word in self.closed:
            times += [word.started_ns, word.ended_ns]
        return [time_ns for time_ns in times if time_ns]

    def stages_of(self, engine: str) -> Sequence[StageComplete]:
        """In the order in which they came."""
        return tuple(self._stages.get(engine, ()))

    def _all_stages(self) -> Sequence[StageComplete]:
        return [stage for of_engine in self._stages.values() for stage in of_engine]

    def outcome(self, engine: str) -> Outcome:
        """What became of one engine: its own last word, else its leader's."""
        match self.updates.get(engine):
            case UpdateComplete():
                return "complete"
            case UpdateFailed():
                return "failed"
        word = self.closing_word(engine)
        if word is None:
            return "unfinished"
        return "failed" if engine in word.failed else "complete"

    def closing_word(self, engine: str) -> RoundComplete | None:
        """The last of a leader that names an engine."""
        words = [word for word in self.closed if engine in (*word.completed, *word.failed)]
        return max(words, key=lambda word: (word.epoch, word.ended_ns), default=None)


def _of_the_last_run(
    messages: Sequence[RoundMessage], announced: Iterable[Told]
) -> Sequence[RoundMessage]:
    """Without what was over before the publication that was joined for last, where another one of
    the same version is known: a trainer that crashed publishes the version again, in a round of the
    same name, while the bus still remembers the first."""
    joins = [message for message in messages if isinstance(message, Join) and message.checkpoint_ns]
    last = max(joins, key=lambda join: (join.joined_ns, join.checkpoint_ns), default=None)
    if last is None:
        return messages
    joined_for_ns = last.checkpoint_ns
    ready = (told.message for told in announced)
    others = {join.checkpoint_ns for join in joins}
    others |= {
        each.created_ns
        for each in ready
        if isinstance(each, CheckpointReady) and each.version == last.version
    }
    if others <= {joined_for_ns}:
        return messages
    # Should the clock of a foreign trainer be ahead, the first who joined was there before it.
    began_ns = min(
        joined_for_ns, *(join.joined_ns for join in joins if join.checkpoint_ns == joined_for_ns)
    )
    return [message for message in messages if _is_of(message, joined_for_ns, began_ns)]


def _is_of(message: RoundMessage, joined_for_ns: int, began_ns: int) -> bool:
    """Whether it tells of the publication that was joined for, or of something after `began_ns`."""
    match message:
        case Join() | RoundPlan() if message.checkpoint_ns:
            return message.checkpoint_ns == joined_for_ns
        case Join():
            return message.joined_ns >= began_ns
        case RoundPlan():
            return message.created_ns >= began_ns
        case RoundComplete():
            return message.ended_ns >= began_ns
        case _:
            return message.end_ns >= began_ns

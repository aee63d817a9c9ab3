"""What the last engine to serve spent its time on, step after step, and that in one sentence.

Does no I/O. The path is that of one engine: the last to serve, of those that told when; if none
serves, the last to fail; if none has failed either, the one that has told of itself last. Every
step begins where the one before ends. Where the engine waited for somebody or something, the step
is a `wait` that names it, and the stage that was waited for, though another engine's, belongs to
the path, too. An engine that tries again waits in each attempt for what is of that attempt.

Stages that stream overlap, bucket by bucket. Of those, the one that was busy longest set the pace:
it has the path from its first bucket to its last, the stages before it have it until then, those
behind it from then on. Of a stage whose buckets are not told only that counts which came after the
stage before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from msgspec import Struct

from weightbus.tracing.facts import RoundFacts
from weightbus.tracing.laps import MOVING, Lap, busy_s, end_s, laps_of
from weightbus.tracing.waterfall import EngineWaterfall, PathStep, StageRow, StepKind

__all__ = ("CriticalPath", "find_path")

RowId = tuple[str, int]
"""An engine, and the place of a row among its rows."""

After = Callable[[int], float | None]
"""Nanoseconds since the epoch -> seconds after the origin; None for 0."""


class CriticalPath(Struct, frozen=True):
    """The path of one round."""

    engine: str
    """Whose it is; empty: nobody has told anything."""
    steps: tuple[PathStep, ...] = ()
    rows: frozenset[RowId] = frozenset()
    """Through which it goes, or for which it waits."""


def find_path(
    engines: Sequence[EngineWaterfall], facts: RoundFacts, after: After, stored_s: float | None
) -> CriticalPath:
    """
    Args:
        engines: of one round, with their rows in the order of their starts.
        stored_s: when the bus had `CheckpointReady`; None: not known.
    """
    if not engines:
        return CriticalPath("")
    last = max(engines, key=_lateness)
    walk = _Walk(last, facts, after, {engine.engine: engine for engine in engines})
    if stored_s is not None:
        walk.go("publish", stored_s, engine="")
    walk.to_the_first_attempt()
    for number in range(max(1, len(walk.negotiations))):
        walk.negotiate(number)
        walk.move(number)
    walk.end()
    return CriticalPath(last.engine, tuple(walk.steps), frozenset(walk.rows))


def _lateness(engine: EngineWaterfall) -> tuple[int, bool, float, str]:
    """Those that serve before those that failed, and these before the others; of these those that
    told when it was, and not only their leader that it was; then the latest."""
    place = {"complete": 2, "failed": 1, "unfinished": 0}[engine.outcome]
    return place, engine.end_s is not None, _told_until_s(engine), engine.engine


def _told_until_s(engine: EngineWaterfall) -> float:
    """When it ended; else the last that is known of it."""
    if engine.end_s is not None:
        return engine.end_s
    times = (engine.start_s, engine.joined_s, engine.planned_s, *map(end_s, engine.stages))
    return max((time_s for time_s in times if time_s is not None), default=0.0)


class _Walk:
    """One engine's path, as far as it has been followed: up to `now_s`."""

    def __init__(
        self,
        engine: EngineWaterfall,
        facts: RoundFacts,
        after: After,
        engines: dict[str, EngineWaterfall],
    ) -> None:
        self._engine, self._engines = engine, engines
        self._facts, self._after = facts, after
        self._end_s = _told_until_s(engine)
        self._rows = tuple(enumerate(engine.stages))
        self.negotiations = [pair for pair in self._rows if pair[1].stage == "negotiate"]
        """One for every attempt that came to a plan."""
        self._window_s = 0.0, self._end_s
        """From the plan of an attempt to the next attempt."""
        self.now_s = 0.0
        self.steps: list[PathStep] = []
        self.rows: set[RowId] = set()

    def go(
        self,
        what: StepKind,
        until_s: float,
        *,
        engine: str | None = None,
        rank: int | None = None,
        waited_for: str = "",
        rows: Iterable[RowId] = (),
    ) -> None:
        """A step from where we are; none, if we are there already."""
        until_s = min(until_s, self._end_s)
        if until_s <= self.now_s:
            return
        engine = self._engine.engine if engine is None else engine
        start_s, self.now_s = self.now_s, until_s
        self.rows.update(rows)
        if self.steps:
            before = self.steps[-1]
            same = (before.what, before.engine, before.rank, before.waited_for)
            if same == (what, engine, rank, waited_for):
                start_s = self.steps.pop().start_s
        self.steps.append(
            PathStep(
                what=what,
                engine=engine,
                rank=rank,
                start_s=start_s,
                duration_s=until_s - start_s,
                waited_for=waited_for,
            )
        )

    def wait(self, until_s: float, waited_for: str, rank: int | None = None) -> None:
        self.go("wait", until_s, rank=rank, waited_for=waited_for)

    def to_the_first_attempt(self) -> None:
        """Until the engine's consumer heard of the version."""
        engine = self._engine
        heard_s = engine.joined_s if engine.start_s is None else engine.start_s
        if self.negotiations:
            first_s = self.negotiations[0][1].start_s
            heard_s = first_s if heard_s is None else min(heard_s, first_s)
        if heard_s is not None:
            self.go("deliver", heard_s, engine="")

    # ---------------------------------------------------------------- one attempt

    def negotiate(self, number: int) -> None:
        """Until a plan is in hand: its own part, who joined after it, and the leader's plan."""
        if not self.negotiations:
            if self._engine.planned_s is not None:
                self._join(self.now_s, self._engine.planned_s, ())
            return
        index, row = self.negotiations[number]
        before_s = self.now_s if number else 0.0
        self.wait(row.start_s, "another attempt")
        self._join(row.start_s, end_s(row), [(self._engine.engine, index)], before_s)

    def _join(
        self, start_s: float, end_s: float, rows: Sequence[RowId], before_s: float = 0.0
    ) -> None:
        """`before_s`: when the attempt before ended; who joined for that one joins again."""
        facts, name = self._facts, self._engine.engine
        plan = facts.plans.get(name)
        planned_s = None if plan is None else self._after(plan.created_ns)
        if plan is None or planned_s is None or not start_s <= planned_s <= end_s:
            self.go("negotiate", end_s, rows=rows)  # an earlier attempt: its plan is gone
            return

        def joined_s(engine: str, from_s: float) -> float | None:
            times = map(self._after, facts.join_times_ns.get(engine, ()))
            return min(
                (t for t in times if t is not None and from_s <= t <= planned_s), default=None
            )

        ours_s = joined_s(name, start_s)
        if ours_s is not None:
            self.go("negotiate", ours_s, rows=rows)
        others = [route.engine for route in plan.engines if route.engine != name]
        joined = [(at_s, each) for each in others if (at_s := joined_s(each, before_s)) is not None]
        if joined and max(joined)[0] > self.now_s:
            last_s, late = max(joined)
            self.wait(last_s, f"{late} to join")
        if plan.leader != name:
            self.wait(planned_s, f"the plan of {plan.leader}")
        self.go("negotiate", end_s, rows=rows)

    def move(self, number: int) -> None:
        """From the plan of an attempt to the end of its last stage that moves bytes."""
        begin_s = self.now_s
        later = self.negotiations[number + 1 :]
        until_s = later[0][1].start_s if later else self._end_s
        rows = [
            (index, row)
            for index, row in self._rows
            if row.stage in MOVING and row.start_s < until_s and end_s(row) > begin_s
        ]
        laps = laps_of(rows)
        if not laps:
            return
        self._window_s = begin_s, until_s
        self._begin(laps[0])
        pace = max(range(len(laps)), key=lambda place: (laps[place].busy_s, -place))
        for lap, following in pairwise(laps[: pace + 1]):
            self._lead_in(lap, following)
        self._set_pace(laps[pace], laps)
        for lap in laps[pace + 1 :]:
            self._await_start(lap)
            self.go(lap.stage, lap.end_s, rank=lap.rank, rows=self._ids(lap))

    def _begin(self, first: Lap) -> None:
        """Between the plan and the first stage."""
        pause_s = self._pause_s()
        if first.stage == "reload" and pause_s is not None:
            self.wait(min(pause_s, first.start_s), "its source to be opened", first.rank)
            self.wait(first.start_s, "its engine to pause", first.rank)
        elif "broadcast" in self._engine.routes and first.stage != "reload":
            self.wait(first.start_s, "its group to meet", first.rank)
        else:
            self.wait(first.start_s, "its source to be opened", first.rank)

    def _lead_in(self, lap: Lap, following: Lap) -> None:
        """A stage until the next one, which is slower, or comes behind it, has its first bucket."""
        pause_s = self._pause_s()
        paused = following.stage == "reload" and pause_s is not None
        has_first_s = lap.first_end_s if paused and following.streams else lap.end_s
        until_s = min(has_first_s, following.start_s)
        self.go(lap.stage, until_s, rank=lap.rank, rows=self._ids(lap))
        self._await_start(following)

    def _await_start(self, lap: Lap) -> None:
        """A stage that could have begun by now, and did not."""
        pause_s = self._pause_s()
        if lap.stage == "broadcast":
            self.wait(lap.start_s, "its peers", lap.rank)
        elif lap.stage == "reload" and pause_s is not None and pause_s < lap.start_s:
            self.wait(lap.start_s, "its engine to pause", lap.rank)
        else:
            self.wait(lap.start_s, "its worker", lap.rank)

    def _set_pace(self, lap: Lap, laps: Sequence[Lap]) -> None:
        """The stage that was busy longest, to its end. Members of a group wait for each other: one
        that fetches its part faster waits for the slowest. They take turns, bucket by bucket; told
        is first all that it fetches itself, then how much longer the slowest takes."""
        own = next((each for each in laps if each.stage == "fetch"), None)
        slowest = self._slowest_fetch() if self._in_group(lap, own) else None
        if slowest is not None:
            (engine, index), row, late_s = slowest
            own_s = lap.start_s if own is None else own.start_s + own.busy_s
            if late_s > max(own_s, self.now_s):
                if own is not None:
                    self.go("fetch", own_s, rank=own.rank, rows=self._ids(own))
                peer = _who(engine, row.rank)
                self.wait(min(late_s, laps[-1].end_s), f"its peers: {peer}", lap.rank)
                self.rows.add((engine, index))
                if lap is own:
                    return
        self.go(lap.stage, lap.end_s, rank=lap.rank, rows=self._ids(lap))

    def _in_group(self, lap: Lap, own: Lap | None) -> bool:
        """Whether what sets the pace may be the others of a group."""
        return "broadcast" in self._engine.routes and (
            own is None or lap.stage in ("fetch", "broadcast")
        )

    def _slowest_fetch(self) -> tuple[RowId, StageRow, float] | None:
        """Of all members of the broadcast in this attempt, and when it had been done if it had
        waited for none."""
        begin_s, until_s = self._window_s
        fetched = [
            (row.start_s + busy_s(row), (name, index), row)
            for name, engine in self._engines.items()
            if engine.epoch == self._engine.epoch
            for index, row in enumerate(engine.stages)
            if row.stage == "fetch" and row.route == "broadcast"
            if row.start_s < until_s and end_s(row) > begin_s
        ]
        if not fetched:
            return None
        late_s, place, row = max(fetched, key=lambda each: each[:2])
        return place, row, late_s

    def _ids(self, lap: Lap) -> list[RowId]:
        return [(self._engine.engine, place) for place in lap.places]

    def _pause_s(self) -> float | None:
        """When requests began to wait; None: not known."""
        engine = self._engine
        if engine.end_s is None or not engine.paused_s:
            return None
        return engine.end_s - engine.paused_s

    # ---------------------------------------------------------------- the end

    def end(self) -> None:
        """From the last byte to serving, and to the first token; or to where it ends."""
        engine, name = self._engine, self._engine.engine
        commits = [(index, row) for index, row in self._rows if row.stage == "commit"]
        for index, row in commits[-1:]:
            self.wait(row.start_s, self._proof())
            self.go("commit", self._end_s, rows=[(name, index)])
        if engine.outcome == "complete":
            self.wait(self._end_s, self._proof())
        elif engine.outcome == "failed" and engine.stages:
            self.wait(self._end_s, "what it had begun to end")
        else:
            self.go("negotiate" if not engine.stages else "wait", self._end_s)
        if engine.first_token_s is not None and engine.outcome == "complete":
            self._end_s = engine.first_token_s
            self.go("first_token", engine.first_token_s)

    def _proof(self) -> str:
        plan = self._facts.plans.get(self._engine.engine)
        if plan is not None and plan.commit == "together":
            return "the proof of all engines"
        return "the proof"


def _who(engine: str, rank: int | None) -> str:
    return engine if rank is None else f"{engine} rank {rank}"

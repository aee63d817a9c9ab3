"""Two rounds of one model beside each other: by engine and stage, and what made the difference.

Does no I/O. The time of a stage of an engine is that from its first rank's start to its last rank's
end, its rate what all ranks moved in that time; of an engine that tried again, in its last attempt.
What made the difference is told by the critical paths: that of what they spent their time on which
differs most in the direction of the whole.
`Comparison` is what `weightbus trace --compare --json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from weightbus.tracing.critical_told import FASTER, FASTER_SHARE, format_share
from weightbus.tracing.laps import attempts_of, end_s
from weightbus.tracing.text import (
    format_bytes,
    format_rate,
    format_seconds,
    gigabytes_per_second,
)
from weightbus.tracing.waterfall import EngineWaterfall, Waterfall

__all__ = ("Comparison", "EngineComparison", "Sides", "StageComparison", "compare_rounds")

SAME: Final = 0.02
"""Rounds whose times differ by no more are told to take the same time: runs differ as much."""

PARTS: Final = 2
"""How many causes are named."""

PART_SHARE: Final = 0.2
"""Of the whole difference: what made less of it is not named, unless it made most."""


class Sides(Struct, frozen=True):
    """One number of both rounds; None: a round does not tell it."""

    first: float | None
    second: float | None
    difference: float | None
    """Second minus first."""
    ratio: float | None
    """Second over first; None if the first is 0, too."""


class StageComparison(Struct, frozen=True, kw_only=True):
    """One stage of one engine, all its ranks together."""

    stage: str
    """Of the contract; or `update`: from hearing of the version to serving it, `paused`: how long
    nothing was served of it, `first token`: from serving to the first token."""
    seconds: Sides
    bytes: Sides
    gb_per_s: Sides


class EngineComparison(Struct, frozen=True, kw_only=True):
    """One engine."""

    engine: str
    first_outcome: str
    """Empty: it had no part in the round."""
    second_outcome: str
    first_attempt: int
    """Which one the stages are of, from 1 on: its last; 0: it had no part, or told of no stage."""
    second_attempt: int
    stages: tuple[StageComparison, ...]


class Comparison(Struct, frozen=True, kw_only=True):
    """Two rounds."""

    model: str
    first_round: str
    second_round: str
    first_version: int
    second_version: int
    wall_s: Sides
    """From the publication to the last engine serving."""
    bytes: Sides
    gb_per_s: Sides
    engines: tuple[EngineComparison, ...]
    """In the order of their names."""
    told: str
    """What made the difference, in one sentence."""


class _Spell(Struct, frozen=True):
    """What one engine did in one stage."""

    seconds: float
    bytes: int = 0

    @property
    def gb_per_s(self) -> float | None:
        return gigabytes_per_second(self.bytes, self.seconds)


def compare_rounds(first: Waterfall, second: Waterfall) -> Comparison:
    """The second round against the first."""
    of_first = {engine.engine: engine for engine in first.engines}
    of_second = {engine.engine: engine for engine in second.engines}
    return Comparison(
        model=first.model,
        first_round=first.round,
        second_round=second.round,
        first_version=first.version,
        second_version=second.version,
        wall_s=_sides(first.wall_s, second.wall_s),
        bytes=_sides(first.bytes, second.bytes),
        gb_per_s=_sides(first.gb_per_s, second.gb_per_s),
        engines=tuple(
            _compare_engines(name, of_first.get(name), of_second.get(name))
            for name in sorted({*of_first, *of_second})
        ),
        told=_tell(first, second),
    )


def _compare_engines(
    name: str, first: EngineWaterfall | None, second: EngineWaterfall | None
) -> EngineComparison:
    before, after = _spells(first), _spells(second)
    return EngineComparison(
        engine=name,
        first_outcome="" if first is None else first.outcome,
        second_outcome="" if second is None else second.outcome,
        first_attempt=0 if first is None else len(attempts_of(first.stages)),
        second_attempt=0 if second is None else len(attempts_of(second.stages)),
        stages=tuple(
            _compare_spells(stage, before.get(stage), after.get(stage))
            for stage in dict.fromkeys([*before, *after])
        ),
    )


def _compare_spells(stage: str, first: _Spell | None, second: _Spell | None) -> StageComparison:
    def sides(name: str) -> Sides:
        return _sides(getattr(first, name, None), getattr(second, name, None))

    return StageComparison(
        stage=stage, seconds=sides("seconds"), bytes=sides("bytes"), gb_per_s=sides("gb_per_s")
    )


def _spells(engine: EngineWaterfall | None) -> dict[str, _Spell]:
    """Stage -> what was done in it in the last attempt, in the order of the starts."""
    if engine is None:
        return {}
    spells: dict[str, _Spell] = {}
    if engine.start_s is not None and engine.end_s is not None:
        spells["update"] = _Spell(engine.end_s - engine.start_s, engine.bytes)
    if engine.paused_s:
        spells["paused"] = _Spell(engine.paused_s)
    last = attempts_of(engine.stages)[-1:]
    for stage in dict.fromkeys(row.stage for rows in last for row in rows):
        rows = [row for rows in last for row in rows if row.stage == stage]
        lasted_s = max(map(end_s, rows)) - min(row.start_s for row in rows)
        spells[stage] = _Spell(lasted_s, sum(row.bytes for row in rows))
    if engine.first_token_s is not None and engine.end_s is not None:
        spells["first token"] = _Spell(max(0.0, engine.first_token_s - engine.end_s))
    return spells


def _sides(first: float | None, second: float | None) -> Sides:
    if first is None or second is None:
        return Sides(first, second, None, None)
    return Sides(first, second, second - first, second / first if first else None)


# ---------------------------------------------------------------------- in one sentence


def _tell(first: Waterfall, second: Waterfall) -> str:
    """`round v8 took 60.0 ms longer than v7 (191 ms against 131 ms): reload took 55.0 ms longer
    (135 ms against 80.0 ms, at 0.67 GB/s against 1.14)`."""
    if second.wall_s is None:
        return _tell_unserved(second, first)
    if first.wall_s is None:
        return _tell_unserved(first, second)
    difference_s = second.wall_s - first.wall_s
    against = f"{format_seconds(second.wall_s)} against {format_seconds(first.wall_s)}"
    if abs(difference_s) <= SAME * max(first.wall_s, second.wall_s):
        return f"rounds {first.round} and {second.round} took the same time ({against})"
    longer = "longer" if difference_s > 0 else "less"
    whole = (
        f"round {second.round} took {format_seconds(abs(difference_s))} {longer} than "
        f"{first.round} ({against})"
    )
    causes = _causes(first, second, difference_s)
    moved = ""
    if first.bytes and abs(second.bytes / first.bytes - 1) > SAME:
        moved = f"; it moved {format_bytes(second.bytes)} against {format_bytes(first.bytes)}"
    return f"{whole}: {'; '.join(causes)}{moved}" if causes else f"{whole}{moved}"


def _tell_unserved(waterfall: Waterfall, other: Waterfall) -> str:
    against = f"nor that of {other.round}"
    if other.wall_s is not None:
        against = f"that of {other.round} was served after {format_seconds(other.wall_s)}"
    why = f": {waterfall.critical_told}" if waterfall.critical_told else ""
    return f"no engine serves the version of round {waterfall.round}, {against}{why}"


def _causes(first: Waterfall, second: Waterfall, difference_s: float) -> list[str]:
    """What the critical paths spent more time on, or less: what made most of the difference first;
    then what went most against it."""
    spent = before, after = _spent(first), _spent(second)
    sign = 1 if difference_s > 0 else -1
    changes = {
        what: sign * (after.get(what, 0.0) - before.get(what, 0.0)) for what in {**before, **after}
    }
    order = sorted(changes, key=lambda what: (-round(changes[what], 9), what))
    enough_s = PART_SHARE * abs(difference_s)
    causes = [
        _tell_cause(what, (first, second), spent)
        for place, what in enumerate(order[:PARTS])
        if changes[what] > (enough_s if place else 0.0)
    ]
    if order and changes[order[-1]] < -enough_s:
        causes.append(f"though {_tell_cause(order[-1], (first, second), spent)}")
    return causes


def _spent(waterfall: Waterfall) -> dict[str, float]:
    """What the critical path does until the last engine serves -> seconds."""
    spent: dict[str, float] = {}
    for step in waterfall.critical_path:
        if step.what != "first_token":
            what = f"waiting for {step.waited_for}" if step.waited_for else step.what
            spent[what] = spent.get(what, 0.0) + step.duration_s
    return spent


def _tell_cause(
    what: str,
    rounds: tuple[Waterfall, Waterfall],
    spent: tuple[Mapping[str, float], Mapping[str, float]],
) -> str:
    before_s, after_s = (each.get(what, 0.0) for each in spent)
    longer = "longer" if after_s > before_s else "less"
    told = f"{what} took {format_seconds(abs(after_s - before_s))} {longer}"
    against = f"{format_seconds(after_s)} against {format_seconds(before_s)}"
    was, now = (_rate(waterfall, what) for waterfall in rounds)
    if was and now:
        against += f", at {now} GB/s against {was}"
    return f"{told} ({against})"


def _rate(waterfall: Waterfall, stage: str) -> str:
    """Of the row of the critical path that moved most, with the share of its link."""
    rows = [
        row
        for engine in waterfall.engines
        for row in engine.stages
        if row.critical and row.stage == stage and row.gb_per_s is not None
    ]
    row = max(rows, key=lambda row: row.bytes, default=None)
    if row is None:
        return ""
    rate = format_rate(row.gb_per_s)
    if row.link_share is None:
        return rate
    faster = f", {FASTER}" if row.link_share > FASTER_SHARE else ""
    return f"{rate} ({format_share(row.link_share)} of its link{faster})"

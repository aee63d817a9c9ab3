"""A comparison of two rounds as lines of text, at any width.

Does no I/O: it is a renderable for a rich console. Columns that do not fit are left out, the least
telling first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Console, ConsoleOptions
from rich.text import Text

from weightbus.tracing.columns import Column, fit_columns
from weightbus.tracing.compare import Comparison, EngineComparison, Sides, StageComparison
from weightbus.tracing.text import format_bytes, format_rate, format_seconds, printable

__all__ = ("CompareView",)

MISSING: Final = "-"


def _seconds(value: float | None) -> str:
    return MISSING if value is None else format_seconds(value)


def _difference(sides: Sides) -> str:
    """`+12.3 ms`."""
    if sides.difference is None:
        return MISSING
    difference_s = round(sides.difference, 9) + 0.0  # no -0
    return f"{'+' if difference_s > 0 else ''}{format_seconds(difference_s)}"


def _ratio(sides: Sides) -> str:
    return "" if sides.ratio is None else f"{sides.ratio:.2f}x"


def _bytes(sides: Sides) -> str:
    """Once, if both moved as much."""
    told = dict.fromkeys(format_bytes(int(side)) for side in (sides.first, sides.second) if side)
    return " / ".join(told)


COLUMNS: Final = (
    Column[StageComparison](" ", lambda row: "", 0),
    Column[StageComparison]("stage", lambda row: row.stage, 0),
    Column[StageComparison]("first", lambda row: _seconds(row.seconds.first), 1, True),
    Column[StageComparison]("second", lambda row: _seconds(row.seconds.second), 1, True),
    Column[StageComparison]("difference", lambda row: _difference(row.seconds), 0, True),
    Column[StageComparison]("ratio", lambda row: _ratio(row.seconds), 2, True),
    Column[StageComparison]("GB/s", lambda row: format_rate(row.gb_per_s.first), 3, True),
    Column[StageComparison]("GB/s", lambda row: format_rate(row.gb_per_s.second), 3, True),
    Column[StageComparison]("bytes", lambda row: _bytes(row.bytes), 4, True),
)


class CompareView:
    """Renders one `Comparison`."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        comparison = self.comparison
        rows = [stage for engine in comparison.engines for stage in engine.stages]
        columns = fit_columns(COLUMNS, rows, options.max_width)
        yield from _heading(comparison)
        yield Text("")
        yield columns.titles()
        for engine in comparison.engines:
            yield _engine_line(engine)
            for row in engine.stages:
                yield columns.line(row)
        yield Text("")
        yield Text(printable(comparison.told))
        yield Text(
            "a stage lasts from its first rank's start to its last rank's end; update: from "
            "hearing of the version to serving it; ratio: second over first; GB = 10^9 bytes",
            style="dim",
        )


def _heading(comparison: Comparison) -> Iterator[Text]:
    rounds = (
        ("first ", comparison.first_round, comparison.first_version, comparison.wall_s.first),
        ("second", comparison.second_round, comparison.second_version, comparison.wall_s.second),
    )
    for place, round_id, version, wall_s in rounds:
        served = "no engine serves it" if wall_s is None else f"served after {_seconds(wall_s)}"
        yield Text.assemble(
            (f"{place} round ", "dim"), (round_id, "bold"), ("  model ", "dim"), comparison.model,
            ("  version ", "dim"), (str(version), "bold"), f"  {served}",
        )  # fmt: skip


def _engine_line(engine: EngineComparison) -> Text:
    told = [
        _outcome(engine.first_outcome, engine.first_attempt),
        _outcome(engine.second_outcome, engine.second_attempt),
    ]
    outcomes = told[0] if told[0] == told[1] else f"{told[0]}, then {told[1]}"
    return Text.assemble((engine.engine, "bold"), f"  {outcomes}")


def _outcome(outcome: str, attempt: int) -> str:
    """`complete`; `complete (attempt 2)` where there was more than one."""
    return (outcome or "not there") + (f" (attempt {attempt})" if attempt > 1 else "")

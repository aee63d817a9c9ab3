"""A waterfall as lines of text, at any width, with and without colour.

Does no I/O: it is a renderable for a rich console, whose width and encoding it keeps to. What does
not fit is left out column by column, the least telling first; the bars take what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from msgspec import Struct
from rich.console import Console, ConsoleOptions
from rich.text import Text

from weightbus.tracing.text import format_bytes, format_rate, format_seconds, printable
from weightbus.tracing.waterfall import EngineWaterfall, StageRow, Waterfall

__all__ = ("WaterfallView",)

BAR_SHARE: Final = 0.3
"""Columns give way until the bars have this much of the width."""

OUTCOME_STYLES: Final = {"complete": "green", "failed": "bold red", "unfinished": "yellow"}

STAGE_STYLES: Final = {
    "negotiate": "blue",
    "fetch": "cyan",
    "h2d": "magenta",
    "broadcast": "yellow",
    "reload": "green",
    "commit": "bright_black",
}


class Column(Struct, frozen=True):
    """One column of the stage rows."""

    title: str
    cells: int
    """Width, without the gap of one cell that follows."""
    text: Callable[[StageRow], str]
    align_right: bool
    rank: int
    """Columns of a higher rank are left out first."""


COLUMNS: Final = (
    Column("rank", 4, lambda row: "all" if row.rank is None else str(row.rank), True, 0),
    Column("stage", 9, lambda row: row.stage, False, 0),
    Column("route", 9, lambda row: row.route or "", False, 5),
    Column("start", 8, lambda row: format_seconds(row.start_s), True, 3),
    Column("time", 8, lambda row: format_seconds(row.duration_s), True, 1),
    Column("bytes", 8, lambda row: format_bytes(row.bytes) if row.bytes else "", True, 4),
    Column("GB/s", 5, lambda row: format_rate(row.gb_per_s), True, 2),
)


class WaterfallView:
    """Renders one `Waterfall`."""

    def __init__(self, waterfall: Waterfall) -> None:
        self.waterfall = waterfall

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        columns, bar_cells = _layout(options.max_width)
        ok, failed = ("#", "x") if options.ascii_only else ("█", "▒")
        yield from _heading(self.waterfall)
        yield Text("")
        yield _titles(columns, bar_cells, self.waterfall.span_s)
        for engine in self.waterfall.engines:
            told = ": ".join(filter(None, (engine.cause, engine.reason)))
            yield _engine_line(engine, told)
            for row in engine.stages:
                bar = _bar(row, bar_cells, self.waterfall.span_s, ok if row.ok else failed)
                yield _stage_line(columns, row, bar)
                if row.error and row.error != told:
                    yield Text(f"     {printable(row.error)}", style="red")
        yield Text("")
        yield _total(self.waterfall)
        yield _legend(self.waterfall, ok, failed)


def _layout(width: int) -> tuple[tuple[Column, ...], int]:
    """The columns that fit, and the cells left for bars (0: none fit)."""
    for least in sorted({column.rank for column in COLUMNS}, reverse=True):
        columns = tuple(column for column in COLUMNS if column.rank <= least)
        bar_cells = width - sum(column.cells + 1 for column in columns)
        if bar_cells >= width * BAR_SHARE:
            break
    return columns, max(0, bar_cells)


def _heading(waterfall: Waterfall) -> Iterator[Text]:
    plan = f"led by {waterfall.leader}, epoch {waterfall.epoch}" if waterfall.leader else "no plan"
    state = "" if waterfall.complete else ", not closed yet"
    yield Text.assemble(
        ("round ", "dim"), (waterfall.round, "bold"),
        ("  model ", "dim"), waterfall.model,
        ("  version ", "dim"), (str(waterfall.version), "bold"),
        f"  {plan}{state}",
    )  # fmt: skip
    if waterfall.trace_id:
        yield Text.assemble(("trace ", "dim"), waterfall.trace_id)


def _titles(columns: tuple[Column, ...], bar_cells: int, span_s: float) -> Text:
    line = _cells(columns, [column.title for column in columns])
    end = format_seconds(span_s)
    if bar_cells >= len(end) + 2:
        line.append("0" + end.rjust(bar_cells - 1))
    line.stylize("dim")
    return _one_line(line)


def _engine_line(engine: EngineWaterfall, told: str) -> Text:
    """`a  complete after 350 ms, verified, local, 90.9 MB, paused 12.0 ms`."""
    parts = [] if engine.end_s is None else [f"after {format_seconds(engine.end_s)}"]
    if engine.verified is not None:
        parts.append("verified" if engine.verified == "verified" else "no digest offered")
    if engine.routes:
        reasons = f" ({printable('; '.join(engine.plan_reasons))})" if engine.plan_reasons else ""
        parts.append("+".join(engine.routes) + reasons)
    if engine.bytes:
        parts.append(format_bytes(engine.bytes))
    if engine.paused_s:
        parts.append(f"paused {format_seconds(engine.paused_s)}")
    if engine.quarantined:
        parts.append("quarantined")
    if told:
        parts.append(printable(told))
    line = Text.assemble((engine.engine, "bold"), "  ")
    line.append(engine.outcome, OUTCOME_STYLES[engine.outcome])
    return line.append(" " + ", ".join(parts) if parts else "")


def _bar(row: StageRow, bar_cells: int, span_s: float, glyph: str) -> str:
    """At least one cell, never beyond the end."""
    if bar_cells == 0:
        return ""
    per_second = bar_cells / span_s if span_s > 0 else 0.0
    start = min(int(row.start_s * per_second), bar_cells - 1)
    end = min(round((row.start_s + row.duration_s) * per_second), bar_cells)
    return " " * start + glyph * max(1, end - start)


def _total(waterfall: Waterfall) -> Text:
    counts = {
        outcome: sum(engine.outcome == outcome for engine in waterfall.engines)
        for outcome in OUTCOME_STYLES
    }
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    line = Text.assemble(("total ", "bold"), f"{len(waterfall.engines)} engines: {told}")
    if waterfall.wall_s is not None:
        since = "CheckpointReady" if waterfall.origin == "checkpoint_ready" else "the first message"
        line.append(
            f"; {format_bytes(waterfall.bytes)} in {format_seconds(waterfall.wall_s)}"
            f" from {since} to the last engine serving"
        )
        if waterfall.gb_per_s is not None:
            line.append(f" ({format_rate(waterfall.gb_per_s)} GB/s)")
    return line


def _legend(waterfall: Waterfall, ok: str, failed: str) -> Text:
    since = (
        "the creation of CheckpointReady"
        if waterfall.origin == "checkpoint_ready"
        else "the earliest message (that of CheckpointReady is gone, or its clock is ahead)"
    )
    return Text(
        f"{ok} a stage, {failed} a failed one; start is counted from {since}; "
        "rank all: the whole engine; GB = 10^9 bytes",
        style="dim",
    )


def _stage_line(columns: tuple[Column, ...], row: StageRow, bar: str) -> Text:
    line = _cells(columns, [column.text(row) for column in columns])
    return _one_line(line.append(bar, STAGE_STYLES.get(row.stage, "") if row.ok else "red"))


def _cells(columns: tuple[Column, ...], texts: Iterable[str]) -> Text:
    line = Text()
    for column, text in zip(columns, texts, strict=True):
        cell = text[: column.cells]
        line.append((cell.rjust if column.align_right else cell.ljust)(column.cells) + " ")
    return line


def _one_line(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "crop"
    line.rstrip()
    return line

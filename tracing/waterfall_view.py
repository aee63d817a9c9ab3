"""A waterfall as lines of text, at any width, with and without colour.

Does no I/O: it is a renderable for a rich console, whose width and encoding it keeps to. What does
not fit is left out column by column, the least telling first; the bars take what is left. Rows on
the critical path have a `*`, and their bars are bold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from rich.console import Console, ConsoleOptions
from rich.text import Text

from weightbus.schemas.base import Stage
from weightbus.tracing.columns import Column, Columns, fit_columns
from weightbus.tracing.critical_told import FASTER, FASTER_SHARE, format_share
from weightbus.tracing.text import counted, format_bytes, format_rate, format_seconds, printable
from weightbus.tracing.waterfall import EngineWaterfall, Origin, StageRow, Waterfall

__all__ = ("WaterfallView",)

BAR_SHARE: Final = 0.3
"""Columns give way until the bars have this much of the width."""

OUTCOME_STYLES: Final = {"complete": "green", "failed": "bold red", "unfinished": "yellow"}

SINCE: Final[Mapping[Origin, str]] = {
    "checkpoint_ready": "CheckpointReady",
    "stored": "CheckpointReady",
    "heard": "hearing of it",
    "earliest": "the first message",
}

COUNTED_FROM: Final[Mapping[Origin, str]] = {
    "checkpoint_ready": "the creation of CheckpointReady",
    "stored": "when the bus had CheckpointReady (its trainer's clock is ahead)",
    "heard": "when its first engine heard of it (it came after the version)",
    "earliest": "the earliest message (that of CheckpointReady is gone, or its clock is ahead)",
}

STAGE_STYLES: Final[Mapping[Stage, str]] = {
    "negotiate": "blue",
    "fetch": "cyan",
    "h2d": "magenta",
    "broadcast": "yellow",
    "reload": "green",
    "commit": "bright_black",
}


CRITICAL: Final = "*"


def _link(row: StageRow) -> str:
    """`61 % memory`, or the link alone if its rate was not measured."""
    return f"{format_share(row.link_share)} {row.link}".strip()


COLUMNS: Final = (
    Column[StageRow]("", lambda row: CRITICAL if row.critical else "", 0),
    Column[StageRow]("rank", lambda row: "all" if row.rank is None else str(row.rank), 0, True),
    Column[StageRow]("stage", lambda row: row.stage, 0),
    Column[StageRow]("route", lambda row: row.route or "", 6),
    Column[StageRow]("start", lambda row: format_seconds(row.start_s), 3, True),
    Column[StageRow]("time", lambda row: format_seconds(row.duration_s), 1, True),
    Column[StageRow]("bytes", lambda row: format_bytes(row.bytes) if row.bytes else "", 4, True),
    Column[StageRow]("GB/s", lambda row: format_rate(row.gb_per_s), 2, True),
    Column[StageRow]("link", _link, 5, True),
)


class WaterfallView:
    """Renders one `Waterfall`."""

    def __init__(self, waterfall: Waterfall) -> None:
        self.waterfall = waterfall

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        waterfall = self.waterfall
        rows = [row for engine in waterfall.engines for row in engine.stages]
        columns = fit_columns(COLUMNS, rows, options.max_width * (1 - BAR_SHARE))
        bar_cells = max(0, options.max_width - columns.cells)
        ok, failed = ("#", "x") if options.ascii_only else ("█", "▒")
        yield from _heading(waterfall)
        yield Text("")
        yield _titles(columns, bar_cells, waterfall.span_s)
        for engine in waterfall.engines:
            told = ": ".join(filter(None, (engine.cause, engine.reason)))
            yield _engine_line(engine, told)
            for row in engine.stages:
                bar = _bar(row, bar_cells, waterfall.span_s, ok if row.ok else failed)
                style = STAGE_STYLES[row.stage] if row.ok else "red"
                yield columns.line(row).append(bar, f"bold {style}" if row.critical else style)
                if row.error and row.error != told:
                    yield Text(f"     {printable(row.error)}", style="red")
        for late in waterfall.late:
            told = f"  late {printable(late.told)}"
            yield Text.assemble((late.engine, "bold"), (told, "yellow"))
        yield Text("")
        yield _total(waterfall)
        yield from _critical(waterfall)
        yield _legend(waterfall, ok, failed)


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


def _titles(columns: Columns[StageRow], bar_cells: int, span_s: float) -> Text:
    line = columns.titles()
    end = format_seconds(span_s)
    if bar_cells >= len(end) + 2:
        line.append("0" + end.rjust(bar_cells - 1), "dim")
    return line


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
    if engine.first_token_s is not None:
        parts.append(f"first token after {format_seconds(engine.first_token_s)}")
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
    engines = counted(len(waterfall.engines), "engine")
    line = Text.assemble(("total ", "bold"), f"{engines}: {told}")
    if waterfall.wall_s is not None:
        line.append(
            f"; {format_bytes(waterfall.bytes)} in {format_seconds(waterfall.wall_s)}"
            f" from {SINCE[waterfall.origin]} to the last engine serving"
        )
        if waterfall.gb_per_s is not None:
            line.append(f" ({format_rate(waterfall.gb_per_s)} GB/s)")
    return line


def _critical(waterfall: Waterfall) -> Iterator[Text]:
    """The path in one sentence, then step by step."""
    if not waterfall.critical_told:
        return
    yield Text.assemble(("critical path: ", "bold"), printable(waterfall.critical_told))
    steps = (
        f"{step.what} {format_seconds(step.duration_s)}"
        + (f" ({printable(step.waited_for)})" if step.waited_for else "")
        for step in waterfall.critical_path
    )
    yield Text(", ".join(steps), style="dim")


def _legend(waterfall: Waterfall, ok: str, failed: str) -> Text:
    shares = [row.link_share or 0.0 for engine in waterfall.engines for row in engine.stages]
    faster = f" ({FASTER})" if max(shares, default=0.0) > FASTER_SHARE else ""
    return Text(
        f"{ok} a stage, {failed} a failed one, {CRITICAL} on the critical path; "
        f"start is counted from {COUNTED_FROM[waterfall.origin]}; {_clocks(waterfall)}; "
        f"rank all: the whole engine; link: how much of its measured rate was used{faster}; "
        "GB = 10^9 bytes",
        style="dim",
    )


def _clocks(waterfall: Waterfall) -> str:
    """By how much the times may be off, or that nobody knows."""
    residuals = [engine.clock_residual_s for engine in waterfall.engines]
    if waterfall.origin == "checkpoint_ready":
        residuals.append(waterfall.clock_residual_s)
    known = [residual for residual in residuals if residual is not None]
    if len(known) < len(residuals) or not known:
        return "some clocks were not compared with that of the bus"
    return f"clocks are off by {format_seconds(max(known))} at most"

"""A fleet as tables of text, at any width, with and without colour.

Does no I/O: it is a renderable for a rich console.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Console, ConsoleOptions
from rich.text import Text

from weightbus.tracing.columns import Column, fit_columns
from weightbus.tracing.fleet import EngineView, FleetView, RoundView
from weightbus.tracing.narration import time_of_day
from weightbus.tracing.text import format_bytes, format_rate, format_seconds, printable

__all__ = ("FleetTables",)

STATUS_STYLES: Final = {
    "starting": "yellow",
    "serving": "green",
    "updating": "cyan",
    "quarantined": "bold red",
    "stopping": "yellow",
    "gone": "dim",
}


ENGINE_COLUMNS: Final = (
    Column[EngineView]("model", lambda engine: engine.model, 0),
    Column[EngineView]("engine", lambda engine: engine.engine, 0),
    Column[EngineView]("status", lambda engine: engine.status, 0),
    Column[EngineView]("version", lambda engine: _version(engine.version), 0, True),
    Column[EngineView]("target", lambda engine: _version(engine.target_version), 1, True),
    Column[EngineView](
        "lag", lambda engine: "" if engine.lag is None else str(engine.lag), 1, True
    ),
    Column[EngineView]("update", lambda engine: _duration(engine.update_s), 2, True),
    Column[EngineView]("token", lambda engine: _duration(engine.first_token_s), 6, True),
    Column[EngineView](
        "bytes", lambda engine: format_bytes(engine.bytes) if engine.bytes else "", 7, True
    ),
    Column[EngineView]("GB/s", lambda engine: format_rate(engine.gb_per_s), 4, True),
    Column[EngineView]("route", lambda engine: "+".join(engine.routes), 5),
    Column[EngineView]("proof", lambda engine: engine.verified or "", 3),
    Column[EngineView]("ranks", lambda engine: str(engine.ranks or ""), 8, True),
)


class FleetTables:
    """Renders one `FleetView`."""

    def __init__(self, fleet: FleetView) -> None:
        self.fleet = fleet

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        fleet = self.fleet
        newest = ", ".join(f"{model} {version}" for model, version in fleet.newest.items())
        yield Text.assemble(("newest versions  ", "dim"), newest or "none announced")
        yield Text("")
        if fleet.engines:
            columns = fit_columns(ENGINE_COLUMNS, fleet.engines, options.max_width)
            yield columns.titles()
            for engine in fleet.engines:
                line = columns.line(engine)
                line.stylize(STATUS_STYLES[engine.status])
                yield line
        else:
            yield Text("no engines")
        if fleet.rounds or fleet.failures or fleet.skipped or fleet.dead_letters:
            yield Text("")
        yield from map(_round_line, fleet.rounds)
        for failure in fleet.failures:
            what, style = ("came late", "yellow") if failure.late else ("failed", "red")
            yield Text.assemble(
                (f"{time_of_day(failure.failed_ns)} {what} ", style),
                f"{failure.model} {failure.engine} version {failure.version}: ",
                printable(f"{failure.cause}: {failure.reason}"),
                " (quarantined)" if failure.quarantined else "",
            )
        for skipped in fleet.skipped:
            yield Text.assemble(
                (f"{time_of_day(skipped.skipped_ns)} skipped ", "yellow"),
                f"{skipped.model} version {skipped.version} by {skipped.producer}: ",
                printable(f"{skipped.cause}: {skipped.reason}"),
            )
        for letter in fleet.dead_letters:
            yield Text.assemble(
                (f"{time_of_day(letter.reported_ns)} dead letter ", "red"),
                printable(f"{letter.subject}: {letter.reason}"),
            )


def _round_line(each: RoundView) -> Text:
    """`round v7 of minilm: 1.23 s, epoch 1, waiting for b, completed a, last b/0 fetch`."""
    plan = f"epoch {each.epoch} led by {each.leader}" if each.epoch >= 0 else "no plan yet"
    parts = [format_seconds(each.age_s), plan]
    for title, engines in (
        ("waiting for", each.waiting),
        ("completed", each.completed),
        ("failed", each.failed),
    ):
        if engines:
            parts.append(f"{title} {' '.join(engines)}")
    if each.last_stage:
        parts.append(f"last {each.last_stage}")
    line = Text.assemble(("round ", "cyan"), f"{each.round} of {each.model}: {', '.join(parts)}")
    return line.append(", overdue", "bold red") if each.overdue else line


def _version(version: int) -> str:
    return "" if version < 0 else str(version)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else format_seconds(seconds)

"""`weightbus trace`: where the time of one round went, from the history that the bus keeps."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import anyio
import anyio.to_thread
import click
import msgspec
from msgspec import Struct
from rich.console import Console, RenderableType

from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.cli.monitoring import close_broken_pipe, running_bus
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan
from weightbus.tracing.compare import Comparison, compare_rounds
from weightbus.tracing.compare_view import CompareView
from weightbus.tracing.errors import RoundUnknown
from weightbus.tracing.exports.formats import FORMATS
from weightbus.tracing.history import Told, build_waterfall, summarise_rounds
from weightbus.tracing.text import NS_PER_S
from weightbus.tracing.waterfall import ROUND_MESSAGES, RoundSummary, Waterfall
from weightbus.tracing.waterfall_view import WaterfallView

__all__ = ("command", "latest_rounds", "read_history")

ROUNDS_LISTED: Final = 5
"""How many rounds an error names."""

WINDOWS_S: Final = (60, 3600)
"""How far the newest round is looked for, one after the other; then everything is read."""


M = TypeVar("M", bound=Message)
Shown = TypeVar("Shown", Waterfall, Comparison)


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for."""

    bus: BusSettings
    rounds: tuple[str | None, ...]
    """None: the newest one."""
    model: str | None


@click.command("trace")
@click.argument("round_id", metavar="[ROUND]", required=False)
@click.option("--model", help="Model of the round; needed when several were updated lately.")
@click.option("--nats", "nats_url", help="NATS URL; else WEIGHTBUS_NATS_URL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.option(
    "--compare", nargs=2, metavar="ROUND1 ROUND2", help="What differs between two rounds, and why."
)
@click.option(
    "--export",
    "format_name",
    type=click.Choice(list(FORMATS)),
    help="Write the round for Perfetto, for an OTLP collector, or as one HTML file.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to; else it goes to standard output.",
)
def command(
    round_id: str | None,
    model: str | None,
    nats_url: str | None,
    as_json: bool,
    compare: tuple[str, str] | None,
    format_name: str | None,
    output: Path | None,
) -> None:
    """Show every stage of a round as a bar: of the newest one, or of ROUND.

    Times count from the creation of CheckpointReady, or from when the first engine heard of it if
    that came late, by the clock of the bus; the total is the time until the last engine served the
    version. Stages on the critical path, which is that engine's, have a *. An engine that came when
    the round was over, and gave up, has a line of its own and counts for nothing else. Needs no
    collector: the bus itself remembers the last rounds.

    --json prints model, version, round, epoch, leader, producer, trace_id, publish_span_id,
    complete, origin, origin_ns, late_s, clock_residual_s, stored_s, wall_s, span_s, bytes,
    gb_per_s, critical_told, and critical_path: a list of what, engine, rank, start_s, duration_s,
    waited_for; and engines: a list of engine, host_id, outcome, verified, routes, plan_reasons,
    epoch, leader, bytes, start_s, joined_s, planned_s, end_s, first_token_start_s, first_token_s,
    paused_s, cause, reason, quarantined, clock_residual_s, trace_id, span_id, first_token_span_id,
    and stages: a list of stage, rank, route, start_s, duration_s, bytes, gb_per_s, link,
    link_share, buckets, critical, ok, error, span_id, parent_span_id. Buckets are start_s,
    duration_s, bytes. late is a list like engines, with attempts and told besides: of those who
    came when the round was over, and gave up.

    With --compare it prints model, first_round, second_round, first_version, second_version,
    wall_s, bytes, gb_per_s, told, and engines: a list of engine, first_outcome, second_outcome,
    first_attempt, second_attempt, and stages: a list of stage, seconds, bytes, gb_per_s. Times,
    bytes and rates are first, second, difference, ratio.

    Exit codes: 0 shown, 1 no such round or no bus, 2 used wrongly.
    """
    _check_usage(round_id, as_json, compare, format_name, output)
    bus = running_bus(nats_url, "weightbus-trace")
    options = Options(bus=bus, rounds=compare or (round_id,), model=model)
    waterfalls = anyio.run(_trace, options)
    try:
        if compare:
            first, second = waterfalls
            if first.model != second.model:
                told = f"{first.round} is of {first.model}, {second.round} of {second.model}"
                raise click.UsageError(f"only rounds of one model can be compared: {told}")
            _show(compare_rounds(first, second), CompareView, as_json)
        elif format_name is None:
            _show(waterfalls[0], WaterfallView, as_json)
        else:
            _export(waterfalls[0], format_name, output)
    except BrokenPipeError:
        close_broken_pipe()


def _check_usage(
    round_id: str | None,
    as_json: bool,
    compare: tuple[str, str] | None,
    format_name: str | None,
    output: Path | None,
) -> None:
    """What cannot be meant together."""
    if compare and (option := next((each for each in compare if each.startswith("--")), "")):
        raise click.UsageError(f"--compare needs ROUND1 and ROUND2: one is missing before {option}")
    if compare and round_id is not None:
        raise click.UsageError("--compare names both rounds; ROUND is one too many")
    if format_name is not None and (compare or as_json):
        raise click.UsageError("--export is instead of --json and --compare")
    if output is not None and format_name is None:
        raise click.UsageError("--output needs --export")


def _show(told: Shown, view: Callable[[Shown], RenderableType], as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(told))
    else:
        Console().print(view(told))


def _export(waterfall: Waterfall, format_name: str, output: Path | None) -> None:
    text = FORMATS[format_name].make(waterfall)
    if output is None:
        click.echo(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(output), error.strerror) from None
    click.echo(f"round {waterfall.round} of {waterfall.model} is in {output} ({format_name})")


async def _trace(options: Options) -> tuple[Waterfall, ...]:
    async with open_bus(options.bus) as bus:
        return tuple([await _read(bus, options, round_id) for round_id in options.rounds])


async def _read(bus: Bus, options: Options, round_id: str | None) -> Waterfall:
    chosen = await _choose(bus, options.model, round_id)
    history = await read_history(bus, chosen)
    waterfall = await anyio.to_thread.run_sync(build_waterfall, chosen.model, chosen.round, history)
    if waterfall is None:  # it was forgotten between the two looks
        raise RoundUnknown(chosen.round, chosen.model, ())
    return waterfall


async def read_history(bus: Bus, chosen: RoundSummary) -> Sequence[Told]:
    """The messages of one round, and the announcements of its model: of what came after it, which
    may be days of rounds, nothing is kept."""
    told = bus.replay(
        *ROUND_MESSAGES, model=chosen.model, since_ns=chosen.first_ns, is_answered=False
    )
    history: list[Told] = [
        each
        async for each in told
        if isinstance(each.message, ROUND_MESSAGES) and each.message.round == chosen.round
    ]
    announced = bus.replay(CheckpointReady, model=chosen.model, is_answered=False)
    return history + [each async for each in announced]


async def _choose(bus: Bus, model: str | None, round_id: str | None) -> RoundSummary:
    if round_id is None:
        latest = _of_one_model(await _latest_of(bus, model))
        if not latest:
            raise RoundUnknown(None, model, ())
        model, round_id = latest[-1].model, latest[-1].round
    # Of all time: a round may have begun before the window in which it was found.
    told = bus.replay(
        Join, RoundPlan, RoundComplete, model=model, round=round_id, is_answered=False
    )
    found = _of_one_model(await _summaries(told))
    if not found:
        raise RoundUnknown(round_id, model, _recent(await _latest_of(bus, model)))
    return found[-1]


async def latest_rounds(
    rounds_since: Callable[[int], Awaitable[Sequence[RoundSummary]]], now_ns: int
) -> Sequence[RoundSummary]:
    """The rounds of the shortest of `WINDOWS_S` that holds any, else of all time.

    `rounds_since` is asked for those since a time in ns. Where our clock is not the bus's, more or
    less is read, and the newest round is found all the same.
    """
    for window_s in WINDOWS_S:
        if rounds := await rounds_since(now_ns - window_s * NS_PER_S):
            return rounds
    return await rounds_since(0)


async def _latest_of(bus: Bus, model: str | None) -> Sequence[RoundSummary]:
    """By their joins alone: the end of an older round may come after a newer one has begun."""

    async def rounds_since(since_ns: int) -> Sequence[RoundSummary]:
        return await _summaries(bus.replay(Join, model=model, since_ns=since_ns, is_answered=False))

    return await latest_rounds(rounds_since, time.time_ns())


async def _summaries(told: AsyncIterator[Received[M]]) -> Sequence[RoundSummary]:
    return summarise_rounds([each async for each in told])


def _of_one_model(rounds: Sequence[RoundSummary]) -> Sequence[RoundSummary]:
    models = sorted({each.model for each in rounds})
    if len(models) > 1:
        raise click.UsageError(f"the bus has several models, choose --model: {', '.join(models)}")
    return rounds


def _recent(rounds: Sequence[RoundSummary]) -> tuple[str, ...]:
    newest_first = reversed(rounds[-ROUNDS_LISTED:])
    return tuple(f"{each.round} of {each.model}" for each in newest_first)

"""`weightbus trace`: where the time of one round went, from the history that the bus keeps."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import click
import msgspec
from msgspec import Struct
from rich.console import Console

from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.settings import BusSettings
from weightbus.cli.monitoring import close_broken_pipe, running_bus
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan
from weightbus.tracing.errors import RoundUnknown
from weightbus.tracing.waterfall import (
    ROUND_MESSAGES,
    RoundSummary,
    Waterfall,
    build_waterfall,
    summarise_rounds,
)
from weightbus.tracing.waterfall_view import WaterfallView

__all__ = ("command",)

ROUNDS_LISTED = 5
"""How many rounds an error names."""


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for."""

    bus: BusSettings
    round: str | None
    model: str | None


@click.command("trace")
@click.argument("round_id", metavar="[ROUND]", required=False)
@click.option("--model", help="Model of the round; needed when the bus has several.")
@click.option("--nats", "nats_url", help="NATS URL; else WEIGHTBUS_NATS_URL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def command(round_id: str | None, model: str | None, nats_url: str | None, as_json: bool) -> None:
    """Show every stage of a round as a bar: of the newest one, or of ROUND.

    Times count from the creation of CheckpointReady; the total is the time until the last engine
    served the version. Needs no collector: the bus itself remembers the last rounds.

    --json prints model, version, round, epoch, leader, trace_id, complete, origin, origin_ns,
    wall_s, span_s, bytes, gb_per_s, and engines: a list of engine, outcome, verified, routes,
    plan_reasons, bytes, start_s, end_s, paused_s, cause, reason, quarantined, and stages: a list of
    stage, rank, route, start_s, duration_s, bytes, gb_per_s, ok, error.

    Exit codes: 0 shown, 1 no such round or no bus, 2 used wrongly.
    """
    bus = running_bus(nats_url, "weightbus-trace")
    waterfall = anyio.run(_trace, Options(bus=bus, round=round_id, model=model))
    try:
        if as_json:
            click.echo(msgspec.json.encode(waterfall))
        else:
            Console().print(WaterfallView(waterfall))
    except BrokenPipeError:
        close_broken_pipe()


async def _trace(options: Options) -> Waterfall:
    async with open_bus(options.bus) as bus:
        chosen = await _choose(bus, options)
        messages = [
            received.message
            async for received in bus.replay(
                *ROUND_MESSAGES, model=chosen.model, since_ns=chosen.first_ns
            )
        ]
        announced = await bus.last(CheckpointReady, model=chosen.model)
        if announced is not None:
            messages.append(announced.message)
        waterfall = build_waterfall(chosen.model, chosen.round, messages)
        if waterfall is None:  # it was forgotten between the two looks
            raise RoundUnknown(chosen.round, chosen.model, ())
        return waterfall


async def _choose(bus: Bus, options: Options) -> RoundSummary:
    history = [
        (received.message, received.received_ns)
        async for received in bus.replay(Join, RoundPlan, RoundComplete, model=options.model)
    ]
    rounds = summarise_rounds(history)
    matching = [each for each in rounds if options.round in (None, each.round)]
    if not matching:
        raise RoundUnknown(options.round, options.model, _recent(rounds))
    models = sorted({each.model for each in matching})
    if len(models) > 1:
        raise click.UsageError(f"the bus has several models, choose --model: {', '.join(models)}")
    return matching[-1]


def _recent(rounds: Sequence[RoundSummary]) -> tuple[str, ...]:
    newest_first = reversed(rounds[-ROUNDS_LISTED:])
    return tuple(f"{each.round} of {each.model}" for each in newest_first)

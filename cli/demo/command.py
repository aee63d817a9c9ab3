"""The command itself: puts bus, fleet and story together, and shows what came of them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import anyio
import click
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.settings import BusSettings
from weightbus.cli.demo.fleet import DemoFailed, open_fleet
from weightbus.cli.demo.story import Checked, Say, Story, tell
from weightbus.cli.until import open_stop
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.tracing.waterfall import ROUND_MESSAGES, Waterfall, build_waterfall
from weightbus.tracing.waterfall_view import WaterfallView

__all__ = ("command",)


class EngineResult(Struct, frozen=True):
    """Where one engine ended."""

    version: int
    verified: bool
    routes: tuple[str, ...]


class Result(Struct, frozen=True, kw_only=True):
    """What `--json` prints as the last line."""

    ok: bool
    """Every version was verified in every engine that was there."""
    versions: tuple[int, ...]
    engines: dict[str, EngineResult]
    routes_used: tuple[str, ...]
    update_seconds: tuple[float, ...]
    """From hearing of a version to serving it, for every update, in order."""
    trace_ids: tuple[str, ...]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on the last line.")
def command(as_json: bool) -> None:
    """Train, publish and follow a few versions on this machine, and verify each.

    A trainer fine-tunes a real sentence encoder (MiniLM) and trains a small mixture-of-experts
    decoder. Two engines follow the encoder, one with two tensor-parallel ranks the decoder. One is
    killed and comes back. After every version each engine's parameters and answers are compared
    with the trainer's. Exit code 0 only if everything was verified.
    """
    ok = anyio.run(_run, as_json)
    if ok is None:
        raise click.Abort
    if not ok:
        sys.exit(1)


async def _run(as_json: bool) -> bool | None:
    """Whether everything was verified; None: interrupted."""
    console = Console(highlight=False)
    begin = time.monotonic()

    def say(text: str) -> None:
        time_s = time.monotonic() - begin
        console.print(f"[dim]{time_s:6.1f} s[/dim]  {escape(text)}", soft_wrap=True)

    settings = BusSettings(name="demo", server_path=BusSettings.from_env(os.environ).server_path)
    async with open_stop() as stop:
        with tempfile.TemporaryDirectory(prefix="weightbus-demo-") as directory:
            story, waterfall = await _follow(settings, Path(directory), say)
    if stop.came:
        return None
    result = _result(story)
    _show(console, story, waterfall, result)
    if as_json:
        click.echo(msgspec.json.encode(result))
    return result.ok


async def _follow(settings: BusSettings, directory: Path, say: Say) -> tuple[Story, Waterfall]:
    """The whole demo; returns with every process ended."""
    async with (
        open_bus(settings) as bus,
        open_fleet(directory, bus.url, bus.prefix) as fleet,
        anyio.create_task_group() as group,
    ):
        say(f"bus at {bus.url}; try `weightbus watch --nats {bus.url}` beside it")
        story = Story(bus, fleet, say)
        await group.start(story.listen)
        await tell(story, fleet, say)
        waterfall = await _last_round(bus, story)
        group.cancel_scope.cancel()
    return story, waterfall


async def _last_round(bus: Bus, story: Story) -> Waterfall:
    """The waterfall of the round of the last update that two engines shared."""
    update = next(
        checked.update for checked in reversed(story.checked) if checked.spec.model == "minilm"
    )
    messages = [
        received.message
        async for received in bus.replay(*ROUND_MESSAGES, CheckpointReady, model=update.model)
    ]
    waterfall = build_waterfall(update.model, update.round, messages)
    if waterfall is None:
        raise DemoFailed(f"round {update.round}", "the bus remembers nothing of it")
    return waterfall


def _result(story: Story) -> Result:
    newest = {checked.spec.engine: checked for checked in story.checked}
    updates = [checked.update for checked in story.checked]
    return Result(
        ok=not story.dead_letters and not any(checked.faults for checked in story.checked),
        versions=tuple(sorted({update.version for update in updates})),
        engines={
            engine: EngineResult(
                version=checked.update.version,
                verified=not any(c.faults for c in story.checked if c.spec.engine == engine),
                routes=checked.update.routes,
            )
            for engine, checked in sorted(newest.items())
        },
        routes_used=tuple(sorted({route for update in updates for route in update.routes})),
        update_seconds=tuple(round(checked.seconds, 6) for checked in story.checked),
        trace_ids=tuple(dict.fromkeys(update.trace_id for update in updates)),
    )


def _show(console: Console, story: Story, waterfall: Waterfall, result: Result) -> None:
    table = Table(title="Every version in every engine", title_justify="left")
    for heading in ("model", "version", "engine", "ranks", "route", "update", "paused", "holds"):
        table.add_column(heading, justify="right" if heading in ("update", "paused") else "left")
    for checked in sorted(story.checked, key=_by_model):
        update = checked.update
        table.add_row(
            update.model,
            str(update.version),
            update.engine,
            str(checked.spec.ranks),
            ", ".join(update.routes),
            f"{checked.seconds * 1e3:.0f} ms",
            f"{update.paused_s * 1e3:.0f} ms",
            Text("; ".join(checked.faults) or "the same bits"),
        )
    console.print()
    console.print(table)
    console.print()
    console.print(WaterfallView(waterfall))
    console.print(
        f"\n{'everything was verified' if result.ok else 'NOT EVERYTHING WAS VERIFIED'}: "
        f"{len(story.checked)} updates, {len(result.trace_ids)} traces"
    )


def _by_model(checked: Checked) -> tuple[str, int, str]:
    return checked.update.model, checked.update.version, checked.update.engine

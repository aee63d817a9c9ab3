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
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.settings import BusSettings
from weightbus.cli.demo.beside import looking_on
from weightbus.cli.demo.endpoint import why_no_endpoint
from weightbus.cli.demo.fleet import DemoFailed, open_fleet
from weightbus.cli.demo.report import make_directory, write_report
from weightbus.cli.demo.result import Result, result_of, verdict
from weightbus.cli.demo.script import Script, choose_script, choose_vllm_script
from weightbus.cli.demo.story import Checked, Say, Story
from weightbus.cli.until import open_stop
from weightbus.tracing.history import HISTORY_MESSAGES, build_waterfall
from weightbus.tracing.waterfall import Waterfall
from weightbus.tracing.waterfall_view import WaterfallView

__all__ = ("command",)


@click.command()
@click.option(
    "--engine",
    "kind",
    type=click.Choice(["torch", "vllm"]),
    default="torch",
    show_default=True,
    help="What follows the trainer.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on the last line.")
@click.option(
    "--report",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the last round to this directory: as HTML, for Perfetto, and as OTLP/JSON.",
)
def command(kind: str, as_json: bool, report: Path | None) -> None:
    """Train, publish and follow a few versions on this machine, and verify each.

    A trainer fine-tunes a real sentence encoder (MiniLM) and trains a small mixture-of-experts
    decoder. Four engines follow the encoder: one on the trainer's host reads its memory (local),
    others have host ids of their own and take a broadcast, or pull (p2p). One with two
    tensor-parallel ranks follows the decoder. One joins late, one is killed and comes back. After
    every version each engine's parameters and answers are compared with the trainer's. Exit code 0
    only if everything was verified.

    With --engine vllm two vLLM servers follow the encoder; one joins late, one is killed and comes
    back. It needs vLLM in the environment of this command (docs/vllm.md). Without a GPU it takes
    about five minutes: every start of vLLM takes 45 to 80 s, and 3 GB of memory.

    Without the libraries of the transfer engine it says which are missing, and shows local only.
    """
    if report is not None:
        make_directory(report)
    ok = anyio.run(_run, kind, as_json, report)
    if ok is None:
        raise click.Abort
    if not ok:
        sys.exit(1)


async def _run(kind: str, as_json: bool, report: Path | None) -> bool | None:
    """Whether everything was verified; None: interrupted."""
    console = Console(highlight=False)
    begin = time.monotonic()

    def say(text: str) -> None:
        time_s = time.monotonic() - begin
        console.print(f"[dim]{time_s:6.1f} s[/dim]  {escape(text)}", soft_wrap=True)

    settings = BusSettings(name="demo", server_path=BusSettings.from_env(os.environ).server_path)
    async with open_stop() as stop:
        missing = await why_no_endpoint()
        if missing:
            say(f"without the routes p2p and broadcast: {missing}")
        with tempfile.TemporaryDirectory(prefix="weightbus-demo-") as directory:
            choose = choose_vllm_script if kind == "vllm" else choose_script
            script = choose(say, elsewhere=not missing)
            story, waterfall = await _follow(settings, Path(directory), say, script)
    if stop.came:
        return None
    result = result_of(story.checked, story.dead_letters, missing, script.routes)
    told = "" if report is None else write_report(report, waterfall)
    _show(console, story, waterfall, result, told)
    if as_json:
        click.echo(msgspec.json.encode(result))
    return result.ok


async def _follow(
    settings: BusSettings, directory: Path, say: Say, script: Script
) -> tuple[Story, Waterfall]:
    """The whole demo; returns with every process ended."""
    async with (
        open_bus(settings) as bus,
        open_fleet(directory, bus.url, bus.prefix) as fleet,
        anyio.create_task_group() as group,
    ):
        for line in looking_on(sys.argv[0], bus.url):
            say(line)
        story = Story(bus, fleet, say)
        await group.start(story.listen)
        await script.tell(story, fleet, say)
        waterfall = await _last_round(bus, story)
        group.cancel_scope.cancel()
    return story, waterfall


async def _last_round(bus: Bus, story: Story) -> Waterfall:
    """The waterfall of the round of the last update that two engines shared."""
    update = next(
        checked.update for checked in reversed(story.checked) if checked.spec.model == "minilm"
    )
    history = [told async for told in bus.replay(*HISTORY_MESSAGES, model=update.model)]
    waterfall = build_waterfall(update.model, update.round, history)
    if waterfall is None:
        raise DemoFailed(f"round {update.round}", "the bus remembers nothing of it")
    return waterfall


def _show(
    console: Console, story: Story, waterfall: Waterfall, result: Result, report: str
) -> None:
    table = Table(title="Every version in every engine", title_justify="left", show_edge=False)
    for heading in ("model", "version", "engine", "ranks", "route", "update", "paused", "bits"):
        table.add_column(
            heading,
            justify="right" if heading in ("update", "paused") else "left",
            no_wrap=heading in ("engine", "route", "update", "paused"),
            min_width=len("broadcast") if heading == "route" else None,
        )
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
            Text("; ".join(checked.faults) or "the same"),
        )
    console.print()
    console.print(table)
    console.print()
    console.print(WaterfallView(waterfall))
    if report:
        console.print(f"\n{escape(report)}", soft_wrap=True)
    console.print(f"\n{escape(verdict(result))}", soft_wrap=True)


def _by_model(checked: Checked) -> tuple[str, int, str]:
    return checked.update.model, checked.update.version, checked.update.engine

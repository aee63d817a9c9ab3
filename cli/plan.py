"""`weightbus plan`: what a round would decide for a model and a fleet; neither need exist."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from weightbus.bus.files import read_layout_of_files
from weightbus.consumers.planning.cost import RouteCost
from weightbus.consumers.planning.explain import Explanation, Fleet, PartExplained, explain
from weightbus.consumers.planning.shapes import MODELS, Families, Family, families_of
from weightbus.schemas.layout_codec import decode_layout
from weightbus.tracing.text import counted, format_bytes, format_seconds

__all__ = ("command",)

T = TypeVar("T")

EXIT_REFUSED = 1


@click.command("plan")
@click.option("--model", type=click.Choice(sorted(MODELS)), help="A model that comes with this.")
@click.option(
    "--layout",
    "layout_file",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    help="Of a layout as it is stored, a safetensors file, or the index of several.",
)
@click.option(
    "--families",
    "families_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='A model as JSON: [{"name": ..., "dtype": ..., "shape": [...], "count": ...}, ...].',
)
@click.option(
    "--fleet",
    "fleet_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Engines, hosts and rates as JSON, such as examples/fleets/kimi-k2-32x8.json.",
)
@click.option("--explain", "explained", is_flag=True, help="Say why, stage by stage.")
@click.option("--json", "as_json", is_flag=True, help="All of it as JSON, with the plan itself.")
def command(
    model: str | None,
    layout_file: Path | None,
    families_file: Path | None,
    fleet_file: Path,
    explained: bool,
    as_json: bool,
) -> None:
    """Print the routes that a round would take, with bytes per card and predicted seconds.

    Neither the model nor the fleet need exist. docs/cost-model.md derives the numbers. Exits with 1
    if no engine can be planned for.
    """
    if sum(given is not None for given in (model, layout_file, families_file)) != 1:
        raise click.UsageError("give one of --model, --layout and --families")
    if layout_file is not None:
        families = _families_of_file(layout_file)
    elif families_file is not None:
        families = _decoded("--families", families_file, Families)
    else:
        families = MODELS[str(model)]()
    explanation = explain(families, _decoded("--fleet", fleet_file, Fleet))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(explanation), indent=2))
    else:
        _show(explanation, explained)
    if explanation.plan is None:
        click.get_current_context().exit(EXIT_REFUSED)


def _decoded(option: str, path: Path, kind: type[T]) -> T:
    """A JSON file.

    Raises:
        BadParameter: it is not what it must be.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.MsgspecError as error:
        raise click.BadParameter(f"{path}: {error}", param_hint=option) from None


def _families_of_file(path: Path) -> tuple[Family, ...]:
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return families_of(read_layout_of_files([str(path)], None))
    return families_of(decode_layout(path.read_bytes()))


def _show(explanation: Explanation, explained: bool) -> None:
    ranks, hosts = counted(explanation.ranks, "rank"), counted(explanation.hosts, "host")
    click.echo(
        f"{counted(explanation.tensors, 'tensor')}, {format_bytes(explanation.layout_bytes)}, "
        f"to {ranks} on {hosts}"
    )
    if explanation.lanes:
        lanes, slots = counted(explanation.lanes, "lane"), counted(explanation.slots, "slot")
        size = f"{explanation.bucket_bytes / 2**20:,g} MiB"
        where = " in memory of its GPU" if explanation.device else ""
        click.echo(f"broadcast in {lanes}; {slots} of {size} each{where}")
    alike: dict[Hashable, list[PartExplained]] = {}
    for part in explanation.parts:
        alike.setdefault(_likeness(part), []).append(part)
    for parts in alike.values():
        _show_alike(parts, explained)
    click.echo()
    if explanation.plan is None:
        click.echo("nobody can be planned for")
    else:
        click.echo(f"predicted in all: {format_seconds(explanation.seconds)}")


def _likeness(part: PartExplained) -> Hashable:
    """Parts that are described by the same words: of those that are refused, the reason is shown of
    the first."""
    if part.cost is None:
        return part.ranks, part.reason.replace(part.part, "").replace(part.host, "")
    return part.ranks, part.reason, part.cost, part.rank_bytes, tuple(part.rejected.items())


def _show_alike(parts: list[PartExplained], explained: bool) -> None:
    first = parts[0]
    click.echo()
    click.echo(_who(parts))
    if first.cost is None:
        click.echo(f"  refused: {first.reason}")
        return
    click.echo(f"  {first.cost.route}: {first.reason}")
    click.echo(f"  bytes per card: {format_bytes(first.rank_bytes)} written{_staged(first.cost)}")
    if explained:
        _show_stages(first.cost)
        for route, why in first.rejected.items():
            click.echo(f"  not {route}: {why}")


def _who(parts: Sequence[PartExplained]) -> str:
    """`16 engines, kimi-0 ... kimi-15, on 32 hosts: 8 ranks of an engine on each`."""
    engines = list(dict.fromkeys(part.engine for part in parts))
    hosts, ranks = {part.host for part in parts}, counted(parts[0].ranks, "rank")
    if len(parts) == 1:
        return f"{parts[0].part} on {parts[0].host}: {ranks}"
    who, of = engines[0], ""
    if len(engines) > 1:
        names = f"{engines[0]} {'...' if len(engines) > 2 else 'and'} {engines[-1]}"
        who, of = f"{counted(len(engines), 'engine')}, {names},", "an engine"
    where = f"{who} on {counted(len(hosts), 'host')}"
    if len(parts) > len(hosts):
        return f"{where}: {ranks} each"
    return f"{where}: {ranks} {f'of {of} ' if of else ''}on each"


def _staged(cost: RouteCost) -> str:
    if not cost.lane_bytes:
        return ""
    received = f", {format_bytes(cost.card_bytes)} received" if cost.card_bytes else ""
    return f", {format_bytes(cost.lane_bytes)} staged{received}"


def _show_stages(cost: RouteCost) -> None:
    table = Table("stage", "seconds", "bytes per host", "limited by", box=None, pad_edge=False)
    for stage in cost.stages:
        size = format_bytes(stage.bytes) if stage.bytes else ""
        table.add_row(stage.name, f"{stage.seconds:,.3f}", size, stage.limit)
    overlapped = f"overlapped in {counted(cost.buckets, 'bucket')}" if cost.buckets > 1 else ""
    table.add_row("in all", f"{cost.seconds:,.3f}", "", overlapped)
    console = Console(width=100, soft_wrap=True)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(f"  {line.rstrip()}")

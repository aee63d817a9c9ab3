"""`weightbus publish`: safetensors files as a version of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anyio
import click
from msgspec import structs

from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.cli.monitoring import running_bus
from weightbus.schemas.codec import CONTENT_TYPE_JSON, encode
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import open_telemetry

if TYPE_CHECKING:
    from weightbus.schemas.checkpoint import CheckpointReady

__all__ = ("command",)

SERVICE = "weightbus-publish"


def _parse_metadata(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise click.BadParameter(f"{key!r} is not of the form KEY=VALUE")
    return {key: value for key, _, value in pairs}


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--model", required=True, help="Model of which the files are a version.")
@click.option(
    "--version",
    type=click.IntRange(min=0),
    required=True,
    help="Must be greater than every version of the model before.",
)
@click.option("--nats", "nats_url", help="NATS URL; else WEIGHTBUS_NATS_URL.")
@click.option(
    "--producer", default="publish", show_default=True, help="Name under which to publish."
)
@click.option(
    "--no-digest", is_flag=True, help="Do not read the data: engines then cannot verify it."
)
@click.option(
    "--metadata",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_parse_metadata,
    help="Goes with the event; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the event as one JSON object.")
def command(
    files: Sequence[str],
    model: str,
    version: int,
    nats_url: str | None,
    producer: str,
    no_digest: bool,
    metadata: Mapping[str, str],
    as_json: bool,
) -> None:
    """Publish safetensors FILES as a version of a model.

    FILES are paths, quoted patterns such as 'step-7/*.safetensors', or an index such as
    model.safetensors.index.json. They stay where they are; every engine's host must see them under
    the same paths, below a directory that its consumer allows (--root).
    """
    settings = running_bus(nats_url, SERVICE)
    otlp = OtlpSettings.from_env(os.environ)
    if otlp is not None:  # this ends before Prometheus comes, and others may have its port
        otlp = structs.replace(otlp, prometheus=None)
    ready = anyio.run(
        run_publish, settings, otlp, files, model, version, producer, metadata, not no_digest
    )
    if as_json:
        click.echo(encode(ready, CONTENT_TYPE_JSON))
        return
    click.echo(f"published  {ready.model} version {ready.version}")
    click.echo(f"digest     {ready.weights_digest or 'none: engines cannot verify what they get'}")
    for number, path in enumerate(ready.files):
        click.echo(f"{'' if number else 'files':10} {path}")


async def run_publish(
    settings: BusSettings,
    otlp: OtlpSettings | None,
    files: Sequence[str],
    model: str,
    version: int,
    producer: str,
    metadata: Mapping[str, str],
    digest: bool,
) -> CheckpointReady:
    """Connect, announce the files, and leave."""
    try:
        from weightbus.producers.announcing import Announcer
        from weightbus.producers.files import publish_files
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"publishing needs the package {error.name}: pip install 'weightbus[torch]'"
        ) from error
    with open_telemetry(SERVICE, otlp=otlp) as telemetry:
        async with open_bus(settings) as bus:
            announcer = Announcer(bus, model, producer)
            with announcer.span(telemetry, version) as span:
                return await publish_files(
                    announcer, files, version, metadata, digest=digest, span=span
                )

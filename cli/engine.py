"""`weightbus engine`: a torch engine on its own, for consumers and clients that come and go."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
import click
import msgspec

from weightbus.cli.options import device_option
from weightbus.consumers.engines.torch.server import run_engine
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.tracing.text import counted

__all__ = ("command", "ready_line")


@click.command()
@click.option(
    "--architecture",
    required=True,
    type=click.Choice(["minilm", "decoder", "shapes"]),
    help="Its model; one of shapes only holds the parameters of a large one.",
)
@click.option(
    "--config", default="{}", help="Configuration of the architecture, as JSON; else its default."
)
@click.option("--tp", default=1, show_default=True, help="Ranks, each a process.")
@device_option
@click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of its sockets; created if need be, for its owner alone.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="A safetensors file to serve from the start.",
)
@click.option("--threads", default=1, show_default=True, help="Threads of torch in each rank.")
def command(
    architecture: str,
    config: str,
    tp: int,
    device: str,
    directory: Path,
    weights: str | None,
    threads: int,
) -> None:
    """Run a torch engine of one process per rank, until SIGINT or SIGTERM.

    Without --weights it serves nothing before a consumer has brought it a version. It outlives its
    consumer: what that one paused stays paused until another resumes it.
    """
    try:
        document = {
            "architecture": architecture,
            "config": msgspec.json.decode(config),
            "tp": tp,
            "device": device,
            "weights": weights or "",
            "threads": threads,
        }
        spec = msgspec.convert(document, TorchEngineSpec)
    except msgspec.MsgspecError as error:
        raise click.BadParameter(f"not an engine: {error}") from None
    announce = partial(click.echo, ready_line(architecture, tp, directory))
    anyio.run(run_engine, directory, spec, announce)


def ready_line(architecture: str, tp: int, directory: Path) -> str:
    """What is said once it can be spoken to."""
    return f"{architecture} engine with {counted(tp, 'rank')} is ready in {directory}"

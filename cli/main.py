"""The `weightbus` command: finds the subcommand, and turns errors into one line and an exit code.

Each subcommand is `command` of a module of its own, imported when it is called and not before: the
help of all of them, and every monitor, starts without torch. Exit codes: 0 done, 1 failed, 2 used
wrongly, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Final

import click

import weightbus
from weightbus.schemas.errors import WeightBusError

__all__ = ("COMMANDS", "EXIT_FAILED", "EXIT_INTERRUPTED", "LazyGroup", "cli", "main", "run")

EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130

COMMANDS: Final[Mapping[str, str]] = {
    "demo": "Train, publish and follow a few versions on this machine, and verify each.",
    "serve": "Run a bus on this machine until interrupted.",
    "publish": "Publish safetensors files as a version of a model.",
    "consume": "Keep an inference engine on the newest version.",
    "engine": "Run a torch engine of one process per rank.",
    "watch": "Show engines and updates, live.",
    "ui": "Serve a web page about engines and updates, live.",
    "trace": "Show where the time of a round went.",
    "plan": "Predict routes and times of a round for a model and a fleet.",
    "doctor": "Check this host, and measure what routes are chosen by.",
    "schema": "Print the contract as JSON Schema or AsyncAPI.",
}
"""Name -> one line of help; the command is `weightbus.cli.<name>.command`."""

EXTRA_OF: Final[Mapping[str, str]] = {
    "httpx": "http",
    "numpy": "torch",
    "safetensors": "torch",
    "starlette": "ui",
    "torch": "torch",
    "uvicorn": "ui",
    "zmq": "torch",
    "mooncake": "p2p",
    "vllm": "vllm",
}
"""Package that a monitor does without -> the extra that brings it."""


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"weightbus.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if close := get_close_matches(args[0], COMMANDS, n=1):
                told = f"{error.message} Did you mean '{close[0]}'?"
                raise click.UsageError(told, ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(weightbus.__version__, package_name="weightbus")
def cli() -> None:
    """Weight bus: fresh weights into running inference engines, as events on a message bus."""


def main() -> None:
    """Entry point of the `weightbus` script."""
    sys.exit(run(cli, sys.argv[1:]))


def run(command: click.Command, arguments: Sequence[str]) -> int:
    """Run a command to its end; returns its exit code.

    What Weight bus raises becomes one line per error on stderr, and so does a package of an extra
    that is not installed; other exceptions are our own mistakes and pass, with their traceback.
    """
    try:
        code = command.main(list(arguments), prog_name="weightbus", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _interrupted()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        install = f"pip install 'weightbus[{EXTRA_OF[package]}]'"
        click.echo(f"weightbus: this command needs {package}: {install}", err=True)
        return EXIT_FAILED
    except (WeightBusError, BaseExceptionGroup) as error:
        leaves = tuple(_leaves(error))
        if any(isinstance(leaf, KeyboardInterrupt | click.Abort) for leaf in leaves):
            return _interrupted()
        if not all(isinstance(leaf, WeightBusError) for leaf in leaves):
            raise
        for line in dict.fromkeys(f"weightbus: {leaf}" for leaf in leaves):
            click.echo(" ".join(line.split()), err=True)
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


def _interrupted() -> int:
    click.echo("weightbus: interrupted", err=True)
    return EXIT_INTERRUPTED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error
